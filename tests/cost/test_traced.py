"""The cost model against steps as they are traced and compiled: FLOPs by type, bytes of the arguments."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pallas_kernels.analysis.problem import nbytes
from pallas_kernels.analysis.targets import Target
from pallas_kernels.analysis.traffic import multiplied
from pallas_kernels.quantized_matmul import tpu as quantized_tpu
from pdx import aot, cost, steps
from pdx.cache.dense import cache_specs
from pdx.cost import Setup, visible_pairs
from pdx.model import param_specs
from pdx.quant import quantized_specs
from pdx.sharding import is_spec

pytestmark = pytest.mark.thin(3)

# The six families as far as a step's products tell them apart; windows end on the blocks of attention.
TINY = pdx.ModelConfig(
    family="llama",
    vocab_size=256,
    d_model=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    d_ff=256,
    max_context=4096,
)
FAMILIES = {
    "llama": TINY,
    "mistral": replace(TINY, family="mistral", windows=(128, 128), tie_embeddings=False),
    "qwen2": replace(TINY, family="qwen2", qkv_bias=True),
    "qwen3": replace(TINY, family="qwen3", qk_norm=True),
    "gemma2": replace(
        TINY,
        family="gemma2",
        windows=(128, None),
        post_norms=True,
        attn_softcap=50.0,
        logit_softcap=30.0,
        embed_scale=128**0.5,
        activation="gelu_tanh",
    ),
    "gemma3": replace(
        TINY,
        family="gemma3",
        windows=(128, None),
        post_norms=True,
        qk_norm=True,
        num_kv_heads=1,
        activation="gelu_tanh",
    ),
}
MIXED = "int4,lm_head=w8a8,layers.0.*=none,layers.-1.down_proj=int8:g32"
STORED = [
    ("llama", None, "float32", "float32"),
    ("llama", None, "bfloat16", "int8"),
    ("llama", "int8", "bfloat16", None),
    ("llama", "int4:g32:affine", "bfloat16", None),
    ("mistral", "w8a8", "bfloat16", "int8"),
    ("mistral", MIXED, "float32", "float32"),
    ("qwen2", "int8", "bfloat16", "int8"),
    ("qwen2", None, "bfloat16", None),
    ("qwen3", "int4", "bfloat16", "float32"),
    ("qwen3", "w8a8", "float32", "int8"),
    ("gemma2", "int8", "float32", None),
    ("gemma2", MIXED, "bfloat16", "int8"),
    ("gemma3", None, "bfloat16", "bfloat16"),
    ("gemma3", "int4:affine", "float32", "int8"),
]


def traced(step, setup, *, target="v5e", kernels="xla", rows=2, held=0, tokens=1, capacity=512):
    """FLOPs by kernel and type of a step as it is traced for a chip, over rows that hold `held` tokens."""
    platform = Target.get(target).chip.platform
    kernels = platform if kernels == "pallas" else kernels
    program, given = aot.step_arguments(
        step,
        setup.cfg,
        target,
        batch=rows,
        capacity=capacity,
        tokens=max(tokens, 512),
        dtype=jnp.dtype(setup.dtype),
        kv_dtype=setup.kv_dtype,
        quantize=setup.quantize,
    )
    new = np.full(rows, tokens, np.int32)
    given["cache"] = given["cache"].replace(lengths=np.full(rows, held, np.int32))
    given |= (
        {"tokens": np.zeros(rows, np.int32), "active": new > 0}
        if step == "decode_step"
        else {"tokens": np.zeros((rows, tokens), np.int32), "lengths": new}
    )
    with Target.get(target).tracing():
        return multiplied(lambda a: program(cfg=setup.cfg, kernels=kernels, **a), given, platform=platform)


def by_type(flops):
    """FLOPs of a Cost or of a trace by the type multiplied."""
    found = {}
    parts = flops.flops_by_type.values() if isinstance(flops, cost.Cost) else [{d: n} for (_, d), n in flops.items()]
    for part in parts:
        for dtype, n in part.items():
            found[dtype] = found.get(dtype, 0) + n
    return found


@pytest.mark.parametrize(("family", "quantize", "dtype", "kv_dtype"), STORED)
def test_flops_are_those_of_the_traced_steps(monkeypatch, family, quantize, dtype, kv_dtype):
    """By type, to the last one. Quantized products are Pallas kernels here, without their form for a few rows, which
    multiplies zeros and digits: that is theirs, not the model's."""
    setup = Setup(FAMILIES[family], dtype, quantize, kv_dtype)
    monkeypatch.setattr(quantized_tpu, "_few_rows", lambda call, chip: None)
    assert by_type(traced("decode_step", setup, held=255)) == by_type(setup.decode(2, 256))
    # Attention of a chunk multiplies the pairs of a block that its mask hides too.
    chunk, held = 128, 128
    model, hidden = by_type(setup.prefill(2, chunk, held)), 0
    for window in setup.cfg.windows:
        hidden += chunk * (held + chunk) - visible_pairs(chunk, held, window)
    attended = "float32" if "float32" in (dtype, kv_dtype) else dtype
    model[attended] += 4 * 2 * hidden * setup.cfg.num_heads * setup.cfg.head_dim
    assert by_type(traced("prefill", setup, held=held, tokens=chunk)) == model


def test_flops_are_those_of_a_traced_verification():
    setup, draft = Setup(TINY, quantize="int8"), 3
    model, found = setup.verify(2, 253, draft), traced("verify", setup, held=252, tokens=draft + 1)
    attention = 4 * 2 * 2 * (draft + 1) * 256 * TINY.num_heads * TINY.head_dim
    assert sum(found.values()) - attention == model.flops - model.flops_by_part["attention"]
    assert model.flops_by_part["attention"] == pytest.approx(attention, rel=0.01)


@pytest.mark.parametrize(
    ("target", "heads", "dtype", "kv_dtype"),
    [
        ("v5e", 32, "bfloat16", None),
        ("v5e", 32, "float32", "float32"),
        ("v6e", 32, "bfloat16", "int8"),
        ("a100", 32, "bfloat16", None),
    ],
)
def test_flops_are_those_of_pallas_kernels_whose_tiles_are_full(target, heads, dtype, kv_dtype):
    """Sixteen query heads a KV head of 128, rows that are full: kernels pad what is less, and that is
    theirs, not the model's. An int8 write on a TPU shifts its rows by a product, which is left out too."""
    setup = Setup(replace(TINY, num_heads=heads, head_dim=128), dtype, None, kv_dtype)
    found = traced("decode_step", setup, target=target, kernels="pallas", held=511)
    assert any(name == "decode_attention" for name, _ in found)
    found = {key: n for key, n in found.items() if key[0] != "write_pages"}
    assert by_type(found) == by_type(setup.decode(2, 512))
    narrow = Setup(TINY, dtype, None, kv_dtype)
    padded = traced("decode_step", narrow, target=target, kernels="pallas", held=511)
    assert padded["decode_attention", dtype] > narrow.decode(2, 512).flops_by_part["attention"]


def test_the_flops_test_can_fail():
    setup = Setup(TINY)
    assert by_type(traced("decode_step", setup, held=255)) != by_type(setup.decode(2, 255))
    assert by_type(traced("decode_step", setup, held=255)) != by_type(Setup(TINY, quantize="w8a8").decode(2, 256))


@pytest.mark.parametrize(("family", "quantize", "dtype", "kv_dtype"), STORED)
@pytest.mark.parametrize(("target", "layout"), [("a100", None), ("v5e", "folded")])
def test_argument_bytes_are_weights_and_cache(family, quantize, dtype, kv_dtype, target, layout):
    """What a step is given, int4 two to a byte as on a TPU, whose cache has lanes of nothing."""
    cfg = replace(FAMILIES[family], num_heads=3, num_kv_heads=3)
    setup = Setup(cfg, dtype, quantize, kv_dtype, layout)
    _, given = aot.step_arguments(
        "decode_step",
        cfg,
        target,
        batch=3,
        capacity=1024,
        tokens=512,
        dtype=jnp.dtype(dtype),
        kv_dtype=kv_dtype,
        quantize=quantize,
    )
    size = sum(map(nbytes, jax.tree.leaves(given)))
    assert size == pytest.approx(sum(setup.weights.values()) + setup.cache_bytes(3, 1024), rel=0.01)


def test_argument_bytes_of_a_compiled_step():
    cfg = replace(TINY, num_layers=1, windows=(None,))
    setup = Setup(cfg, "float32", "int8", "int8")
    params = quantized_specs(param_specs(cfg), setup.policy)
    cache = cache_specs(cfg, 2, 512, dtype=jnp.int8)
    params, cache = (jax.tree.map(lambda s: s.abstract(None), x, is_leaf=is_spec) for x in (params, cache))
    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    made = steps.PROGRAMS["decode_step"].lower(params, cfg, ids, ids.update(dtype=bool), cache, "xla").compile()
    size = made.memory_analysis().argument_size_in_bytes
    assert size == pytest.approx(sum(setup.weights.values()) + setup.cache_bytes(2, 512), rel=0.01)
