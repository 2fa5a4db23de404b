"""The body of decode attention on TPU: a grid step is one row of the batch, whose K and V the kernel's DMAs fetch.

The cache stays in HBM. Blocks of `block_k` slots are fetched into two buffers in turn: while one block is computed, the
next is fetched, and during a row's last block the first one of the next row. Only tiles that the row's queries see
are fetched. DMA sizes are static, so a block is fetched as DMAs of 2^i tiles, by the binary digits of their number.

Heads lie side by side in the lanes. A *pack* is the fewest heads that fill whole registers of 128 lanes. The queries of
a pack are stacked as rows, each zero outside of its own head's lanes. So one matmul over the pack's lanes gives the
logits of all its heads, and nothing is shifted along the lanes.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention.tpu_fetch import Plan, Refs, blocks_of, span, transfer
from pallas_kernels.layouts import LANES
from pallas_kernels.masking import MASKED, START, soft_cap


def _lanes(heads: range, dim: int) -> slice:
    return slice(heads.start * dim, heads.stop * dim)


def _own_lanes(plan: Plan, head: int, heads: range, dim: int):
    """[rows, lanes of the pack]: true in the lanes of the pack's `head`-th head."""
    lane = lax.broadcasted_iota(jnp.int32, (plan.rows, len(heads) * dim), 1)
    return (lane >= head * dim) & (lane < (head + 1) * dim)


def _begin(plan: Plan, refs: Refs, core):
    """Lay the queries out in packs, and start the softmax: empty, or with the sink."""
    call = plan.call
    if call.kv_heads % plan.pack:
        refs.queries[...] = jnp.zeros_like(refs.queries)
    for p, heads in enumerate(plan.packs):
        q = refs.q[0, :, _lanes(heads, call.head_dim)].astype(jnp.float32)
        for i in range(len(heads)):
            own = q if len(heads) == 1 else jnp.where(_own_lanes(plan, i, heads, call.head_dim), q, 0.0)
            refs.queries[p, pl.ds(i * plan.rows, plan.rows), : q.shape[1]] = own
    refs.acc[...] = jnp.zeros_like(refs.acc)
    if call.sinks:
        # Only one part of a context adds the sink, which joins the denominator once.
        adds = core == 0 if plan.parts > 1 else True
        top = jnp.where(adds, jnp.maximum(refs.sinks[...], START), START)
        refs.top[...] = top
        refs.total[...] = jnp.where(adds, jnp.exp(refs.sinks[...] - top), 0.0)
    else:
        refs.top[...] = jnp.full_like(refs.top, START)
        refs.total[...] = jnp.zeros_like(refs.total)


def _stacked(plan: Plan, values):
    """Stack arrays, one per head of a pack, as rows."""
    return values[0] if len(values) == 1 else jnp.concatenate(values, axis=0)


def _query(plan: Plan, shape):
    """Which of its row's queries each line of a pack is."""
    line = lax.broadcasted_iota(jnp.int32, shape, 0)
    query = jnp.zeros(shape, jnp.int32)
    if plan.call.queries == 1:
        return query
    for _ in range(1, plan.pack):
        line = line - jnp.where(line >= plan.rows, plan.rows, 0)
    for t in range(1, plan.call.queries):
        query = query + (line >= t * plan.call.group).astype(jnp.int32)
    return query


def _mask(plan: Plan, refs: Refs, row, low, high, position):
    """[lines of a pack, tile_k], or [1, tile_k] for one query: which of the keys from place `position` on it sees."""
    call = plan.call
    start = refs.starts[row]
    shape = (plan.lines if call.queries > 1 else 1, plan.config.tile_k)
    key = position + lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = (key >= low) & (key < high)
    if plan.by_slot and call.lengths:  # in a wrapped ring, slots up to the newest one are a turn ahead
        newest = jnp.maximum(refs.lengths[row] - 1, 0)
        turn = newest // call.slots * call.slots
        key = key + jnp.where(key <= newest - turn, turn, turn - call.slots)
        seen = seen & (key >= 0)
    query = _query(plan, shape)
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
        mask = jnp.broadcast_to(mask, (plan.lines, plan.config.tile_k)) == 1
        line = position + lax.broadcasted_iota(jnp.int32, (plan.config.tile_k, 1), 0)
        held = (line >= low) & (line < high)
    for p, heads in enumerate(plan.packs):
        k = refs.k_buffer[slot, keys, _lanes(heads, call.head_dim)].astype(plan.dtype)
        v = refs.v_buffer[slot, keys, _lanes(heads, call.value_dim)].astype(plan.dtype)
        q = refs.queries[p, :, : k.shape[1]].astype(plan.dtype)

        def scales(buffer, heads=heads):
            each = [jnp.broadcast_to(buffer[slot, h : h + 1, keys], (plan.rows, plan.config.tile_k)) for h in heads]
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
            rows = pl.ds(i * plan.rows, plan.rows)
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
    """One grid step: of core `program_id(0)` the step `program_id(1)`, which is one row."""
    core, at = pl.program_id(0), pl.program_id(1)
    row = core * plan.steps + at if plan.by_row else at
    is_last = at + 1 == plan.steps
    following = jnp.where(is_last, row, row + 1)

    def count_of(row):
        return blocks_of(plan, *span(plan, refs, row, core))

    def start(row, index, slot):
        transfer(plan, refs, row, core, index, slot, start=True)

    low, high = span(plan, refs, row, core)
    count = count_of(row)
    next_has = ~is_last & (count_of(following) > 0)

    @pl.when(at == 0)
    def _():
        refs.slot[0] = 0

        @pl.when(count > 0)
        def _():
            start(row, 0, 0)

    slot = refs.slot[0]
    _begin(plan, refs, core)

    @pl.when((count == 0) & next_has)
    def _():
        start(following, 0, slot)

    def step(i, slot):
        last = i + 1 == count

        @pl.when(~last | next_has)
        def _():
            start(jnp.where(last, following, row), jnp.where(last, 0, i + 1), 1 - slot)

        transfer(plan, refs, row, core, i, slot, start=False)
        _block(plan, refs, row, low, high, i, slot)
        return 1 - slot

    refs.slot[0] = lax.fori_loop(0, count, step, slot)
    _finish(plan, refs)
