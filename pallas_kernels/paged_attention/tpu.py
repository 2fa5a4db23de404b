"""Paged attention as a Pallas kernel for TPU: v4, v5e, v5p, v6e and 7x.

The pools stay in HBM as they lie; the kernel fetches what the rows hold, through their block tables, with its own
double-buffered DMAs. The packed queries are cut into pieces (`plan.pieces`), which one sequential grid walks, for one
group of KV heads after the other. What a row holds is read once for every block that its queries lie in: with few
heads at a time, a block holds all packed queries of a step.

Decode rows want it the other way round, few queries and all heads, hence whole pages a DMA: a call that has both runs
the kernel twice, first over its decode rows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.gradients import raising_under_grad
from pallas_kernels.hardware import Chip, detect
from pallas_kernels.layouts import LANES, SCALAR_BYTES, SUBLANES, folded_width, round_up
from pallas_kernels.paged_attention import plan as plans
from pallas_kernels.paged_attention.call import Call, known
from pallas_kernels.paged_attention.tpu_kernel import FIELDS, Static, body, widest
from pallas_kernels.tiles import resolve

TILE = {4: 8, 2: 16, 1: 32}  # rows of a tile by the bytes of an element


@dataclass(frozen=True)
class Config:
    """Tiles; in a call of decode rows and others, those of the others.

    Attributes:
      block: queries that lie in VMEM together, a multiple of `tile`; a row's K and V are read once for each.
      tile: queries that are computed together, a multiple of 16 (f32: 8).
      heads: KV heads at once: all, or a divisor of them that fills whole registers of 128 lanes.
      key_block: tokens of K and V fetched together, a multiple of `unit`; two such blocks lie in VMEM.
      unit: tokens a DMA, a divisor of the page; at a row's end and a window's begin, DMAs of single tiles.
      vmem: bytes of VMEM to ask for.
    """

    block: int
    tile: int
    heads: int
    key_block: int
    unit: int
    vmem: int = 16 << 20


def supported(call: Call) -> str | None:
    """None, or the reason why the TPU kernel cannot do the call."""
    if call.layout != "folded":
        return f"the TPU kernel reads the layout 'folded', not {call.layout!r}"
    if call.dtype not in ("bfloat16", "float32"):
        return f"the TPU kernel takes queries in bfloat16 or float32, not {call.dtype}"
    if call.kv_dtype not in ("bfloat16", "float32", "int8"):
        return f"the TPU kernel takes pages in bfloat16, float32 or int8, not {call.kv_dtype}"
    tile = LANES if call.kv_dtype == "int8" else TILE[jnp.dtype(call.kv_dtype).itemsize]
    if call.page % tile:
        return f"the TPU kernel needs pages of a multiple of {tile} tokens for {call.kv_dtype}, not {call.page}"
    if call.scale_heads % SUBLANES:
        return f"the TPU kernel needs the scales' heads rounded up to {SUBLANES}, not {call.scale_heads}"
    scalars = 4 * (call.rows * call.width + len(FIELDS) * plans.count(call.tokens, call.rows, _sub(call)))
    if scalars > SCALAR_BYTES:
        return f"block tables of {call.rows} x {call.width} pages do not fit the scalar memory: use larger pages"
    return None


def _sub(call: Call) -> int:
    """Queries of the smallest tile: whole registers of the queries' type."""
    return TILE[jnp.dtype(call.dtype).itemsize]


def parts(call: Call) -> list[tuple[Call, slice]]:
    """The runs of the kernel that a call takes, and their rows: decode rows first, if there are others too."""
    d = call.decode_rows
    if d in (0, call.rows):
        return [(call, slice(0, call.rows))]
    alone = replace(call, tokens=min(call.tokens, d), rows=d, max_queries=1)
    return [(alone, slice(0, d)), (replace(call, rows=call.rows - d, decode_rows=0), slice(d, call.rows))]


def tiles_of(call: Call, config: Config, chip: Chip | None) -> list[Config]:
    """A Config for each of the `parts`: the call's own for the last, the heuristic's for decode rows before it."""
    return [heuristic(part, chip) for part, _ in parts(call)[:-1]] + [config]


def _grain(call: Call) -> int:
    """Tokens of the smallest DMA: one tile of the pages' type."""
    return TILE[jnp.dtype(call.kv_dtype).itemsize]


def heuristic(call: Call, chip: Chip | None) -> Config:
    """Tiles for a chip; None: for any.

    Bytes: a row costs the tiles of memory that it holds, once for each block that its queries lie in. So a block holds
    all T queries if they fit, of as many KV heads at once as fit then: fewer heads make smaller DMAs, and read the
    scales of int8, which lie eight heads to a tile, more often. Decode rows take all heads.
    FLOPs: from some 240 (v5e) to 560 (v6e) FLOPs a byte on the MXU is the bound; a tile of queries uses a weight of
    the matrix unit for tile * group rows: 1024 hide its loading, and leave few of a chunk's rows to be masked.
    A step should hold about 1 MiB of K and V (0.3 us on 7x, 1.3 us on v5e), enough to hide the chain of an online
    softmax step; its scores [tile * group, key_block] in f32 are kept to 1 MiB. A DMA should move 32 KiB or more.
    VMEM: two steps of K and V; Q and the result twice; and the queries, state and accumulators of a group of heads.
    """
    sub, most = _sub(call), min(call.max_queries, 256)
    capacity = (chip.vmem_capacity_mib if chip else 16) << 20
    budget = min(capacity * 4 // 5, 48 << 20)
    if call.max_queries == 1:
        return _tiles(call, sub, sub, call.kv_heads, capacity)
    largest = sub
    while largest * 2 <= most and largest * call.group < 1024:
        largest *= 2
    choices = [n for n in range(call.kv_heads, 0, -1) if _whole(call, n)]
    blocks = 1
    while True:
        for tile in (largest, max(sub, largest // 2)):
            for heads in choices if blocks == 1 else choices[-1:]:
                block = round_up(-(-call.tokens // blocks), tile)
                found = _tiles(call, block, tile, heads, capacity)
                if _vmem(call, found) <= budget or block == sub:
                    return found
        if block == tile:
            largest = tile
        blocks += 1


def _tiles(call: Call, block: int, tile: int, heads: int, capacity: int) -> Config:
    """The Config of such blocks of queries: how many tokens to fetch, a DMA and a step."""
    size = jnp.dtype(call.kv_dtype).itemsize
    token = folded_width(heads, call.head_dim) * size
    if call.kv_dtype == "int8":
        unit = call.page  # scales come by the page
    else:
        units = [u for u in range(_grain(call), call.page + 1, _grain(call)) if call.page % u == 0]
        unit = next((u for u in units if u * token >= 32 << 10), units[-1])
    wanted = max(LANES, min((1 << 20) // (2 * token), 1024))
    scores = (1 if capacity > 16 << 20 else 0.5) * 2**20
    wanted = max(LANES, min(wanted, int(scores) // (4 * tile * call.group) // LANES * LANES))
    key_block = max(unit, LANES, wanted // unit * unit)
    found = Config(block, tile, heads, -(-key_block // unit) * unit, unit)
    return replace(found, vmem=max(found.vmem, min(_vmem(call, found) * 5 // 4, capacity)))


def _whole(call: Call, heads: int) -> bool:
    """Whether the heads of a cache come in groups of so many, in registers of their own."""
    fits = call.kv_heads % heads == 0 and heads * call.head_dim % LANES == 0 and heads * call.value_dim % LANES == 0
    return heads == call.kv_heads or fits


def misfit(call: Call, config: Config) -> str | None:
    """Why a Config does not suit a call, None if it does."""
    if config.block % config.tile or config.tile % _sub(call):
        return f"block must be a multiple of tile, and tile of {_sub(call)}"
    if call.page % config.unit or config.key_block % config.unit:
        return f"unit must divide the page of {call.page} and key_block"
    if call.kv_dtype == "int8" and config.unit != call.page:
        return f"the unit of int8 pages is the page of {call.page}"
    if not _whole(call, config.heads):
        return f"heads must be all {call.kv_heads}, or divide them and fill whole registers of {LANES} lanes"
    return None


def _vmem(call: Call, config: Config) -> int:
    """Bytes of VMEM that the tiles take, temporaries of a step included."""
    q, kv = jnp.dtype(call.dtype).itemsize, jnp.dtype(call.kv_dtype).itemsize
    heads, block, key_block = config.heads, config.block, config.key_block
    widths = folded_width(heads, call.head_dim) + folded_width(heads, call.value_dim)
    io = folded_width(heads * call.group, call.head_dim) + folded_width(heads * call.group, call.value_dim)
    held = 2 * block * io * q + 2 * key_block * (widths * kv + 8 * call.scale_heads)
    rows = config.tile * call.group
    state = (
        block
        * call.group
        * heads
        * (widest(heads, call.head_dim) * max(q, kv) + widest(heads, call.value_dim) * 4 + LANES * 4)
    )
    return held + state + 4 * rows * key_block * 4 + config.tile * io * 4


def moved_bytes(
    call: Call, config: Config, query_starts: np.ndarray, lengths: np.ndarray, chip: Chip | None = None
) -> int:
    """HBM bytes that a concrete call moves: units of K, V and scales, blocks of Q and of the results."""
    return sum(
        _moved(part, own, query_starts[rows.start : rows.stop + 1], lengths[rows])
        for (part, rows), own in zip(parts(call), tiles_of(call, config, chip), strict=True)
    )


def _moved(call: Call, config: Config, query_starts: np.ndarray, lengths: np.ndarray) -> int:
    """What one run of the kernel moves."""

    def tokens(unit: int) -> int:
        found = plans.pieces(
            np.asarray(query_starts),
            np.asarray(lengths),
            tokens=call.tokens,
            block=config.block,
            window=call.window,
            unit=unit,
            capacity=call.capacity,
        )
        return int((found.end - found.first).sum()) * unit

    scales, groups = 2 * 4 * call.scale_heads, call.kv_heads // config.heads
    held = tokens(_grain(call)) * (call.kv_bytes - scales) + (tokens(config.unit) * scales * groups if scales else 0)
    queries = round_up(call.tokens, config.block)
    size = jnp.dtype(call.dtype).itemsize
    io = (folded_width(call.heads, call.head_dim) + folded_width(call.heads, call.value_dim)) * size
    if call.return_lse:
        io += 4 * groups * round_up(call.heads // groups, LANES)
    return held + queries * io


def cost(call: Call, config: Config, query_starts: np.ndarray, lengths: np.ndarray) -> pl.CostEstimate:
    """Of one run of the kernel."""
    queries = query_starts[1:] - query_starts[:-1]
    seen = np.minimum(lengths, call.window or lengths)
    pairs = int((queries * seen).sum()) * call.heads
    return pl.CostEstimate(
        flops=2 * pairs * (call.head_dim + call.value_dim),
        transcendentals=pairs,
        bytes_accessed=_moved(call, config, query_starts, lengths),
    )


def attention(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P p C"],
    v_pages: Num[Array, "P p Cv"],
    *,
    call: Call,
    block_tables: Int[Array, "R M"],
    lengths: Int[Array, " R"],
    query_starts: Int[Array, " R1"],
    scale: float,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "P Kp p"] | None = None,
    v_scale: Float[Array, "P Kp p"] | None = None,
    config: Config | None = None,
    interpret=False,
):
    """See `api.paged_attention`.

    Raises:
      ValueError: a config that does not fit the call.
      NotImplementedError: a derivative.
    """
    config, _ = resolve("paged_attention", "tpu", call, config, sys.modules[__name__])
    configs = tiles_of(call, config, detect("tpu"))
    full_starts, full_lengths = plans.full_rows(call)  # what the estimates of cost speak of

    def run(q, k, v, tables, lengths, starts, *rest):
        found = []
        for (part, rows), tiles in zip(parts(call), configs, strict=True):
            edges = slice(rows.start, rows.stop + 1)
            estimate = cost(part, tiles, full_starts[edges], full_lengths[rows])
            found.append(
                _run(
                    part,
                    tiles,
                    float(scale),
                    interpret,
                    estimate,
                    q[: part.tokens],
                    k,
                    v,
                    tables[rows],
                    lengths[rows],
                    starts[edges],
                    *rest,
                )
            )
        return found[0] if len(found) == 1 else _joined(*found, starts[call.decode_rows])

    t, n, hv = call.tokens, call.heads, call.value_dim
    out, lse = raising_under_grad(run, "paged_attention")(
        q, k_pages, v_pages, block_tables, lengths, query_starts, sinks, k_scale, v_scale
    )
    out = out[:t, : n * hv].reshape(t, n, hv)
    return (out, lse) if call.return_lse else out


def _joined(decode, others, end):
    """The results of both parts, still folded, else XLA re-lays them: the decode rows' queries are the first `end`."""

    def join(a, b):
        if a is None:
            return None
        t = min(len(a), len(b))  # `a` is as long as its blocks
        return b.at[:t].set(jnp.where(jnp.arange(t)[:, None] < end, a[:t], b[:t]))

    return tuple(join(a, b) for a, b in zip(decode, others, strict=True))


def _run(
    call: Call,
    config: Config,
    scale,
    interpret,
    estimate,
    q,
    k,
    v,
    tables,
    lengths,
    query_starts,
    sinks,
    k_scale,
    v_scale,
):
    """Plan the pieces, fold the queries, call the kernel: all of it small beside K and V.

    Returns:
      Results [T or more, N*Hv or more], rounded up as the kernel writes them, and [T, N] log-sum-exps or None.
    """
    t, n, hv, block, unit, heads = call.tokens, call.heads, call.value_dim, config.block, config.unit, config.heads
    items = plans.count(t, call.rows, block)
    static = Static(call, block, config.tile, _sub(call), heads, config.key_block, unit, _grain(call), items, scale)
    padded, groups = round_up(t, block), static.groups

    def fold(x, heads, dim):
        lanes = folded_width(heads, dim)
        return jnp.pad(x.reshape(t, heads * dim), ((0, padded - t), (0, lanes - heads * dim)))

    def block_of(g, i, plan, *_):
        return plan[FIELDS.index("block") * items + i], g

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # `pl.ANY` lets XLA move small pools of scales to VMEM and back
    folded = fold(q, n, call.head_dim)
    inputs = {"q": (folded, pl.BlockSpec((block, folded.shape[1] // groups), block_of))}
    for name, x in {"k": k, "v": v}.items():  # a page as its units: the same bytes
        inputs[name] = (x.reshape(call.pages * (call.page // unit), unit, x.shape[2]), hbm)
    if call.scale_heads:
        inputs |= {"k_scale": (k_scale, hbm), "v_scale": (v_scale, hbm)}
    if sinks is not None:
        inputs["sinks"] = (sinks.astype(jnp.float32), pl.BlockSpec(memory_space=pltpu.SMEM))
    outputs = {"out": jax.ShapeDtypeStruct((padded, folded_width(n, hv)), q.dtype)}
    out_specs = [pl.BlockSpec((block, outputs["out"].shape[1] // groups), block_of)]
    if call.return_lse:
        lanes = round_up(n // groups, LANES)
        outputs["lse"] = jax.ShapeDtypeStruct((groups, padded, lanes), jnp.float32)
        out_specs.append(pl.BlockSpec((1, block, lanes), lambda g, i, *plan: (g, block_of(g, i, *plan)[0], 0)))
    shape = (block // config.tile, heads, config.tile * call.group)
    scratch = {
        "k_buffer": pltpu.VMEM((2, config.key_block, k.shape[2] // groups), k.dtype),
        "v_buffer": pltpu.VMEM((2, config.key_block, v.shape[2] // groups), v.dtype),
        "queries": pltpu.VMEM((*shape, widest(heads, call.head_dim)), static.dtype),
        "state": pltpu.VMEM((*shape, LANES), jnp.float32),
        "acc": pltpu.VMEM((*shape, widest(heads, hv)), jnp.float32),
        "arrived": pltpu.SemaphoreType.DMA((2, 4)),
    }
    if call.scale_heads:
        buffer = pltpu.VMEM((2, call.scale_heads, config.key_block), jnp.float32)
        scratch |= {"k_scales": buffer, "v_scales": buffer}
    names = ["plan", "tables", *inputs, *outputs, *scratch]
    absent = dict.fromkeys(("sinks", "lse", "k_scale", "v_scale"))

    def kernel(*refs):
        body(static, SimpleNamespace(**absent | dict(zip(names, refs, strict=True))))

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
        # Pieces follow each other, since each fetches for the next.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 2, vmem_limit_bytes=config.vmem),
        cost_estimate=estimate,
        interpret=interpret,
        name="paged_attention",
    )(
        flat_plan(call, config, query_starts, lengths),
        known(tables, call).reshape(-1),
        *(_in_hbm(x) if spec is hbm and not interpret else x for x, spec in inputs.values()),
    )
    if not call.return_lse:
        return found[0], None
    lse = found[1][:, :t, : n // groups].swapaxes(0, 1).reshape(t, n)
    return found[0], lse if sinks is None else jnp.where(lse == -jnp.inf, sinks.astype(jnp.float32), lse)


def _in_hbm(x):
    """Keep XLA from moving a small pool of scales to faster memory, whole, for two runs of the kernel."""
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def flat_plan(call: Call, config: Config, query_starts, lengths) -> Int[Array, " F*I"]:
    """The pieces as the kernel reads them, field by field (`FIELDS`).

    `start` and `stop` count within the block; `before` is the number of steps before a piece, whose parity says
    which buffer is next; `next` is the next piece that reads keys, which the last step fetches for, behind the last
    one the first, for the next group of heads.
    """
    found = plans.pieces(
        query_starts,
        lengths,
        tokens=call.tokens,
        block=config.block,
        window=call.window,
        unit=config.unit,
        capacity=call.capacity,
    )
    blocks, items = -(-call.tokens // config.block), found.row.shape[0]
    block = jnp.minimum(found.start // config.block, blocks - 1)
    steps = -(-(found.end - found.first) // (config.key_block // config.unit))
    before = jnp.cumsum(steps) - steps
    index = jnp.where(steps > 0, jnp.arange(items), items)
    behind = jnp.concatenate([jax.lax.cummin(index, reverse=True)[1:], jnp.full((1,), items)])
    behind = jnp.where(behind == items, index.min(), behind)
    base = block * config.block
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
