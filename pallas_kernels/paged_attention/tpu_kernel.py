"""The body of the paged kernel for TPU: a grid step takes one piece and one group of KV heads.

A piece is the queries of one row in one block of queries. Its keys and values arrive in steps of `block_k` tokens: they
are fetched page by page into one of two buffers while the other is computed, and the last step prefetches the
first one of the next piece. At a window's begin and a row's end, only the memory tiles inside are fetched. In each step
the queries are computed tile by tile; tiles that see none of its keys skip it. A piece of few queries (a decode
row) is computed in a tile of `sub` queries.

A head's lanes in a folded page may begin within a register. K and V are never shifted. Instead the queries are placed
at their head's lanes, with zeros elsewhere in the registers that the head touches, and at the end the head's own
lanes are taken from the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layouts import LANES, in_lanes, round_up, sums_by_lane
from pallas_kernels.masking import LN_2, LOG2_E, MASKED, START, precision_of
from pallas_kernels.paged_attention.call import Call

FIELDS = ("row", "block", "start", "stop", "position", "first", "end", "before", "next")


class Lanes(NamedTuple):
    """The lanes of a head in a folded axis: whole registers from `base` on, the head `offset` lanes into them."""

    base: int
    width: int
    offset: int


def lanes_of(head: int, heads: int, size: int) -> Lanes:
    """The registers that a head touches, without the padding after the last head, which may hold anything."""
    base = head * size // LANES * LANES
    return Lanes(base, min(round_up((head + 1) * size, LANES), heads * size) - base, head * size - base)


def widest(heads: int, size: int) -> int:
    return round_up(max(lanes_of(h, heads, size).width for h in range(heads)), LANES)


@dataclass(frozen=True)
class Plan:
    """The static inputs of the kernel."""

    call: Call
    config: Any  # tiles: `tpu.Config`
    sub: int  # queries of a small tile
    grain: int  # tokens of the smallest DMA, at a window's begin and a row's end
    items: int

    @property
    def units(self) -> int:
        """DMAs of K per step."""
        return self.config.block_k // self.config.dma_k

    @property
    def groups(self) -> int:
        return self.call.kv_heads // self.config.block_heads

    @property
    def dtype(self):
        """Operand type of the dots."""
        wide = "float32" in (self.call.dtype, self.call.kv_dtype)
        return jnp.dtype(jnp.float32 if wide else jnp.bfloat16)


def body(plan: Plan, r: SimpleNamespace) -> None:
    """One grid step. `r` holds the refs; None: the call has no such ref."""
    group, item = pl.program_id(0), pl.program_id(1)
    field = lambda name, i=item: r.plan[FIELDS.index(name) * plan.items + i]  # noqa: E731

    @pl.when((item == 0) | (field("block") != field("block", jnp.maximum(item - 1, 0))))
    def _():
        r.out[...] = jnp.zeros_like(r.out)
        if r.lse is not None:
            r.lse[...] = jnp.full_like(r.lse, -jnp.inf)

    steps = steps_of(plan, field, item)

    @pl.when((steps > 0) & (field("before") == 0) & (group == 0))
    def _():
        transfer(plan, r, field, group, item, 0, 0, start=True)

    start, last = field("start"), field("stop") - 1
    small = start // plan.sub == last // plan.sub
    if plan.config.block_q > plan.sub:

        @pl.when((steps > 0) & small)
        def _():
            attend(plan, r, field, group, item, steps, start // plan.sub, 1, plan.sub)

        @pl.when((steps > 0) & ~small)
        def _():
            first = start // plan.config.tile_q
            tiles = 1 if plan.config.block_q == plan.config.tile_q else last // plan.config.tile_q - first + 1
            attend(plan, r, field, group, item, steps, first, tiles, plan.config.tile_q)
    else:

        @pl.when(steps > 0)
        def _():
            attend(plan, r, field, group, item, steps, 0, 1, plan.config.block_q)


def steps_of(plan: Plan, field, item):
    """Number of steps of keys of an item."""
    return -(-(field("end", item) - field("first", item)) // plan.units)


def transfer(plan: Plan, r, field, group, item, step, slot, *, start: bool) -> None:
    """Start the fetches of one step of an item, or wait for them: the keys that its queries see, in whole tiles."""
    call, unit, grain = plan.call, plan.config.dma_k, plan.grain
    per_page, per_unit = call.page // unit, unit // grain
    first = field("first", item) + step * plan.units
    row = field("row", item)
    begin, end = seen(plan, field, item)
    k, v = (group_lanes(plan, pool, group) for pool in (r.k, r.v))

    def move(pairs) -> None:
        for i, (there, here) in pairs:
            copy = pltpu.make_async_copy(there, here, r.arrived.at[slot, i])
            copy.start() if start else copy.wait()

    def one(u, _):
        place = first + u
        source = r.tables[row * call.width + place // per_page] * per_page + place % per_page
        rows = pl.ds(pl.multiple_of(u * unit, unit), unit)
        if call.scale_heads:
            move(
                enumerate(
                    [
                        (r.k_scale.at[source], r.k_scales.at[slot, :, rows]),
                        (r.v_scale.at[source], r.v_scales.at[slot, :, rows]),
                    ],
                    2,
                )
            )
        low = jnp.maximum(begin // grain - place * per_unit, 0)
        high = jnp.minimum(-(-end // grain) - place * per_unit, per_unit)

        @pl.when(high - low == per_unit)
        def _():
            move(enumerate([(k(source), r.k_buffer.at[slot, rows]), (v(source), r.v_buffer.at[slot, rows])]))

        some = jnp.where(high - low == per_unit, 0, high - low)
        for power in reversed(range((per_unit - 1).bit_length())):  # 5 tiles: a DMA of 4 and one of 1
            size = grain << power

            @pl.when((some >> power) % 2 == 1)
            def _(power=power, size=size):
                at = (low + (some >> power + 1 << power + 1)) * grain
                there = pl.ds(pl.multiple_of(at, grain), size)
                here = pl.ds(pl.multiple_of(u * unit + at, grain), size)
                move(
                    enumerate(
                        [(k(source, there), r.k_buffer.at[slot, here]), (v(source, there), r.v_buffer.at[slot, here])]
                    )
                )

        return 0

    lax.fori_loop(0, jnp.minimum(plan.units, field("end", item) - first), one, 0)


def group_lanes(plan: Plan, pool, group):
    """A function of unit and tokens that gives a ref to the group's heads of them in the pool."""
    width = pool.shape[2] // plan.groups
    if plan.groups == 1:
        return lambda source, tokens=slice(None): pool.at[source, tokens]
    lanes = pl.ds(pl.multiple_of(group * width, LANES), width)
    return lambda source, tokens=slice(None): pool.at[source, tokens, lanes]


def seen(plan: Plan, field, item) -> tuple:
    """The first position that a query of an item sees, and one past the last."""
    position = field("position", item)
    oldest = jnp.maximum(position - (plan.call.window - 1), 0) if plan.call.window else 0
    return oldest, jnp.minimum(position + field("stop", item) - field("start", item), plan.call.capacity)


def attend(plan: Plan, r, field, group, item, steps, first, tiles, count: int) -> None:
    """Attend with `tiles` tiles of `count` queries, from tile `first` on; store the results of the item's queries."""
    call = plan.call
    oldest, end = seen(plan, field, item)
    position = field("position") + first * count - field("start")  # position of the first tile's first query
    total = steps_of(plan, field, plan.items - 1) + field("before", plan.items - 1)
    before = group * total + field("before")
    following = field("next")
    later = group + (following <= item).astype(jnp.int32)  # the group that `next` belongs to

    def each(low, high, act):
        """Run `act(tile)` for each tile; a single one without a loop."""
        if isinstance(tiles, int):
            act(0)
        else:
            lax.fori_loop(low, high, lambda t, _: act(t) or 0, 0)

    def base(t):
        return pl.multiple_of((first + t) * count, count)

    each(0, tiles, lambda t: load_queries(plan, r, group, t, base(t), count))

    def step(j, _):
        slot = (before + j) % 2

        @pl.when(j + 1 < steps)
        def _():
            transfer(plan, r, field, group, item, j + 1, 1 - slot, start=True)

        @pl.when((j + 1 == steps) & (later < plan.groups))
        def _():
            transfer(plan, r, field, later, following, 0, 1 - slot, start=True)

        transfer(plan, r, field, group, item, j, slot, start=False)
        begin = (field("first") + j * plan.units) * plan.config.dma_k
        if not call.scale_heads:
            # Memory past the row's tokens has weight zero, but it may hold NaN, and zero times NaN is NaN.
            @pl.when((begin < oldest) | (begin + plan.config.block_k > end))
            def _():
                at = begin + lax.broadcasted_iota(jnp.int32, (plan.config.block_k, 1), 0)
                v = r.v_buffer[slot]
                r.v_buffer[slot] = jnp.where((at >= oldest) & (at < end), v, jnp.zeros_like(v))

        def one(t):
            first = position + t * count  # of the tile's first query
            whole = (begin >= oldest) & (begin + plan.config.block_k <= jnp.minimum(end, first + 1))
            if call.window:
                whole &= begin > first + count - 1 - call.window

            @pl.when(whole)
            def _():
                for head in range(plan.config.block_heads):
                    update(plan, r, group, t, head, count, slot, None, None)

            @pl.when(~whole)
            def _():
                mask, held = masks(plan, begin, oldest, end, first, count)
                for head in range(plan.config.block_heads):
                    update(plan, r, group, t, head, count, slot, mask, held)

        high = tiles
        if call.window:
            high = jnp.minimum(tiles, (begin + plan.config.block_k + call.window - 2 - position) // count + 1)
        each(jnp.maximum(begin - position, 0) // count, high, one)
        return 0

    lax.fori_loop(0, steps, step, 0)
    each(0, tiles, lambda t: store(plan, r, field, t, base(t), count))


def load_queries(plan: Plan, r, group, tile, base, count: int) -> None:
    """Place each head's queries in the scratch, among zeros; start the softmax: empty, or with the sink."""
    call = plan.call
    h = call.head_dim
    for head in range(plan.config.block_heads):
        lanes = lanes_of(head, plan.config.block_heads, h)
        for g in range(call.group):
            n = head * call.group + g
            rows = slice(g * count, (g + 1) * count)
            q = r.q[pl.ds(base, count), n * h : (n + 1) * h].astype(plan.dtype)
            around = (lanes.offset, lanes.width - lanes.offset - h)
            # No empty arrays: the older compiler rejects them even if unused.
            before, behind = ([jnp.zeros((count, n), q.dtype)] if n else [] for n in around)
            parts = [*before, q, *behind]
            r.queries[tile, head, rows, : lanes.width] = jnp.concatenate(parts, 1) if len(parts) > 1 else q
            top, total = START, jnp.float32(0)
            if r.sinks is not None:
                sink = r.sinks[group * plan.config.block_heads * call.group + n] * LOG2_E
                top = jnp.maximum(sink, START)
                total = jnp.exp2(jnp.full((1, LANES), sink - top)) / LANES  # -inf: no sink
            r.top[tile, head, rows] = jnp.full((count, LANES), top, jnp.float32)
            r.total[tile, head, rows] = jnp.broadcast_to(total, (count, LANES))
        r.acc[tile, head, : call.group * count] = jnp.zeros((call.group * count, r.acc.shape[3]), jnp.float32)


def masks(plan: Plan, begin, oldest, end, first, count: int):
    """[count, block_k]: which keys from position `begin` on each query of a tile sees, `first` on; and those held."""
    key = begin + lax.broadcasted_iota(jnp.int32, (1, plan.config.block_k), 1)
    held = (key >= oldest) & (key < end)
    own = first + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    mask = jnp.where(held, key, jnp.iinfo(jnp.int32).max) <= own
    if plan.call.window:
        mask &= key > own - plan.call.window
    return mask, held


def update(plan: Plan, r, group, tile, head: int, count: int, slot, mask, held) -> None:
    """One step of the online softmax for one tile of `count` queries and one KV head of the group.

    Row g * count + i of a tile is query i of query head g. `mask`, `held`: None where every query sees every key.
    """
    call, block, rows = plan.call, plan.config.block_k, count * plan.call.group
    at, to = (lanes_of(head, plan.config.block_heads, size) for size in (call.head_dim, call.value_dim))
    k = r.k_buffer[slot, :, at.base : at.base + at.width].astype(plan.dtype)
    v = r.v_buffer[slot, :, to.base : to.base + to.width].astype(plan.dtype)
    precision = precision_of(plan.dtype)
    logits = lax.dot_general(
        r.queries[tile, head, :rows, : at.width],
        k,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    # exp2 takes logits times log2(e): one product with the scale.
    scale = call.scale * LOG2_E if call.softcap is None else call.scale / call.softcap
    scales = pl.ds(group * plan.config.block_heads + head, 1)
    logits = logits * (r.k_scales[slot, scales] * scale if call.scale_heads else scale)
    if call.softcap is not None:
        logits = jnp.tanh(logits) * (call.softcap * LOG2_E)
    if mask is not None:
        logits = jnp.where(mask[None], logits.reshape(call.group, count, block), MASKED).reshape(rows, block)
    before = r.top[tile, head, :rows]
    top = jnp.maximum(before, logits.max(1, keepdims=True))
    weights = jnp.exp2(logits - in_lanes(top, block))
    fade = jnp.exp2(before - top)
    r.top[tile, head, :rows] = top
    r.total[tile, head, :rows] = r.total[tile, head, :rows] * fade + sums_by_lane(weights)
    if call.scale_heads:  # past the row's tokens a scale may be NaN
        own = r.v_scales[slot, scales]
        weights = weights * (own if held is None else jnp.where(held, own, 0.0))
    product = lax.dot_general(
        weights.astype(plan.dtype), v, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    acc = r.acc[tile, head, :rows, : to.width]
    r.acc[tile, head, :rows, : to.width] = acc * in_lanes(fade, to.width) + product


def store(plan: Plan, r, field, tile, base, count: int) -> None:
    """Divide by the sums, and write the heads side by side, without touching other rows' results."""
    call = plan.call
    token = base + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    own = (token >= field("start")) & (token < field("stop"))
    lane = lax.broadcasted_iota(jnp.int32, (count, LANES), 1)
    at = pl.ds(base, count)
    results = []
    for head in range(plan.config.block_heads):
        lanes = lanes_of(head, plan.config.block_heads, call.value_dim)
        for g in range(call.group):
            rows = slice(g * count, (g + 1) * count)
            total = r.total[tile, head, rows].sum(1, keepdims=True)
            saw = total != 0  # true for NaN, so that it propagates
            part = r.acc[tile, head, rows, : lanes.width][:, lanes.offset : lanes.offset + call.value_dim]
            results.append(part / jnp.where(saw, total, 1.0))
            if r.lse is not None:
                n = head * call.group + g
                top = r.top[tile, head, rows][:, :1]
                lse = jnp.where(saw, top * LN_2 + jnp.log(jnp.where(saw, total, 1.0)), -jnp.inf)
                where = slice(n // LANES * LANES, (n // LANES + 1) * LANES)
                r.lse[0, at, where] = jnp.where(own & (lane == n % LANES), lse, r.lse[0, at, where])
    padding = r.out.shape[1] - plan.config.block_heads * call.group * call.value_dim
    if padding:
        results.append(jnp.zeros((count, padding), jnp.float32))
    out = jnp.concatenate(results, 1).astype(r.out.dtype)
    r.out[at] = jnp.where(own, out, r.out[at])
