"""Paged attention as a Pallas kernel for TPU: v4, v5e, v5p, v6e and 7x.

The pools stay in HBM. The kernel fetches what the rows hold, through their block tables, with its own double-buffered
DMAs. The packed queries are cut into pieces (`pieces.cut`). One sequential grid runs over them, for one group of KV
heads after the other. A row's K and V are read once for each block that its queries lie in; with few heads per group, a
block has room for all packed queries of a step.

Decode rows have few queries, and take all heads at once: `tpu_decode`. A call with both kinds runs both kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.hardware import Chip, detect
from pallas_kernels.layouts import LANES, SCALAR_BYTES, SUBLANES, TILE_ROWS, folded_width, round_up
from pallas_kernels.paged_attention import tpu_decode
from pallas_kernels.paged_attention.call import Call, known
from pallas_kernels.paged_attention.pieces import count, cut, full_rows
from pallas_kernels.paged_attention.tpu_kernel import FIELDS, Plan, body, widest
from pallas_kernels.paged_attention.tpu_tiles import (
    Config,
    config_class,
    decodes,
    heuristic,
    misfit,
    parts,
    smallest_dma,
    smallest_tile,
    tiles_of,
)

NAME = "tpu"
PLATFORM = "tpu"
LAYOUTS = ("folded",)
__all__ = ["Config", "config_class", "heuristic", "misfit", "run", "supported"]


def supported(call: Call) -> str | None:
    """None, or why the TPU kernel cannot do the call."""
    if call.dtype not in ("bfloat16", "float32"):
        return f"the TPU kernel takes queries in bfloat16 or float32, not {call.dtype}"
    if call.kv_dtype not in ("bfloat16", "float32", "int8"):
        return f"the TPU kernel takes pages in bfloat16, float32 or int8, not {call.kv_dtype}"
    tile = LANES if call.kv_dtype == "int8" else TILE_ROWS[jnp.dtype(call.kv_dtype).itemsize]
    if call.page % tile:
        return f"the TPU kernel needs pages of a multiple of {tile} tokens for {call.kv_dtype}, not {call.page}"
    if call.scale_heads % SUBLANES:
        return f"the TPU kernel needs the scales' heads rounded up to {SUBLANES}, not {call.scale_heads}"
    scalars = 4 * (call.rows * call.width + len(FIELDS) * count(call.tokens, call.rows, smallest_tile(call)))
    if scalars > SCALAR_BYTES:
        return f"block tables of {call.rows} x {call.width} pages do not fit the scalar memory: use larger pages"
    return None


def moved_bytes(
    call: Call, config: Config, query_starts: np.ndarray, lengths: np.ndarray, chip: Chip | None = None
) -> int:
    """HBM bytes that a concrete call moves: K, V and scales in DMA units, Q and the results in blocks."""
    return sum(
        _moved(part, own, query_starts[rows.start : rows.stop + 1], lengths[rows])
        for (part, rows), own in zip(parts(call), tiles_of(call, config, chip), strict=True)
    )


def _moved(call: Call, config: Config, query_starts: np.ndarray, lengths: np.ndarray) -> int:
    """HBM bytes that one run of a kernel moves."""
    if isinstance(config, tpu_decode.decode.Config):
        return tpu_decode.moved_bytes(call, config, np.asarray(query_starts), np.asarray(lengths))

    def tokens(unit: int) -> int:
        found = cut(np.asarray(query_starts), np.asarray(lengths), call, block_q=config.block_q, unit=unit)
        return int((found.end - found.first).sum()) * unit

    scales, groups = 2 * 4 * call.scale_heads, call.kv_heads // config.block_heads
    held = tokens(smallest_dma(call)) * (call.kv_bytes - scales) + (
        tokens(config.dma_k) * scales * groups if scales else 0
    )
    queries = round_up(call.tokens, config.block_q)
    size = jnp.dtype(call.dtype).itemsize
    io = (folded_width(call.heads, call.head_dim) + folded_width(call.heads, call.value_dim)) * size
    if call.return_lse:
        io += 4 * groups * round_up(call.heads // groups, LANES)
    return held + queries * io


def cost(call: Call, config: Config, query_starts: np.ndarray, lengths: np.ndarray) -> pl.CostEstimate:
    """The cost of one run of the kernel."""
    queries = query_starts[1:] - query_starts[:-1]
    seen = np.minimum(lengths, call.window or lengths)
    pairs = int((queries * seen).sum()) * call.heads
    return pl.CostEstimate(
        flops=2 * pairs * (call.head_dim + call.value_dim),
        transcendentals=pairs,
        bytes_accessed=_moved(call, config, query_starts, lengths),
    )


def run(arrays, call: Call, config: Config, interpret=False):
    """See `api.paged_attention`."""
    full_starts, full_lengths = full_rows(call)  # the CostEstimate is for full rows
    found = []
    for (part, rows), tiles in zip(parts(call), tiles_of(call, config, detect("tpu")), strict=True):
        edges = slice(rows.start, rows.stop + 1)
        estimate = cost(part, tiles, full_starts[edges], full_lengths[rows])
        own = {"q": arrays["q"][: part.tokens], "query_starts": arrays["query_starts"][edges]}
        own |= {name: arrays[name][rows] for name in ("block_tables", "lengths")}
        compute = tpu_decode.run if decodes(part) else _run
        found.append(compute({**arrays, **own}, part, tiles, interpret, estimate))
    decoded = arrays["query_starts"][call.decode_rows] if len(found) > 1 else None
    out, lse = found[0] if len(found) == 1 else _joined(*found, decoded)
    t, n, hv = call.tokens, call.heads, call.value_dim
    out = out[:t, : n * hv].reshape(t, n, hv)
    return (out, lse) if call.return_lse else out


def _joined(decode, others, end):
    """Join both runs' results, folded, else XLA re-lays them. The first `end` queries are those of decode rows."""

    def join(a, b):
        if a is None:
            return None
        t = min(len(a), len(b))  # `a` is padded to whole blocks
        a = jnp.pad(a[:t], ((0, 0), (0, b.shape[1] - a.shape[1])))  # folded results may end in padding
        return b.at[:t].set(jnp.where(jnp.arange(t)[:, None] < end, a, b[:t]))

    return tuple(join(a, b) for a, b in zip(decode, others, strict=True))


def _run(arrays, call: Call, config: Config, interpret, estimate):
    """Cut the pieces, fold the queries, call the kernel.

    Returns:
      Results [T, N*Hv], both axes padded as the kernel writes them, and the log-sum-exps [T, N] or None.
    """
    t, n, hv = call.tokens, call.heads, call.value_dim
    block, unit, heads = config.block_q, config.dma_k, config.block_heads
    q, k, v, sinks = arrays["q"], arrays["k_pages"], arrays["v_pages"], arrays.get("sinks")
    items = count(t, call.rows, block)
    plan = Plan(call, config, smallest_tile(call), smallest_dma(call), items)
    padded, groups = round_up(t, block), plan.groups

    def fold(x, heads, dim):
        lanes = folded_width(heads, dim)
        return jnp.pad(x.reshape(t, heads * dim), ((0, padded - t), (0, lanes - heads * dim)))

    def block_of(g, i, fields, *_):
        return fields[FIELDS.index("block") * items + i], g

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # with `pl.ANY`, XLA copies small pools of scales to VMEM and back
    folded = fold(q, n, call.head_dim)
    inputs = {"q": (folded, pl.BlockSpec((block, folded.shape[1] // groups), block_of))}
    for name, x in {"k": k, "v": v}.items():  # view a page as DMA units: no copy
        inputs[name] = (x.reshape(call.pages * (call.page // unit), unit, x.shape[2]), hbm)
    if call.scale_heads:
        inputs |= {name: (arrays[name], hbm) for name in ("k_scale", "v_scale")}
    if sinks is not None:
        inputs["sinks"] = (sinks, pl.BlockSpec(memory_space=pltpu.SMEM))
    outputs = {"out": jax.ShapeDtypeStruct((padded, folded_width(n, hv)), q.dtype)}
    out_specs = [pl.BlockSpec((block, outputs["out"].shape[1] // groups), block_of)]
    if call.return_lse:
        lanes = round_up(n // groups, LANES)
        outputs["lse"] = jax.ShapeDtypeStruct((groups, padded, lanes), jnp.float32)
        out_specs.append(pl.BlockSpec((1, block, lanes), lambda g, i, *fields: (g, block_of(g, i, *fields)[0], 0)))
    shape = (block // config.tile_q, heads, config.tile_q * call.group)
    scratch = {
        "k_buffer": pltpu.VMEM((2, config.block_k, k.shape[2] // groups), k.dtype),
        "v_buffer": pltpu.VMEM((2, config.block_k, v.shape[2] // groups), v.dtype),
        "queries": pltpu.VMEM((*shape, widest(heads, call.head_dim)), plan.dtype),
        "top": pltpu.VMEM((*shape, LANES), jnp.float32),
        "total": pltpu.VMEM((*shape, LANES), jnp.float32),
        "acc": pltpu.VMEM((*shape, widest(heads, hv)), jnp.float32),
        "arrived": pltpu.SemaphoreType.DMA((2, 4)),
    }
    if call.scale_heads:
        buffer = pltpu.VMEM((2, call.scale_heads, config.block_k), jnp.float32)
        scratch |= {"k_scales": buffer, "v_scales": buffer}
    names = ["plan", "tables", *inputs, *outputs, *scratch]
    absent = dict.fromkeys(("sinks", "lse", "k_scale", "v_scale"))

    def kernel(*refs):
        body(plan, SimpleNamespace(**absent | dict(zip(names, refs, strict=True))))

    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(groups, items),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outputs.values()),
        # Pieces run in order, since each prefetches for the next. Every DMA lies in its pool: pieces end where block
        # tables do, and their pages are clipped to the pool.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 2, vmem_limit_bytes=config.vmem_bytes, disable_bounds_checks=True
        ),
        cost_estimate=estimate,
        interpret=interpret,
        name="paged_attention",
    )(
        flat_plan(call, config, arrays["query_starts"], arrays["lengths"]),
        known(arrays["block_tables"], call).reshape(-1),
        *(_in_hbm(x) if spec is hbm and not interpret else x for x, spec in inputs.values()),
    )
    if not call.return_lse:
        return found[0], None
    lse = found[1][:, :t, : n // groups].swapaxes(0, 1).reshape(t, n)
    return found[0], lse if sinks is None else jnp.where(lse == -jnp.inf, sinks, lse)


def _in_hbm(x):
    """Keep a pool in HBM: for two runs of the kernel, XLA would copy a small one whole to faster memory."""
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def flat_plan(call: Call, config: Config, query_starts, lengths) -> Int[Array, " F*I"]:
    """The pieces in the form that the kernel reads, field by field (`FIELDS`).

    `start` and `stop` count within the block. `before` is the number of steps before the piece; its parity gives the
    next buffer. `next` is the next piece that reads keys, for which the piece's last step prefetches; after the last
    such piece it is the first, for the next group of heads.
    """
    found = cut(query_starts, lengths, call, block_q=config.block_q, unit=config.dma_k)
    blocks, items = -(-call.tokens // config.block_q), found.row.shape[0]
    block = jnp.minimum(found.start // config.block_q, blocks - 1)
    steps = -(-(found.end - found.first) // (config.block_k // config.dma_k))
    before = jnp.cumsum(steps) - steps
    index = jnp.where(steps > 0, jnp.arange(items), items)
    behind = jnp.concatenate([jax.lax.cummin(index, reverse=True)[1:], jnp.full((1,), items)])
    behind = jnp.where(behind == items, index.min(), behind)
    base = block * config.block_q
    fields = (
        found.row,
        block,
        found.start - base,
        found.stop - base,
        found.position,
        found.first,
        found.end,
        before,
        behind,
    )
    return jnp.concatenate([x.astype(jnp.int32) for x in fields])
