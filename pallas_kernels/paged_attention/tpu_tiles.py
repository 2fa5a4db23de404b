"""Tiles of paged attention on TPU: the Config, its checks and the heuristic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax.numpy as jnp

from pallas_kernels.decode_attention import tpu as decode
from pallas_kernels.hardware import Chip
from pallas_kernels.layouts import LANES, TILE_ROWS, folded_width, round_up
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.tpu_decode import as_dense
from pallas_kernels.paged_attention.tpu_kernel import widest


@dataclass(frozen=True)
class Config:
    """Tiles. In a call with decode rows and others, they apply to the others.

    Attributes:
      block_q: queries in VMEM together, a multiple of `tile_q`; a row's K and V are read once per block.
      tile_q: queries computed together, a multiple of 16 (f32: 8).
      block_heads: KV heads computed together: all, or a divisor of them that fills whole registers of 128 lanes.
      block_k: tokens of K and V fetched together, a multiple of `dma_k`; VMEM holds two such blocks.
      dma_k: tokens per DMA, a divisor of the page; at a row's end and a window's begin DMAs are smaller.
      vmem_bytes: VMEM to ask for.
    """

    block_q: int
    tile_q: int
    block_heads: int
    block_k: int
    dma_k: int
    vmem_bytes: int = 16 << 20


def smallest_tile(call: Call) -> int:
    """Queries of the smallest tile: one register of the queries' type."""
    return TILE_ROWS[jnp.dtype(call.dtype).itemsize]


def decodes(call: Call) -> bool:
    """Whether the kernel for decode rows computes the call: all its rows own a few queries at most."""
    few = call.decode_queries <= decode.MAX_QUERIES and call.kv_heads <= LANES
    return few and call.decode_rows == call.rows


def config_class(call: Call) -> type[Config | decode.Config]:
    """What the tiles of a call are: those of decode attention, if it has decode rows alone."""
    return decode.Config if decodes(call) else Config


def parts(call: Call) -> list[tuple[Call, slice]]:
    """The kernel runs of a call, and the rows of each: first the decode rows, then the others, if there are both."""
    d = call.decode_rows
    alone = replace(call, tokens=min(call.tokens, d * call.decode_queries), rows=d, max_queries=call.decode_queries)
    if d in (0, call.rows) or not decodes(alone):
        return [(call, slice(0, call.rows))]
    return [(alone, slice(0, d)), (replace(call, rows=call.rows - d, decode_rows=0), slice(d, call.rows))]


def tiles_of(call: Call, config: Config | decode.Config, chip: Chip | None) -> list[Config | decode.Config]:
    """A Config for each of the `parts`: `config` for the last, the heuristic's for decode rows before it."""
    return [heuristic(part, chip) for part, _ in parts(call)[:-1]] + [config]


def smallest_dma(call: Call) -> int:
    """Tokens of the smallest DMA: one tile of the pages' type."""
    return TILE_ROWS[jnp.dtype(call.kv_dtype).itemsize]


def heuristic(call: Call, chip: Chip | None) -> Config | decode.Config:
    """Tiles for a chip; None: for any. A call of decode rows alone gets those of decode attention, in whole pages.

    Bytes: a row's memory tiles are read once per block that its queries lie in. So a block holds all T queries if they
    fit, with as many KV heads as then fit. Fewer heads make smaller DMAs, and read the scales of int8 more often, since
    a tile of scales has eight heads.
    FLOPs: above 240 (v5e) to 560 (v6e) FLOPs per byte the MXU is the bound. A tile of K or V in the MXU serves tile_q *
    group rows: 1024 rows hide its loading, and leave little of a chunk to be masked.
    Latency: a step holds about 1 MiB of K and V (0.3 us on 7x, 1.3 us on v5e) to hide the chain of an online softmax
    step. Its logits [tile_q * group, block_k] in f32 take at most 1 MiB. A DMA moves 32 KiB or more.
    VMEM: two steps of K and V; Q and the result twice; and the queries, state and accumulators of a group of heads.
    """
    if decodes(call):
        return _decode_tiles(call, chip)
    sub, most = smallest_tile(call), min(call.max_queries, 256)
    capacity = (chip.vmem_capacity_mib if chip else 16) << 20
    budget = min(capacity * 5 // 6, 48 << 20)
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


def _decode_tiles(call: Call, chip: Chip | None) -> decode.Config:
    """Blocks as over a dense cache, of whole pages where they have room for one."""
    alike = as_dense(call)
    block = min(decode.wanted_block(alike), round_up(call.capacity, LANES))
    whole = math.lcm(call.page, LANES)
    block = block // whole * whole or block
    return decode.Config(block, decode.tile_of(alike, block), decode.splits_on(chip))


def _tiles(call: Call, block: int, tile: int, heads: int, capacity: int) -> Config:
    """The Config for these blocks of queries: chooses the tokens per DMA and per step."""
    size = jnp.dtype(call.kv_dtype).itemsize
    token = folded_width(heads, call.head_dim) * size
    if call.kv_dtype == "int8":
        unit = call.page  # scales are fetched in whole pages
    else:
        units = [u for u in range(smallest_dma(call), call.page + 1, smallest_dma(call)) if call.page % u == 0]
        unit = next((u for u in units if u * token >= 32 << 10), units[-1])
    wanted = max(LANES, min((1 << 20) // (2 * token), 1024))
    scores = (1 if capacity > 16 << 20 else 0.5) * 2**20
    wanted = max(LANES, min(wanted, int(scores) // (4 * tile * call.group) // LANES * LANES))
    block_k = max(unit, LANES, wanted // unit * unit)
    found = Config(block, tile, heads, -(-block_k // unit) * unit, unit)
    return replace(found, vmem_bytes=max(found.vmem_bytes, min(_vmem(call, found) * 5 // 4, capacity)))


def _whole(call: Call, heads: int) -> bool:
    """Whether groups of `heads` KV heads divide the cache's heads and fill whole registers."""
    fits = call.kv_heads % heads == 0 and heads * call.head_dim % LANES == 0 and heads * call.value_dim % LANES == 0
    return heads == call.kv_heads or fits


def misfit(call: Call, config: Config | decode.Config) -> str | None:
    """None, or why a Config does not suit a call."""
    if not isinstance(config, config_class(call)):
        if decodes(call):
            return "a call of decode rows alone takes decode_attention's Config"
        return "a call with other rows takes paged_attention's Config"
    if isinstance(config, decode.Config):
        return None
    if config.block_q % config.tile_q or config.tile_q % smallest_tile(call):
        return f"block_q must be a multiple of tile_q, and tile_q of {smallest_tile(call)}"
    if call.page % config.dma_k or config.block_k % config.dma_k:
        return f"dma_k must divide the page of {call.page} and block_k"
    if call.kv_dtype == "int8" and config.dma_k != call.page:
        return f"dma_k of int8 pages is the page of {call.page}"
    if not _whole(call, config.block_heads):
        return f"block_heads must be all {call.kv_heads}, or divide them and fill whole registers of {LANES} lanes"
    return None


def _vmem(call: Call, config: Config) -> int:
    """Bytes of VMEM that the tiles take, a step's temporaries included."""
    q, kv = jnp.dtype(call.dtype).itemsize, jnp.dtype(call.kv_dtype).itemsize
    heads, block, block_k = config.block_heads, config.block_q, config.block_k
    widths = folded_width(heads, call.head_dim) + folded_width(heads, call.value_dim)
    io = folded_width(heads * call.group, call.head_dim) + folded_width(heads * call.group, call.value_dim)
    held = 2 * block * io * q + 2 * block_k * (widths * kv + 8 * call.scale_heads)
    rows = config.tile_q * call.group
    state = (
        block
        * call.group
        * heads
        * (widest(heads, call.head_dim) * max(q, kv) + widest(heads, call.value_dim) * 4 + 2 * LANES * 4)
    )
    return held + state + 3 * rows * block_k * 4 + config.tile_q * io * 4
