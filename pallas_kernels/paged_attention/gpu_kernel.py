"""The body of the paged kernel for GPU (Triton): a program takes one piece, one KV head, one part of the context.

K, V and the queries are read in place, through arrays of indices with a mask. Keys that no query sees are not read, nor
are their block-table entries. Head sizes that are not a power of two are padded in registers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.gpu_words import add_values, lanes_in_word
from pallas_kernels.decode_attention.gpu_kernel import padded
from pallas_kernels.masking import MASKED, START, precision_of, soft_cap
from pallas_kernels.paged_attention.call import Call

SMALL_ROWS = 16  # the fewest rows that a tensor core multiplies


@dataclass(frozen=True)
class Plan:
    """The static inputs of the kernel."""

    call: Call
    config: Any  # tiles: `gpu.Config`
    least_blocks: int  # the fewest blocks of a part, since its result is written and merged
    dtype: jnp.dtype  # operand type of the dots

    @property
    def packed(self) -> int:
        """Lanes of V that one element holds where rows are few, see `gpu_words`."""
        return lanes_in_word(self.call.scale_heads > 0, self.call.value_dim, padded(self.call.value_dim))


def body(plan: Plan, r) -> None:
    """Grid (pieces, K, splits). `r` holds the refs; None: the call has no such ref."""
    item = pl.program_id(0)
    group = plan.call.group
    row, start, stop, position, first, end = (r.pieces[i, item] for i in range(6))
    piece = (row, start, stop, position, first, end, pl.program_id(1), pl.program_id(2))
    rows = pl.next_power_of_2(max(SMALL_ROWS, plan.config.block_q * group))
    few = max(1, SMALL_ROWS // group)
    if plan.config.block_q <= few:
        attend(plan, r, piece, rows)
        return
    small = stop - start <= few

    @pl.when(small & (stop > start))
    def _():
        attend(plan, r, piece, pl.next_power_of_2(max(SMALL_ROWS, few * group)))

    @pl.when(~small)
    def _():
        attend(plan, r, piece, rows)


def part(plan: Plan, first, end, split):
    """The blocks of a split. Parts are equal, fewer in a short row, and depend on this row alone."""
    low, high = first // plan.config.block_k, pl.cdiv(end, plan.config.block_k)
    high = jnp.where(end > first, high, low)
    if plan.config.splits == 1:
        return low, high
    size = jnp.maximum(pl.cdiv(high - low, plan.config.splits), plan.least_blocks)
    return low + split * size, jnp.minimum(low + (split + 1) * size, high)


def attend(plan: Plan, r, piece, rows: int) -> None:
    """Attend with the piece's queries. Row i of the tile is query i div G, query head i mod G."""
    call = plan.call
    row, start, stop, position, first, end, head, split = piece
    line = jnp.arange(rows, dtype=jnp.int32)
    token = start + line // call.group
    heads = head * call.group + line % call.group
    real = token < jnp.minimum(stop, call.tokens)
    own = position + line // call.group  # each query's position
    lanes = jnp.arange(padded(call.head_dim), dtype=jnp.int32)
    # Many rows reach Hopper's own instructions, which take V from shared memory and widen it on the way there.
    packed = plan.packed if rows == SMALL_ROWS else 1
    words = jnp.arange(padded(call.value_dim) // packed, dtype=jnp.int32)  # of V
    q = plgpu.load(
        r.q.at[token[:, None], heads[:, None], lanes[None, :]],
        mask=real[:, None] & (lanes < call.head_dim)[None, :],
        other=0.0,
    ).astype(plan.dtype)
    low, high = part(plan, first, end, split)

    def fetch(ref, page, offset, held, lanes, size):
        """[block_k, lanes]; zero where the row holds nothing, since 0 * NaN is NaN."""
        return plgpu.load(
            ref.at[page[:, None], offset[:, None], head, lanes[None, :]],
            mask=held[:, None] & (lanes < size)[None, :],
            other=0,
        )

    def step(i, carry):
        top, total, acc = carry
        key = i * plan.config.block_k + jnp.arange(plan.config.block_k, dtype=jnp.int32)
        held = (key >= first) & (key < end)
        page = plgpu.load(r.tables.at[row, key // call.page], mask=held, other=0)
        offset = key % call.page
        k = fetch(r.k, page, offset, held, lanes, call.head_dim).astype(plan.dtype)
        logits = (
            lax.dot_general(
                q, k, (((1,), (1,)), ((), ())), precision=precision_of(plan.dtype), preferred_element_type=jnp.float32
            )
            * plan.call.scale
        )
        if call.scale_heads:
            logits = logits * plgpu.load(r.k_scale.at[page, head, offset], mask=held, other=0.0)[None, :]
        logits = soft_cap(logits, call.softcap)
        seen = held[None, :] & (key[None, :] <= own[:, None])
        if call.window:
            seen = seen & (key[None, :] > own[:, None] - call.window)
        logits = jnp.where(seen, logits, MASKED)
        higher = jnp.maximum(top, logits.max(axis=1))
        fade = jnp.exp(top - higher)
        weights = jnp.exp(logits - higher[:, None])
        total = total * fade + weights.sum(axis=1)
        if call.scale_heads:
            weights = weights * plgpu.load(r.v_scale.at[page, head, offset], mask=held, other=0.0)[None, :]
        v = fetch(r.v if packed == 1 else r.v_words, page, offset, held, words, call.value_dim // packed)
        v = v.astype(plan.dtype) if packed == 1 else v
        return higher, total, add_values(acc, fade, weights.astype(plan.dtype), v)

    top = jnp.full((rows,), START, jnp.float32)
    total = jnp.zeros((rows,), jnp.float32)
    if call.sinks:
        # Only one split adds the sink, which joins the denominator once.
        sink = plgpu.load(r.sinks.at[heads], mask=real, other=0.0).astype(jnp.float32)
        top = jnp.where(split == 0, jnp.maximum(sink, START), top)
        total = jnp.where(split == 0, jnp.exp(sink - top), total)
    acc = (jnp.zeros((rows, words.shape[0]), jnp.float32),) * packed
    top, total, acc = lax.fori_loop(low, jnp.maximum(low, high), step, (top, total, acc))

    empty = total == 0
    divisor = jnp.where(empty, 1.0, total)
    # A part without blocks writes only a log-sum-exp of -inf; padding gets zeros, from the first part.
    wrote = real & ((split == 0) | (low < high))
    for i, sums in enumerate(acc):
        plgpu.store(
            r.out.at[split, token[:, None], heads[:, None], words[None, :] * packed + i],
            (sums / divisor[:, None]).astype(r.out.dtype),
            mask=wrote[:, None] & (words < call.value_dim // packed)[None, :],
        )
    if r.lse is not None:
        lse = jnp.where(empty, -jnp.inf, top + jnp.log(divisor))
        plgpu.store(r.lse.at[split, token, heads], lse, mask=real)
