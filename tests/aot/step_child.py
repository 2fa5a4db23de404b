"""Compile whole steps for one target and print what the compiler made of them, a JSON object a line.

`python -m tests.aot.step_child TARGET NAME ...`, in a process started with `targets.environment()`.
"""

import json
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.analysis import hlo, problems, static
from pallas_kernels.analysis.problem import nbytes
from pallas_kernels.analysis.targets import Target
from pallas_kernels.attention.cases import Case
from pdx import aot
from pdx.cache.layer import default_layout
from pdx.config import ModelConfig, RopeConfig
from pdx.cost import Setup

# Moves from this size on are looked for in a step of few tokens: its activations are smaller. A chunk's are not:
# there only moves as large as a layer's cache count.
LARGE = 4 << 20


def model(family, layers, **changes) -> ModelConfig:
    shapes = {
        "smollm2": {
            "vocab_size": 49152,
            "d_model": 576,
            "num_heads": 9,
            "num_kv_heads": 3,
            "head_dim": 64,
            "d_ff": 1536,
            "tie_embeddings": True,
        },
        "llama3-8b": {
            "vocab_size": 128256,
            "d_model": 4096,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "d_ff": 14336,
            "tie_embeddings": False,
        },
        "gemma3": {
            "vocab_size": 32768,
            "d_model": 640,
            "num_heads": 4,
            "num_kv_heads": 1,
            "head_dim": 256,
            "d_ff": 2048,
            "tie_embeddings": True,
        },
    }[family]
    shapes |= {"windows": (None,) * layers, "attn_scale": shapes["head_dim"] ** -0.5, "norm_eps": 1e-5} | changes
    return ModelConfig(family="llama", num_layers=layers, rope=RopeConfig(5e5), max_context=8192, **shapes)


LLAMA = {"batch": 8, "capacity": 2048, "kv_dtype": jnp.int8}
SMALL = {"vocab_size": 32768, "d_model": 1024, "num_heads": 16, "num_kv_heads": 8, "head_dim": 64, "d_ff": 3072}
GEMMA = {"windows": (512, 512, None)}
# Caches of a layer are larger than VMEM, or the compiler may keep some there for a while, which tells nothing.
# 24 of Llama's 32 layers are what 16 GiB hold in bf16.
CASES = {
    "smollm2": ("decode_step", model("smollm2", 30), {"batch": 48, "capacity": 8192}),
    "llama3-8b": ("decode_step", model("llama3-8b", 24), {"batch": 8, "capacity": 2048}),
    "llama3-8b bf16": ("decode_step", model("llama3-8b", 32), {"batch": 8, "capacity": 2048}),
    "llama3-8b int8": ("decode_step", model("llama3-8b", 32), LLAMA | {"quantize": "int8"}),
    "int8 alone": ("decode_step", model("llama3-8b", 2), LLAMA | {"batch": 1, "quantize": "int8"}),
    "llama3-8b int4": ("decode_step", model("llama3-8b", 32), LLAMA | {"quantize": "int4:g128"}),
    "int8 prefill": ("prefill", model("llama3-8b", 2), LLAMA | {"quantize": "int8", "tokens": 384}),
    "int4 prefill": ("prefill", model("llama3-8b", 2), LLAMA | {"quantize": "int4:g128", "tokens": 384}),
    "w8a8": ("decode_step", model("llama3-8b", 2), LLAMA | {"quantize": "w8a8"}),
    "gemma3": ("decode_step", model("gemma3", 3, **GEMMA), {"batch": 288, "capacity": 8192}),
    "prefill": ("prefill", model("smollm2", 2), {"batch": 48, "capacity": 8192, "tokens": 512}),
    "verify": ("verify", model("smollm2", 2), {"batch": 12, "capacity": 32768, "tokens": 5}),
    "decode 8b": ("decode_step", model("llama3-8b", 4), {"batch": 8, "capacity": 2048}),
    "verify 8b": ("verify", model("llama3-8b", 4), {"batch": 8, "capacity": 2048, "tokens": 5}),
    "float32": ("decode_step", model("smollm2", 2), {"batch": 48, "capacity": 8192, "dtype": jnp.float32}),
    "mesh": ("decode_step", model("llama3-8b", 2), {"batch": 80, "capacity": 8192, "mesh": {"data": 2, "model": 4}}),
    "mesh int8": (
        "decode_step",
        model("llama3-8b", 2),
        LLAMA | {"batch": 8, "quantize": "int8", "mesh": {"data": 2, "model": 4}},
    ),
    "mesh prefill": (
        "prefill",
        model("llama3-8b", 2),
        {"batch": 80, "capacity": 8192, "tokens": 128, "mesh": {"data": 2, "model": 4}},
    ),
    # 128 tokens: the largest activations, 128 x 14336 in bf16, are smaller than LARGE.
    "mixed smollm2": ("mixed_step", model("smollm2", 30), {"batch": 47, "capacity": 8192, "tokens": 128}),
    "mixed llama3-8b": ("mixed_step", model("llama3-8b", 24), {"batch": 8, "capacity": 2048, "tokens": 128}),
    "mixed decode": ("mixed_step", model("smollm2", 2), {"batch": 48, "capacity": 8192, "tokens": 48}),
    "mixed int8": (
        "mixed_step",
        model("llama3-8b", 2),
        {"batch": 63, "capacity": 8192, "tokens": 128, "kv_dtype": jnp.int8, "quantize": "int8"},
    ),
    "mixed gemma3": ("mixed_step", model("gemma3", 3, **GEMMA), {"batch": 191, "capacity": 8192, "tokens": 256}),
    "mixed mesh": (
        "mixed_step",
        model("llama3-8b", 2),
        {"batch": 79, "capacity": 8192, "tokens": 128, "mesh": {"model": 4}},
    ),
    # For the collectives: each step of a small model with a policy, over eight chips.
    **{
        f"{policy} over 8: {step}": (
            step,
            model("llama3-8b", 2, **SMALL),
            {
                "batch": 8,
                "capacity": 1024,
                "tokens": 5 if step == "verify" else 128,
                "mesh": {"model": 8},
                "quantize": None if policy == "bf16" else policy,
            },
        )
        for policy in ("bf16", "int8", "int8:g128", "int4", "int4:g128:affine", "w8a8")
        for step in ("prefill", "decode_step", "verify", "mixed_step")
    },
    "smoke": ("decode_step", model("smollm2", 1), {"batch": 4, "capacity": 1024}),
    "smoke mixed": ("mixed_step", model("smollm2", 1), {"batch": 4, "capacity": 1024, "tokens": 128}),
    "smoke prefill": ("prefill", model("smollm2", 1), {"batch": 1, "capacity": 1024, "tokens": 256}),
}


# Queries a row of the steps whose attention is counted.
ASKED = {"decode_step": 1, "verify": 5}


def held(tree) -> int:
    """Bytes of these arrays on each device, int4 two to a byte."""
    each = ((x.sharding.shard_shape(x.shape) if x.sharding else x.shape, x.dtype) for x in jax.tree.leaves(tree))
    return sum(nbytes(jax.ShapeDtypeStruct(shape, dtype)) for shape, dtype in each)


def predicted(cfg: ModelConfig, settings: dict, target: str) -> int:
    """Bytes of weights and cache by the cost model."""
    names = {k: jnp.dtype(settings[k]).name for k in ("dtype", "kv_dtype") if settings.get(k)}
    layout = default_layout(Target.get(target).chip.platform)
    setup = Setup(cfg, quantize=settings.get("quantize"), layout=layout, **names)
    return sum(setup.weights.values()) + setup.cache_bytes(settings["batch"], settings["capacity"])


def attention_bytes(cfg: ModelConfig, batch: int, capacity: int, queries: int, target: Target) -> int:
    """Bytes that one layer's attention kernel moves with full rows, counted from its grid and DMAs."""
    held, new, group = (capacity - queries,) * batch, (queries,) * batch, cfg.num_heads // cfg.num_kv_heads
    case = Case("step", held, new, queries, capacity, cfg.num_kv_heads, group, cfg.head_dim, dtype="bfloat16")
    platform = target.chip.platform
    problem = problems.OPS["decode_attention"](case, problems.for_platform("decode_attention", platform)[0], None)
    return static.facts(problem, target, compile=False)["bytes"]


def facts(target: str, name: str) -> dict:
    step, cfg, settings = CASES[name]
    compiled = aot.compile_step(step, cfg, target, **settings)
    settings = {"tokens": 512, "dtype": jnp.bfloat16} | settings
    _, arguments = aot.step_arguments(step, cfg, target, **settings)
    text, leaf = compiled.text, held(arguments["cache"].layers[0].k)
    return {
        "name": name,
        "seconds": compiled.seconds,
        "memory": dict(compiled.memory),
        "declared": held((arguments["params"], arguments["cache"])),
        "cache": held(arguments["cache"]),
        "weights": held(arguments["params"]),
        "predicted": predicted(cfg, settings, target),
        "kernels": len(text.split('custom_call_target="tpu_custom_call"')) - 1 + len(compiled.kernels),
        "layers": cfg.num_layers,
        "attention": attention_bytes(cfg, settings["batch"], settings["capacity"], ASKED[step], Target.get(target))
        if name.endswith(" 8b")
        else None,
        "moved": [str(i) for i in hlo.moved(text, LARGE if step != "prefill" else leaf)],
        "collectives": hlo.collectives(text),
        "not_ieee": [d.name for d in hlo.dots(text) if not d.ieee],
        "vmem_bytes": compiled.vmem_bytes,
        "spills": sum(k.spill_bytes for k in compiled.kernels),
    }


if __name__ == "__main__":
    target, *names = sys.argv[1:]
    for name in names:
        try:
            found = facts(target, name)
        except Exception as error:  # each case is a test of its own: the others go on
            found = {"name": name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)
