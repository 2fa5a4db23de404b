"""Compiling for chips that are not here: what a target tells, what it refuses, and what to install."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.analysis import ptx, targets
from pallas_kernels.analysis.targets import CompilerMissing, Target

ROOT = Path(__file__).parents[3]

# One process a platform compiles a matmul kernel for each target and prints what it learned, by name.
CHILD = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import NamedSharding, PartitionSpec
from pallas_kernels.hardware import detect
from pallas_kernels.analysis.targets import Target

def matmul(x, y, platform, rows):
    def kernel(x, y, o):
        o[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)
    extra = {"compiler_params": plt.CompilerParams(num_warps=4, num_stages=2)} if platform == "gpu" else {}
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((2 * rows, 128), jnp.float32), grid=(2,),
        in_specs=[pl.BlockSpec((rows, 128), lambda i: (i, 0)), pl.BlockSpec((128, 128), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((rows, 128), lambda i: (i, 0)), **extra)(x, y)

def seen(name, rows):
    target, saw = Target.get(name), []
    def fn(x, y, platform, scale):
        saw.append(detect().name)
        return matmul(x, y, platform, rows) * scale
    x = jax.ShapeDtypeStruct((2 * rows, 128), jnp.bfloat16)
    c = target.compile(fn, x, jnp.ones((128, 128), jnp.bfloat16), target.chip.platform, scale=2.0, static_argnums=2,
                       static_argnames="scale")
    return {"saw": saw, "memory": dict(c.memory), "seconds": c.seconds, "vmem": c.vmem_bytes, "text": c.text[:9],
            "kernels": [k.figures() for k in c.kernels]}

out = {name: seen(name, 64) for name in sys.argv[1:]}
if "v5e" in out:
    target = Target.get("v5e:2x4")
    mesh = target.mesh({"data": 2, "model": 4})
    x = jax.ShapeDtypeStruct((512, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "model")))
    out["slice"] = {"collective": "all-reduce" in target.compile(lambda x: x.sum(), x).text}
    each = jax.shard_map(lambda x: matmul(x, x[:128], "tpu", 64), mesh=mesh, in_specs=PartitionSpec("data"),
                         out_specs=PartitionSpec("data"), check_vma=False)
    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
    out["slice"]["kernel"] = "tpu_custom_call" in target.compile(each, x).text
    c = Target.get("v5e").compile(lambda x: x + 1, jax.ShapeDtypeStruct((8, 128), jnp.float32), donate_argnums=0)
    out["donated"] = c.memory["alias"]
    try:
        large = jax.ShapeDtypeStruct((2**16, 128), jnp.float32)
        Target.get("v5e").compile(lambda x: matmul(x, x[:128], "tpu", 2**15), large)
    except jax.errors.JaxRuntimeError as error:
        out["vmem"] = str(error)
print("RESULT" + json.dumps(out))
"""


def compile_all(*names):
    if (why := targets.missing(names[0])) is not None:
        pytest.skip(why)
    env = {**os.environ, **targets.environment(), "PYTHONPATH": str(ROOT)}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run([sys.executable, "-c", CHILD, *names], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.aot
def test_every_tpu_compiles_a_kernel():
    out = compile_all(*targets.TPUS)
    for name in targets.TPUS:
        said = out[name]
        assert said["saw"] == [name]
        assert said["memory"]["argument"] == 2 * 64 * 128 * 2 + 128 * 128 * 2
        assert said["memory"]["output"] == 2 * 64 * 128 * 4
        assert said["vmem"] >= 2 * 64 * 128 * 4  # the output, double buffered; x may have been moved there before
        assert said["text"] == "HloModule"
        assert said["kernels"] == []
        assert said["seconds"] > 0
    assert out["slice"] == {"collective": True, "kernel": True}
    assert out["donated"] == 8 * 128 * 4
    assert "exceeded scoped vmem limit" in out["vmem"]


@pytest.mark.aot
def test_every_gpu_compiles_a_kernel():
    out = compile_all(*targets.GPUS)
    arches = {"a100": "sm_80", "l4": "sm_89", "h100": "sm_90a", "b200": "sm_100a"}
    for name, arch in arches.items():
        assert out[name]["saw"] == [name]
        (kernel,) = [k for k in out[name]["kernels"] if k["mma"]]
        assert kernel["arch"] == arch
        assert kernel["tensor_cores"]
        assert kernel["spill_bytes"] == kernel["stack_bytes"] == 0
        assert 0 < kernel["registers"] < 256
        assert 64 * 128 * 2 <= kernel["shared_bytes"] <= targets.Target.get(name).chip.smem_bytes
        assert kernel["sass"] is None or kernel["sass"]


def test_names():
    assert Target.get("v5e").topology == "1x1"
    assert Target.get("tpu7x").topology == "1x1x1"
    assert Target.get("v5e:2x4").topology == "2x4"
    assert Target.get("h100:8").topology == "1x1x8"
    with pytest.raises(ValueError, match=r"t4 has no Pallas compiler.*a100"):
        Target.get("t4")
    with pytest.raises(ValueError, match="no chip 'v9'"):
        Target.get("v9")


@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:4x8", "v6e:16x16", "v5p:2x2x1", "v4:4x4x12", "7x:2x2x4", "h100:16"])
def test_slices_that_exist(name):
    assert Target.get(name).topology.endswith(name.split(":")[1])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e:3", "has no slice 3.*such as v5e:2x4"),
        ("v5e:9x9", "no slice 9x9"),
        ("v5e:2x", "no slice 2x"),
        ("v6e:2x2x2", "two axes"),
        ("v5p:2x2", "three axes.*such as v5p:2x2x2"),
        ("v4:2x2x0", "no slice 2x2x0"),
        ("h100:0", "write h100:8"),
        ("h100:2x4", "write h100:8"),
    ],
)
def test_slices_that_do_not_exist_are_refused(name, says):
    with pytest.raises(ValueError, match=says):
        Target.get(name)


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    absent = ("libtpu", "jax_plugins.xla_cuda12")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(CompilerMissing, match=r"libtpu: pip install 'pdx-inference\[aot-tpu\]'"):
        Target.get("v5e").devices()
    with pytest.raises(CompilerMissing, match=r"CUDA plugin: pip install 'pdx-inference\[aot-gpu\]'"):
        Target.get("l4").compile(lambda: 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in absent else find(name))
    monkeypatch.setattr(ptx, "tool", lambda name: None)
    assert targets.missing("v5e") is None
    assert "ptxas" in targets.missing("a100")


def test_an_environment_that_was_not_set_is_named(monkeypatch):
    monkeypatch.setattr(targets, "missing", lambda name: None)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with pytest.raises(RuntimeError, match=r"TPU_SKIP_MDS_QUERY.* must be set before jax starts"):
        Target.get("v5e").devices()


PTX = """
.version 8.0
.target sm_80
.visible .entry first(
@%p1 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 };
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r2 };
.visible .entry second(
  fma.rn.f32 %f1, %f2;
"""


def test_matrix_instructions_are_counted_by_entry():
    counted = ptx._by_entry(PTX)
    assert counted["first"] == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 2}
    assert not counted["second"]
