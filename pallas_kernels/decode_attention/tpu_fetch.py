"""What the decode kernel fetches on TPU, and from where: the slots of a dense cache, or pages.

A row's span of tokens is read in blocks of `block_k`, only the tiles that its queries see. DMA sizes are static, so a
part of a block, or of a page, is fetched as DMAs of 2^i tiles, by the binary digits of their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.call import Call
from pallas_kernels.layouts import LANES, SUBLANES, round_up
from pallas_kernels.masking import precision_of

WIDEST = 1024  # lanes of a pack


@dataclass(frozen=True)
class Pages:
    """Where K and V lie in pages: `size` tokens each, `width` of them in a row of the block table."""

    size: int
    width: int

    @property
    def capacity(self) -> int:
        """Tokens that a row's block table can address."""
        return self.size * self.width


@dataclass(frozen=True)
class Plan:
    """The static inputs of the kernel: the call, its tiles, and what follows from both."""

    call: Call
    config: Any  # tiles: `tpu.Config`
    tile: int  # slots of one tile of K and V in HBM: the smallest DMA
    dtype: jnp.dtype  # operand type of the dots
    pages: Pages | None = None  # None: K and V are a dense cache

    @property
    def by_row(self) -> bool:
        """Whether the cores share the rows, not each row's context: with a window all rows cost about the same, and a
        part of a window is little beside its results."""
        return self.call.window is not None and self.call.batch % self.config.splits == 0

    @property
    def parts(self) -> int:
        """Parts of a row's context, each computed by one core."""
        return 1 if self.by_row else self.config.splits

    @property
    def steps(self) -> int:
        """Rows that a core computes, one after the other."""
        return self.call.batch // self.config.splits if self.by_row else self.call.batch

    @property
    def rows(self) -> int:
        """T * G queries of one KV head; query t of head g is row t * G + g."""
        return self.call.queries * self.call.group

    @property
    def by_slot(self) -> bool:
        """Whether blocks are of slots, not of positions: here a block of positions could wrap inside itself."""
        return self.pages is None and self.call.slots % self.config.block_k != 0

    @property
    def pack(self) -> int:
        """KV heads in a pack: they fill whole lanes, and a tile of 16 rows of bf16 where that takes no more than
        `WIDEST` lanes. The matrix unit loads the same tiles of K and V, whatever the pack."""
        call = self.call
        whole = math.lcm(*(LANES // math.gcd(d, LANES) for d in (call.head_dim, call.value_dim)))
        size, found = max(call.head_dim, call.value_dim), whole
        while found < call.kv_heads and found * self.rows < 2 * SUBLANES and (found + whole) * size <= WIDEST:
            found += whole
        return min(found, call.kv_heads)

    @property
    def lines(self) -> int:
        """Rows of a pack: the queries of its heads, one head after the other."""
        return self.pack * self.rows

    @property
    def packs(self) -> list[range]:
        return [range(h, min(h + self.pack, self.call.kv_heads)) for h in range(0, self.call.kv_heads, self.pack)]

    @property
    def unit(self) -> int:
        """Tokens of the largest DMA from a page: a page, or the part of it that divides a block too."""
        return math.gcd(self.pages.size, self.config.block_k) if self.pages else 0

    @property
    def precision(self):
        return precision_of(self.dtype)


@dataclass(frozen=True)
class Refs:
    """The kernel's operands and scratch by name; None: the call has no such ref."""

    starts: object
    lengths: object
    bits: object
    tables: object
    rows: object
    q: object
    k: object
    v: object
    k_scale: object
    v_scale: object
    sinks: object
    out: object
    lse: object
    k_buffer: object
    v_buffer: object
    k_scales: object
    v_scales: object
    queries: object
    top: object
    total: object
    acc: object
    slot: object
    arrived: object


def span(plan: Plan, refs: Refs, row, core):
    """The places [low, high) of a row that this core reads: positions, or slots (`Plan.by_slot`).

    They depend on this row alone.
    """
    call = plan.call
    start = refs.starts[row]
    if not call.lengths:
        low, high = jnp.int32(0) if call.window else 0, call.slots
    else:
        length = refs.lengths[row]
        high = length
        if call.causal:
            high = jnp.where(start < length, jnp.minimum(length, start + call.queries), 0)
        low = jnp.int32(0) if plan.pages else jnp.maximum(length - call.slots, 0)
        if plan.pages:
            high = jnp.minimum(high, plan.pages.capacity)
        if plan.by_slot:
            low, high = 0, jnp.where((high > 0) & (length > call.slots), call.slots, high)
    if call.window:
        low = jnp.maximum(low, start - call.window + 1)
    if plan.parts > 1:

        def cut(s):
            part = (high - low) * s // plan.parts
            return jnp.minimum(high, round_up(low + part, LANES))

        low, high = jnp.where(core == 0, low, cut(core)), cut(core + 1)
    return low, high


def blocks_of(plan: Plan, low, high):
    """Number of blocks that a span touches."""
    touched = pl.cdiv(high, plan.config.block_k) - low // plan.config.block_k
    return touched if isinstance(touched, int) else jnp.where(high > low, touched, 0)


def transfer(plan: Plan, refs: Refs, row, core, index, slot, *, start: bool) -> None:
    """Start the DMAs of the `index`-th block of a row's span into buffer `slot`, or wait for them."""
    low, high = span(plan, refs, row, core)
    base = (low // plan.config.block_k + index) * plan.config.block_k
    begin, end = jnp.maximum(low - base, 0), jnp.minimum(high - base, plan.config.block_k)

    def move(source, target, stream: int) -> None:
        copy = pltpu.make_async_copy(source, target, refs.arrived.at[slot, stream])
        copy.start() if start else copy.wait()

    if plan.pages is None:
        _slots(plan, refs, row, base % plan.call.slots, begin, end, slot, move)
    elif start:
        _pages(plan, refs, row, base, begin, end, slot, move)
    else:
        whole = (begin == 0) & (end == plan.config.block_k)

        @pl.when(whole)
        def _():  # a wait counts bytes: one for all pages of the block
            for stream, buffer in enumerate((refs.k_buffer, refs.v_buffer, refs.k_scales, refs.v_scales)):
                if buffer is not None:
                    move(buffer.at[slot], buffer.at[slot], stream)

        @pl.when(~whole)
        def _():
            _pages(plan, refs, row, base, begin, end, slot, move)


def _digits(count, largest: int, move) -> None:
    """Call `move(first, size)` for DMAs of 2^i tiles that together are `count` tiles, at most `largest`."""
    for level in reversed(range(largest.bit_length())):

        @pl.when((count >> level) & 1 == 1)
        def _(level=level):
            move((count >> (level + 1)) << (level + 1), 1 << level)


def _slots(plan: Plan, refs: Refs, row, place, begin, end, slot, move) -> None:
    """The slots [begin, end) of a block, which begins at `place` of the row's cache."""

    def streams(unit: int, pairs) -> None:
        first = begin // unit

        def some(at, size):
            offset = (first + at) * unit
            source = pl.ds(pl.multiple_of(place + offset, unit), size * unit)
            target = pl.ds(pl.multiple_of(offset, unit), size * unit)
            for ref, buffer, stream in pairs:
                lanes = (slice(None),) if stream > 1 else ()
                move(ref.at[(row, *lanes, source)], buffer.at[(slot, *lanes, target)], stream)

        _digits(pl.cdiv(end, unit) - first, plan.config.block_k // unit, some)

    streams(plan.tile, [(refs.k, refs.k_buffer, 0), (refs.v, refs.v_buffer, 1)])
    if plan.call.int8:
        streams(LANES, [(refs.k_scale, refs.k_scales, 2), (refs.v_scale, refs.v_scales, 3)])


def _pages(plan: Plan, refs: Refs, row, base, begin, end, slot, move) -> None:
    """The tokens [begin, end) of a block, which begins at position `base`, from the row's pages."""
    unit, tile, pages = plan.unit, plan.tile, plan.pages
    per_page = pages.size // unit

    def copy(u, offset, size: int, scales: bool) -> None:
        """`size` tokens from `offset` on of the block's unit `u`."""
        place = base // unit + u
        page = refs.tables[row * pages.width + place // per_page]
        if size == pages.size:
            source = slice(None)
        else:
            source = pl.ds(pl.multiple_of(place % per_page * unit + offset, tile), size)
        target = pl.ds(pl.multiple_of(u * unit + offset, tile), size)
        if scales:
            for ref, buffer, stream in ((refs.k_scale, refs.k_scales, 2), (refs.v_scale, refs.v_scales, 3)):
                move(ref.at[page, :, source], buffer.at[slot, :, target], stream)
        else:
            for ref, buffer, stream in ((refs.k, refs.k_buffer, 0), (refs.v, refs.v_buffer, 1)):
                move(ref.at[page, source], buffer.at[slot, target], stream)

    def part(u, first, last) -> None:
        """The tiles of a unit in which its tokens [first, last) lie."""
        tiles = first // tile
        _digits(pl.cdiv(last, tile) - tiles, unit // tile, lambda at, n: copy(u, (tiles + at) * tile, n * tile, False))

    low, high = (begin // unit, pl.cdiv(end, unit)) if unit == tile else (pl.cdiv(begin, unit), end // unit)
    lax.fori_loop(low, high, lambda u, _: copy(u, 0, unit, False) or 0, 0)
    if plan.call.int8:  # scales lie in whole registers of lanes
        lax.fori_loop(begin // unit, pl.cdiv(end, unit), lambda u, _: copy(u, 0, unit, True) or 0, 0)
    if unit == tile:
        return
    inside = begin % unit != 0  # only where a window, or another core's part, ends
    u = begin // unit
    if plan.call.window or plan.parts > 1:
        pl.when(inside)(lambda: part(u, begin % unit, jnp.minimum(end - u * unit, unit)))
    pl.when((end % unit != 0) & ~(inside & (u == end // unit)))(lambda: part(end // unit, 0, end % unit))
