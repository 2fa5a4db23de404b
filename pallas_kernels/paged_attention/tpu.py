"""Paged attention as a Pallas kernel for TPU: v4, v5e, v5p, v6e and 7x.

The pools stay in HBM as they lie; the kernel fetches what the rows hold, through their block tables, with its own
double-buffered DMAs. The packed queries are cut into pieces (`plan.pieces`), which one sequential grid walks: a decode
row is read once, a chunk once for every block of its queries.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.gradients import raising_under_grad
from pallas_kernels.hardware import Chip
from pallas_kernels.layouts import LANES, SUBLANES, folded_width, round_up
from pallas_kernels.paged_attention import plan as plans
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.tpu_kernel import FIELDS, Static, body, widest
from pallas_kernels.tiles import resolve

TILE = {4: 8, 2: 16, 1: 32}  # rows of a tile by the bytes of an element
SMEM_BYTES = 1 << 20


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      block: queries of a block, a multiple of 16 (f32: 8); a chunk's K and V are read once for each.
      key_block: tokens of K and V fetched together, a multiple of `unit`; two such blocks lie in VMEM.
      unit: tokens a DMA, a divisor of the page; at a row's end and a window's begin, DMAs of single tiles.
      vmem: bytes of VMEM to ask for.
    """

    block: int
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
    if scalars > SMEM_BYTES * 3 // 4:
        return f"block tables of {call.rows} x {call.width} pages do not fit the scalar memory: use larger pages"
    return None


def _sub(call: Call) -> int:
    """Queries of the smallest tile: whole registers of the queries' type."""
    return TILE[jnp.dtype(call.dtype).itemsize]


def _grain(call: Call) -> int:
    """Tokens of the smallest DMA: one tile of the pages' type."""
    return TILE[jnp.dtype(call.kv_dtype).itemsize]


def heuristic(call: Call, chip: Chip | None) -> Config:
    """Tiles for a chip; None: for any.

    Bytes: decode rows cost the units of tokens they hold, whatever the tiles are; a chunk costs its context once a
    block of queries, so the block is as large as VMEM allows, up to 256 queries. From some 240 (v5e) to 560 (v6e)
    FLOPs a byte on the MXU is the bound: block * group queries use a byte of bf16 for 2 * block * group FLOPs over 2.
    A step should hold about 1 MiB of K and V (0.3 us on 7x, 1.3 us on v5e), enough to hide the chain of an online
    softmax step; its scores [block * group, key_block] in f32 are kept to 1 MiB. A DMA should move 32 KiB or more.
    VMEM: two steps of K and V; Q and the result twice; and a head's queries, state and accumulator in whole registers.
    """
    capacity = (chip.vmem_capacity_mib if chip else 16) << 20
    size = jnp.dtype(call.kv_dtype).itemsize
    token = folded_width(call.kv_heads, call.head_dim) * size
    if call.kv_dtype == "int8":
        unit = call.page  # scales come by the page
    else:
        units = [u for u in range(_grain(call), call.page + 1, _grain(call)) if call.page % u == 0]
        unit = next((u for u in units if u * token >= 32 << 10), units[-1])
    wanted = max(LANES, min((1 << 20) // (2 * token), 1024))
    sub = _sub(call)
    block = sub
    most = min(call.max_queries, 256)
    while block < most and _vmem(call, block * 2, wanted) <= min(capacity * 3 // 4, 40 << 20):
        block *= 2
    rows = block * call.group
    wanted = max(LANES, min(wanted, (1 << 20) // (4 * rows) // LANES * LANES))
    key_block = max(unit, LANES, wanted // unit * unit)
    key_block = -(-key_block // unit) * unit
    vmem = max(16 << 20, min(_vmem(call, block, key_block) * 5 // 4, capacity))
    return Config(block, key_block, unit, vmem)


def misfit(call: Call, config: Config) -> str | None:
    """Why a Config does not suit a call, None if it does."""
    if config.block % _sub(call) or call.page % config.unit or config.key_block % config.unit:
        return f"block must be a multiple of {_sub(call)}, and unit divide the page of {call.page} and key_block"
    if call.kv_dtype == "int8" and config.unit != call.page:
        return f"the unit of int8 pages is the page of {call.page}"
    return None


def _vmem(call: Call, block: int, key_block: int) -> int:
    """Bytes of VMEM that the tiles take, temporaries of a step included."""
    q, kv = jnp.dtype(call.dtype).itemsize, jnp.dtype(call.kv_dtype).itemsize
    widths = folded_width(call.kv_heads, call.head_dim) + folded_width(call.kv_heads, call.value_dim)
    io = folded_width(call.heads, call.head_dim) + folded_width(call.heads, call.value_dim)
    held = 2 * block * io * q + 2 * key_block * (widths * kv + 8 * call.scale_heads)
    rows = block * call.group
    state = rows * call.kv_heads * (widest(call.kv_heads, call.head_dim) * 4
                                    + widest(call.kv_heads, call.value_dim) * 4 + LANES * 4)  # fmt: skip
    return held + state + 4 * rows * key_block * 4 + block * io * 4


def moved_bytes(call: Call, config: Config, query_starts: np.ndarray, lengths: np.ndarray) -> int:
    """HBM bytes that a concrete call moves: units of K, V and scales, blocks of Q and of the results."""
    def tokens(unit: int) -> int:
        found = plans.pieces(np.asarray(query_starts), np.asarray(lengths), tokens=call.tokens, block=config.block,
                             window=call.window, unit=unit)  # fmt: skip
        return int((found.end - found.first).sum()) * unit

    scales = 2 * 4 * call.scale_heads
    held = tokens(_grain(call)) * (call.kv_bytes - scales) + (tokens(config.unit) * scales if scales else 0)
    queries = round_up(call.tokens, config.block)
    size = jnp.dtype(call.dtype).itemsize
    io = (folded_width(call.heads, call.head_dim) + folded_width(call.heads, call.value_dim)) * size
    if call.return_lse:
        io += 4 * round_up(call.heads, LANES)
    return held + queries * io


def cost(call: Call, config: Config) -> pl.CostEstimate:
    """Of full rows that share the queries evenly."""
    starts, lengths = plans.full_rows(call)
    queries = starts[1:] - starts[:-1]
    seen = np.minimum(lengths, call.window or lengths)
    pairs = int((queries * seen).sum()) * call.heads
    return pl.CostEstimate(flops=2 * pairs * (call.head_dim + call.value_dim), transcendentals=pairs,
                           bytes_accessed=moved_bytes(call, config, starts, lengths))  # fmt: skip


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

    def run(*arrays):
        return _run(call, config, float(scale), interpret, *arrays)

    out, lse = raising_under_grad(run, "paged_attention")(
        q, k_pages, v_pages, block_tables, lengths, query_starts, sinks, k_scale, v_scale
    )
    return (out, lse) if call.return_lse else out


def _run(call: Call, config: Config, scale, interpret, q, k, v, tables, lengths, query_starts, sinks, k_scale, v_scale):
    """Plan the pieces, fold the queries, call the kernel, unfold: all of it small beside K and V."""
    t, n, hv, block, unit = call.tokens, call.heads, call.value_dim, config.block, config.unit
    items = plans.count(t, call.rows, block)
    static = Static(call, block, _sub(call), config.key_block, unit, _grain(call), items, scale)
    padded = round_up(t, block)

    def fold(x, heads, dim):
        lanes = folded_width(heads, dim)
        return jnp.pad(x.reshape(t, heads * dim), ((0, padded - t), (0, lanes - heads * dim)))

    def block_of(i, plan, *_):
        return plan[FIELDS.index("block") * items + i], 0

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # `pl.ANY` lets XLA move small pools of scales to VMEM and back
    folded = fold(q, n, call.head_dim)
    inputs = {"q": (folded, pl.BlockSpec((block, folded.shape[1]), block_of))}
    for name, x in {"k": k, "v": v}.items():  # a page as its units: the same bytes
        inputs[name] = (x.reshape(call.pages * (call.page // unit), unit, x.shape[2]), hbm)
    if call.scale_heads:
        inputs |= {"k_scale": (k_scale, hbm), "v_scale": (v_scale, hbm)}
    if sinks is not None:
        inputs["sinks"] = (sinks.astype(jnp.float32), pl.BlockSpec(memory_space=pltpu.SMEM))
    outputs = {"out": jax.ShapeDtypeStruct((padded, folded_width(n, hv)), q.dtype)}
    if call.return_lse:
        outputs["lse"] = jax.ShapeDtypeStruct((padded, round_up(n, LANES)), jnp.float32)
    rows = block * call.group
    scratch = {
        "k_buffer": pltpu.VMEM((2, config.key_block, k.shape[2]), k.dtype),
        "v_buffer": pltpu.VMEM((2, config.key_block, v.shape[2]), v.dtype),
        "queries": pltpu.VMEM((call.kv_heads, rows, widest(call.kv_heads, call.head_dim)), static.dtype),
        "state": pltpu.VMEM((call.kv_heads, rows, LANES), jnp.float32),
        "acc": pltpu.VMEM((call.kv_heads, rows, widest(call.kv_heads, hv)), jnp.float32),
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
            num_scalar_prefetch=2, grid=(items,), in_specs=[spec for _, spec in inputs.values()],
            out_specs=[pl.BlockSpec((block, x.shape[1]), block_of) for x in outputs.values()],
            scratch_shapes=list(scratch.values())),
        out_shape=list(outputs.values()),
        # Pieces follow each other, since each fetches for the next.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=config.vmem),
        cost_estimate=cost(call, config), interpret=interpret, name="paged_attention",
    )(flat_plan(call, config, query_starts, lengths), tables.astype(jnp.int32).reshape(-1),
      *(x for x, _ in inputs.values()))  # fmt: skip
    out = found[0][:t, : n * hv].reshape(t, n, hv)
    if not call.return_lse:
        return out, None
    lse = found[1][:t, :n]
    return out, lse if sinks is None else jnp.where(lse == -jnp.inf, sinks.astype(jnp.float32), lse)


def flat_plan(call: Call, config: Config, query_starts, lengths) -> Int[Array, " F*I"]:
    """The pieces as the kernel reads them, field by field (`FIELDS`).

    `start` and `stop` count within the block; `before` is the number of steps before a piece, whose parity says
    which buffer is next; `next` is the next piece that reads keys, which the last step fetches for.
    """
    found = plans.pieces(query_starts, lengths, tokens=call.tokens, block=config.block, window=call.window,
                         unit=config.unit)  # fmt: skip
    blocks, items = -(-call.tokens // config.block), found.row.shape[0]
    block = jnp.minimum(found.start // config.block, blocks - 1)
    steps = -(-(found.end - found.first) // (config.key_block // config.unit))
    before = jnp.cumsum(steps) - steps
    index = jnp.where(steps > 0, jnp.arange(items), items)
    behind = jnp.concatenate([jax.lax.cummin(index, reverse=True)[1:], jnp.full((1,), items)])
    base = block * config.block
    fields = (found.row, block, found.start - base, found.stop - base, found.position, found.first, found.end,
              before, behind)  # fmt: skip
    return jnp.concatenate([x.astype(jnp.int32) for x in fields])
