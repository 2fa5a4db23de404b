"""The body of decode attention on TPU: a grid step is one row of the batch, whose K and V the kernel's DMAs fetch.

The cache stays in HBM. Blocks of `block_k` slots are fetched into two buffers in turn: while one block is computed, the
next is fetched, and during a row's last block the first one of the next row. Only tiles that the row's queries see
are fetched. DMA sizes are static, so a block is fetched as DMAs of 2^i tiles, by the binary digits of their number.

Heads lie side by side in the lanes. A *pack* is the fewest heads that fill whole registers of 128 lanes. The queries of
a pack are stacked as rows, each zero outside of its own head's lanes. So one matmul over the pack's lanes gives the
logits of all its heads, and nothing is shifted along the lanes.
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
from pallas_kernels.masking import MASKED, START, precision_of, soft_cap


@dataclass(frozen=True)
class Plan:
    """The static inputs of the kernel: the call, its tiles, and what follows from both."""

    call: Call
    config: Any  # tiles: `tpu.Config`
    tile: int  # slots of one tile of K and V in HBM: the smallest DMA
    dtype: jnp.dtype  # operand type of the dots

    @property
    def rows(self) -> int:
        """T * G queries of one KV head; query t of head g is row t * G + g."""
        return self.call.queries * self.call.group

    @property
    def by_slot(self) -> bool:
        """Whether blocks are of slots, not of positions: here a block of positions could wrap inside itself."""
        return self.call.slots % self.config.block_k != 0

    @property
    def pack(self) -> int:
        """Number of KV heads in a pack."""
        whole = math.lcm(*(LANES // math.gcd(d, LANES) for d in (self.call.head_dim, self.call.value_dim)))
        return min(whole, self.call.kv_heads)

    @property
    def padded_rows(self) -> int:
        """Rows of one head in a pack, padded to whole sublanes if heads are stacked."""
        return round_up(self.rows, SUBLANES) if self.pack > 1 else self.rows

    @property
    def packs(self) -> list[range]:
        return [range(h, min(h + self.pack, self.call.kv_heads)) for h in range(0, self.call.kv_heads, self.pack)]

    @property
    def precision(self):
        return precision_of(self.dtype)


@dataclass(frozen=True)
class Refs:
    """The kernel's operands and scratch by name; None: the call has no such ref."""

    starts: object
    lengths: object
    bits: object
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


def _span(plan: Plan, refs: Refs, row, split):
    """The places [low, high) of a row that this split reads: positions, or slots (`Plan.by_slot`).

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
        low = jnp.maximum(length - call.slots, 0)
        if plan.by_slot:
            low, high = 0, jnp.where((high > 0) & (length > call.slots), call.slots, high)
    if call.window:
        low = jnp.maximum(low, start - call.window + 1)
    if plan.config.splits > 1:

        def cut(s):
            part = (high - low) * s // plan.config.splits
            return jnp.minimum(high, round_up(low + part, LANES))

        low, high = jnp.where(split == 0, low, cut(split)), cut(split + 1)
    return low, high


def _count(plan: Plan, low, high):
    """Number of blocks that a span touches."""
    touched = pl.cdiv(high, plan.config.block_k) - low // plan.config.block_k
    return touched if isinstance(touched, int) else jnp.where(high > low, touched, 0)


def _transfer(plan: Plan, refs: Refs, row, split, index, slot, act):
    """Call `act` on each DMA of the `index`-th block of a row's span into buffer `slot`."""
    low, high = _span(plan, refs, row, split)
    base = (low // plan.config.block_k + index) * plan.config.block_k
    place = base % plan.call.slots
    streams = [(refs.k, refs.k_buffer, 0), (refs.v, refs.v_buffer, 1)]

    def pieces(unit, move):
        begin = jnp.maximum(low - base, 0) // unit
        count = pl.cdiv(jnp.minimum(high - base, plan.config.block_k), unit) - begin
        for level in reversed(range((plan.config.block_k // unit).bit_length())):

            @pl.when((count >> level) & 1 == 1)
            def _(level=level):
                offset = (begin + ((count >> (level + 1)) << (level + 1))) * unit
                move(pl.multiple_of(place + offset, unit), pl.multiple_of(offset, unit), unit << level)

    def rows(source, target, size):
        for ref, buffer, stream in streams:
            act(
                pltpu.make_async_copy(
                    ref.at[row, pl.ds(source, size)],
                    buffer.at[slot, pl.ds(target, size)],
                    refs.arrived.at[slot, stream],
                )
            )

    def scales(source, target, size):
        for ref, buffer, stream in ((refs.k_scale, refs.k_scales, 2), (refs.v_scale, refs.v_scales, 3)):
            act(
                pltpu.make_async_copy(
                    ref.at[row, :, pl.ds(source, size)],
                    buffer.at[slot, :, pl.ds(target, size)],
                    refs.arrived.at[slot, stream],
                )
            )

    pieces(plan.tile, rows)
    if plan.call.int8:
        pieces(LANES, scales)


def _lanes(heads: range, dim: int) -> slice:
    return slice(heads.start * dim, heads.stop * dim)


def _own_lanes(plan: Plan, head: int, heads: range, dim: int):
    """[rows, lanes of the pack]: true in the lanes of the pack's `head`-th head."""
    lane = lax.broadcasted_iota(jnp.int32, (plan.rows, len(heads) * dim), 1)
    return (lane >= head * dim) & (lane < (head + 1) * dim)


def _begin(plan: Plan, refs: Refs, split):
    """Lay the queries out in packs, and start the softmax: empty, or with the sink."""
    call = plan.call
    if plan.padded_rows != plan.rows or call.kv_heads % plan.pack:
        refs.queries[...] = jnp.zeros_like(refs.queries)
    for p, heads in enumerate(plan.packs):
        q = refs.q[0, :, _lanes(heads, call.head_dim)].astype(jnp.float32)
        for i in range(len(heads)):
            own = q if len(heads) == 1 else jnp.where(_own_lanes(plan, i, heads, call.head_dim), q, 0.0)
            refs.queries[p, pl.ds(i * plan.padded_rows, plan.rows), : q.shape[1]] = own
    refs.acc[...] = jnp.zeros_like(refs.acc)
    if call.sinks:
        # Only one split adds the sink, which joins the denominator once.
        top = jnp.where(split == 0, jnp.maximum(refs.sinks[...], START), START)
        refs.top[...] = top
        refs.total[...] = jnp.where(split == 0, jnp.exp(refs.sinks[...] - top), 0.0)
    else:
        refs.top[...] = jnp.full_like(refs.top, START)
        refs.total[...] = jnp.zeros_like(refs.total)


def _stacked(plan: Plan, values):
    """Stack arrays, one per head of a pack, as rows."""
    return values[0] if len(values) == 1 else jnp.concatenate(values, axis=0)


def _mask(plan: Plan, refs: Refs, row, low, high, position):
    """[rows of one head, tile_k]: which of the keys from place `position` on each query sees."""
    call = plan.call
    start = refs.starts[row]
    shape = (plan.padded_rows, plan.config.tile_k)
    key = position + lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = (key >= low) & (key < high)
    if plan.by_slot and call.lengths:  # in a wrapped ring, slots up to the newest one are a turn ahead
        newest = jnp.maximum(refs.lengths[row] - 1, 0)
        turn = newest // call.slots * call.slots
        key = key + jnp.where(key <= newest - turn, turn, turn - call.slots)
        seen = seen & (key >= 0)
    line = lax.broadcasted_iota(jnp.int32, shape, 0)
    query = jnp.zeros(shape, jnp.int32)
    for t in range(1, call.queries):
        query = query + (line >= t * call.group).astype(jnp.int32)
    if call.causal:
        seen = seen & (key <= start + query)
    if call.window and not call.tree:
        seen = seen & (key > start + query - call.window)
    if call.tree:
        bits = jnp.full(shape, refs.bits[row, 0], jnp.int32)
        for t in range(1, call.queries):
            bits = jnp.where(query == t, refs.bits[row, t], bits)
        among = key - start
        if call.window:
            depth = lax.shift_right_logical(bits, 16)
            seen = seen & ((among >= 0) | (among > depth - call.window))
        chosen = lax.shift_right_logical(bits, jnp.clip(among, 0, 31)) & 1
        seen = seen & ((among < 0) | (among >= call.queries) | (chosen == 1))
    return seen.astype(jnp.int32)


def _attend(plan: Plan, refs: Refs, row, low, high, position, slot, offset, masked: bool):
    """One step of the online softmax, over the keys from `position` on; they are at `offset` in buffer `slot`."""
    call = plan.call
    keys = pl.ds(offset, plan.config.tile_k)
    if masked:
        mask = _mask(plan, refs, row, low, high, position)
        mask = _stacked(plan, [mask] * plan.pack) == 1
        line = position + lax.broadcasted_iota(jnp.int32, (plan.config.tile_k, 1), 0)
        held = (line >= low) & (line < high)
    for p, heads in enumerate(plan.packs):
        k = refs.k_buffer[slot, keys, _lanes(heads, call.head_dim)].astype(plan.dtype)
        v = refs.v_buffer[slot, keys, _lanes(heads, call.value_dim)].astype(plan.dtype)
        q = refs.queries[p, :, : k.shape[1]].astype(plan.dtype)

        def scales(buffer, heads=heads):
            each = [
                jnp.broadcast_to(buffer[slot, h : h + 1, keys], (plan.padded_rows, plan.config.tile_k)) for h in heads
            ]
            return _stacked(plan, each + each[:1] * (plan.pack - len(heads)))

        logits = (
            lax.dot_general(
                q, k, (((1,), (1,)), ((), ())), precision=plan.precision, preferred_element_type=jnp.float32
            )
            * call.scale
        )
        if call.int8:
            logits = logits * scales(refs.k_scales)
        logits = soft_cap(logits, call.softcap)
        if masked:
            logits = jnp.where(mask, logits, MASKED)
            v = jnp.where(held, v, jnp.zeros_like(v))  # 0 * NaN is NaN
        before = refs.top[p]
        top = jnp.maximum(before, logits.max(axis=1, keepdims=True))
        fade = jnp.exp(before - top)
        weights = jnp.exp(logits - top[:, :1])
        refs.top[p] = top
        refs.total[p] = refs.total[p] * fade + weights.sum(axis=1, keepdims=True)
        if call.int8:
            weights = weights * scales(refs.v_scales)
            if masked:
                weights = jnp.where(mask, weights, 0.0)
        width = v.shape[1]
        refs.acc[p, :, :width] = refs.acc[p, :, :width] * fade[:, :1] + lax.dot_general(
            weights.astype(plan.dtype),
            v,
            (((1,), (0,)), ((), ())),
            precision=plan.precision,
            preferred_element_type=jnp.float32,
        )


def _block(plan: Plan, refs: Refs, row, low, high, index, slot):
    """Attend to the `index`-th block of the row's span, which is in buffer `slot`."""
    call = plan.call
    base = (low // plan.config.block_k + index) * plan.config.block_k
    size = plan.config.tile_k
    start = refs.starts[row]
    # Every query of the row sees the keys in [from, to): they need no mask.
    everyone_from = jnp.maximum(low, start + call.queries - call.window) if call.window else low
    everyone_to = high
    if call.causal:
        everyone_to = jnp.minimum(high, start + 1)
    if call.tree:
        everyone_to = jnp.minimum(everyone_to, start)

    def step(j, _):
        offset = pl.multiple_of(j * size, size)
        position = base + offset
        whole = (position >= everyone_from) & (position + size <= everyone_to)
        if plan.by_slot and call.lengths:
            whole = whole & (refs.lengths[row] <= call.slots)
        for masked in (False, True):

            @pl.when(whole != masked)
            def _(masked=masked):
                _attend(plan, refs, row, low, high, position, slot, offset, masked)

        return 0

    lax.fori_loop(
        jnp.maximum(low - base, 0) // size, pl.cdiv(jnp.minimum(high - base, plan.config.block_k), size), step, 0
    )


def _finish(plan: Plan, refs: Refs):
    """Divide by the sums, and put the heads side by side again."""
    call = plan.call
    lane = lax.broadcasted_iota(jnp.int32, (plan.rows, LANES), 1)
    lse = jnp.full((plan.rows, LANES), -jnp.inf, jnp.float32)
    for p, heads in enumerate(plan.packs):
        width = len(heads) * call.value_dim
        out = jnp.zeros((plan.rows, width), jnp.float32)
        for i, h in enumerate(heads):
            rows = pl.ds(i * plan.padded_rows, plan.rows)
            top, total = refs.top[p, rows], refs.total[p, rows]
            saw = top != START  # true for NaN, so that it propagates
            share = jnp.where(saw, 1.0 / jnp.where(saw, total, 1.0), 0.0)
            one = refs.acc[p, rows, :width] * share[:, :1]
            one = jnp.where(saw[:, :1], one, 0.0)
            out = one if len(heads) == 1 else jnp.where(_own_lanes(plan, i, heads, call.value_dim), one, out)
            if refs.lse is not None:
                lse = jnp.where((lane == h) & saw, top + jnp.log(jnp.where(saw, total, 1.0)), lse)
        refs.out[0, 0, :, _lanes(heads, call.value_dim)] = out.astype(refs.out.dtype)
    if refs.out.shape[-1] > call.kv_heads * call.value_dim:
        padding = slice(call.kv_heads * call.value_dim, refs.out.shape[-1])
        refs.out[0, 0, :, padding] = jnp.zeros_like(refs.out[0, 0, :, padding])
    if refs.lse is not None:
        refs.lse[0, 0] = lse


def body(plan: Plan, refs: Refs) -> None:
    """One grid step: split `program_id(0)` of row `program_id(1)`."""
    split, row = pl.program_id(0), pl.program_id(1)
    following = jnp.minimum(row + 1, plan.call.batch - 1)

    def count_of(row):
        return _count(plan, *_span(plan, refs, row, split))

    def start(row, index, slot):
        _transfer(plan, refs, row, split, index, slot, lambda copy: copy.start())

    low, high = _span(plan, refs, row, split)
    count = count_of(row)
    next_has = (row + 1 < plan.call.batch) & (count_of(following) > 0)

    @pl.when(row == 0)
    def _():
        refs.slot[0] = 0

        @pl.when(count > 0)
        def _():
            start(row, 0, 0)

    slot = refs.slot[0]
    _begin(plan, refs, split)

    @pl.when((count == 0) & next_has)
    def _():
        start(following, 0, slot)

    def step(i, slot):
        last = i + 1 == count

        @pl.when(~last | next_has)
        def _():
            start(jnp.where(last, following, row), jnp.where(last, 0, i + 1), 1 - slot)

        _transfer(plan, refs, row, split, i, slot, lambda copy: copy.wait())
        _block(plan, refs, row, low, high, i, slot)
        return 1 - slot

    refs.slot[0] = lax.fori_loop(0, count, step, slot)
    _finish(plan, refs)
