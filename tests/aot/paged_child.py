"""Compile, over donated pages, a write with attention behind it, writes alone and copies; a JSON object a line.

`python -m tests.aot.paged_child TARGET NAME ...`, in a process started with `targets.environment()`.
"""

import json
import sys
from math import prod

import jax
import jax.numpy as jnp

from pallas_kernels import paged_attention, quantize_kv, write_pages
from pallas_kernels.analysis import hlo
from pallas_kernels.analysis.targets import Target
from pallas_kernels.layouts import cache_shape, round_up
from pdx.cache.paged import copy_pages, paged_cache_specs
from pdx.config import ModelConfig
from pdx.sharding import is_spec

PAGE, ROWS, WIDTH, POOL = 128, 34, 64, 640 << 20
# Written alone, as the whole program: tokens of one step, and of a chunk of 2048 for 64 rows.
WRITTEN = {"written int8": 1024, "written int8, many tokens": 1 << 17}
# KV heads, group, head size, type of the pages.
CASES = {
    "bf16": (8, 4, 128, "bfloat16"),
    "three heads of 64": (3, 3, 64, "bfloat16"),
    "f32": (8, 4, 128, "float32"),
    "int8": (8, 4, 128, "int8"),
    "int8, three heads of 64": (3, 3, 64, "int8"),
}


def step_of(name: str, platform: str):
    """The step and its abstract arguments, the pools first; 32 decode rows and chunks of 512 and 256 tokens.

    Queries come and results go with heads side by side, as projections make and take them (`Problem.as_projected`).
    """
    heads, group, size, dtype = CASES[name]
    layout = "folded" if platform == "tpu" else "heads_last"
    int8, tokens = dtype == "int8", 1024
    compute = "float32" if dtype == "float32" else "bfloat16"
    token = prod(cache_shape(layout, 1, 1, heads, size)) * jnp.dtype(dtype).itemsize
    pages = POOL // (2 * PAGE * token)
    pool = jax.ShapeDtypeStruct(cache_shape(layout, pages, PAGE, heads, size), dtype)
    scale = jax.ShapeDtypeStruct((pages, round_up(heads, 8), PAGE), jnp.float32)
    pools = (pool, pool, scale, scale) if int8 else (pool, pool)

    def step(pools, q, k, v, slots, tables, lengths, starts):
        named = {}
        if int8:
            (k, ks), (v, vs) = quantize_kv(k), quantize_kv(v)
            named = {"k_scale": pools[2], "v_scale": pools[3], "new_k_scale": ks, "new_v_scale": vs}
        pools = write_pages(*pools[:2], k, v, slots=slots, layout=layout, **named)
        scales = dict(zip(("k_scale", "v_scale"), pools[2:], strict=False))
        q = q.reshape(tokens, heads * group, size)
        out = paged_attention(
            q,
            *pools[:2],
            block_tables=tables,
            lengths=lengths,
            query_starts=starts,
            scale=0.1,
            layout=layout,
            kv_heads=heads,
            decode_rows=32,
            implementation=platform,
            **scales,
        )
        return pools, out.reshape(tokens, -1)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    new = jax.ShapeDtypeStruct((tokens, heads, size), compute)
    q = jax.ShapeDtypeStruct((tokens, heads * group * size), compute)
    return step, (pools, q, new, new, ints(tokens), ints(ROWS, WIDTH), ints(ROWS), ints(ROWS + 1))


def write_of(name: str):
    """The write of int8 pages and nothing behind it, and its abstract arguments."""
    heads, _, size, _ = CASES["int8"]
    pages, tokens = POOL // (2 * PAGE * heads * size), WRITTEN[name]
    pool = jax.ShapeDtypeStruct(cache_shape("folded", pages, PAGE, heads, size), jnp.int8)
    scale = jax.ShapeDtypeStruct((pages, heads, PAGE), jnp.float32)
    new = jax.ShapeDtypeStruct((tokens, heads, size), jnp.int8)
    new_scale = jax.ShapeDtypeStruct((tokens, heads), jnp.float32)

    def write(pools, k, v, k_scale, v_scale, slots):
        return write_pages(
            *pools[:2],
            k,
            v,
            slots=slots,
            layout="folded",
            k_scale=pools[2],
            v_scale=pools[3],
            new_k_scale=k_scale,
            new_v_scale=v_scale,
        )

    slots = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    return write, ((pool, pool, scale, scale), new, new, new_scale, new_scale, slots)


def copy_of(dtype: str, platform: str):
    """Four pages copied in a pool of one layer, and its abstract arguments."""
    heads, _, size, _ = CASES["bf16"]
    cfg = ModelConfig(
        family="llama",
        vocab_size=128,
        d_model=128,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size,
        d_ff=128,
        max_context=8192,
    )
    pages = POOL // (2 * PAGE * heads * size * jnp.dtype(dtype).itemsize)
    layout = "folded" if platform == "tpu" else "heads_last"
    specs = paged_cache_specs(cfg, pages, page_size=PAGE, dtype=jnp.dtype(dtype), layout=layout)
    cache = jax.tree.map(lambda spec: spec.abstract(), specs, is_leaf=is_spec)
    ids = jax.ShapeDtypeStruct((4,), jnp.int32)
    return lambda cache, src, dst: copy_pages(cache, 0, src, dst), (cache, ids, ids)


def facts(target: str, name: str) -> dict:
    chip = Target.get(target)
    copied = name.removeprefix("copied ")
    if name in WRITTEN:
        step, arguments = write_of(name)
    else:
        step, arguments = (step_of if copied == name else copy_of)(copied, chip.chip.platform)
    compiled = chip.compile(step, *arguments, donate_argnums=0)
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0])]
    moved = hlo.moved(compiled.text, min(sizes))
    if name in WRITTEN:  # the new values are put in the order of their slots, and may be larger than a pool of scales
        moved = [i for i in moved if any(shape.bytes in sizes for shape in i.shapes)]
    return {
        "name": name,
        "seconds": compiled.seconds,
        "memory": dict(compiled.memory),
        "pools": sum(sizes),
        "sorted": 2 * arguments[1].size if name in WRITTEN else 0,  # new keys and values, in the order of their slots
        "aliases": len(hlo.aliases(compiled.text)),
        "arrays": len(sizes),
        "moved": [str(i) for i in moved],
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
