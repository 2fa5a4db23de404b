"""The body of decode attention on GPU (Triton): a program takes one part of one row's context for one KV head.

K, V and the queries are read in place, through arrays of indices with a mask. Keys that no query sees are not read, and
head sizes that are not a power of two are padded in registers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.call import Call
from pallas_kernels.attention.gpu_words import add_values, lanes_in_word
from pallas_kernels.masking import MASKED, START, precision_of, soft_cap


@dataclass(frozen=True)
class Plan:
    """The static inputs of the kernel: the call, its tiles, and what follows from both."""

    call: Call
    config: Any  # tiles: `gpu.Config`
    block_rows: int  # that of config, at most the rows there are
    least_blocks: int  # the fewest blocks of a part, since its result is written and merged
    dtype: jnp.dtype  # operand type of the dots

    @property
    def rows(self) -> int:
        """T * G queries of one KV head; query t of head g is row t * G + g."""
        return self.call.queries * self.call.group

    @property
    def packed(self) -> int:
        """Lanes of V that one loaded element holds, see `gpu_words`."""
        return lanes_in_word(self.call.int8, self.call.value_dim, padded(self.call.value_dim))


@dataclass(frozen=True)
class Refs:
    """The kernel's operands by name; None: the call has no such operand."""

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


def padded(n: int) -> int:
    """n rows or lanes as padded in registers: a power of two, at least the 16 of a tensor core.

    Triton compiles a bf16 product over eight lanes without an error, but on an H200 its sums were wrong.
    """
    return max(16, pl.next_power_of_2(n))


def _span(plan: Plan, start, length):
    """The positions [low, high) that the queries of the row see."""
    if not plan.call.lengths:
        low, high = jnp.int32(0), jnp.int32(plan.call.slots)
    else:
        high = length
        if plan.call.causal:
            high = jnp.where(start < length, jnp.minimum(length, start + plan.call.queries), 0)
        low = jnp.maximum(length - plan.call.slots, 0)
    if plan.call.window:
        low = jnp.maximum(low, start - plan.call.window + 1)
    return low, high


def _part(plan: Plan, low, high, split):
    """The blocks [first, end) of a split. Parts are equal, fewer in a short row, and depend on this row alone."""
    first, end = low // plan.config.block_k, pl.cdiv(high, plan.config.block_k)
    if plan.config.splits == 1:
        return first, end
    size = jnp.maximum(pl.cdiv(end - first, plan.config.splits), plan.least_blocks)
    return first + split * size, jnp.minimum(first + (split + 1) * size, end)


def _seen(plan: Plan, keys, queries, start, low, high, bits):
    """[rows, keys]: the mask; `bits` holds each query's row of the tree, and its depth (`masking.tree_bits`)."""
    seen = ((keys >= low) & (keys < high))[None, :]
    position = (start + queries)[:, None]
    if plan.call.causal:
        seen = seen & (keys[None, :] <= position)
    if plan.call.window and not plan.call.tree:
        seen = seen & (keys[None, :] > position - plan.call.window)
    if plan.call.tree:
        among = keys - start
        if plan.call.window:
            depth = lax.shift_right_logical(bits, jnp.full_like(bits, 16))[:, None]
            seen = seen & ((among >= 0)[None, :] | (among[None, :] > depth - plan.call.window))
        chosen = (
            lax.shift_right_logical(
                jnp.broadcast_to(bits[:, None], (bits.shape[0], keys.shape[0])),
                jnp.broadcast_to(jnp.clip(among, 0, 31)[None, :], (bits.shape[0], keys.shape[0])),
            )
            & 1
        )
        seen = seen & (((among < 0) | (among >= plan.call.queries))[None, :] | (chosen == 1))
    return seen


def body(plan: Plan, refs: Refs) -> None:
    """Grid (B, K * row blocks, splits)."""
    call, row, split = plan.call, pl.program_id(0), pl.program_id(2)
    row_blocks = pl.cdiv(plan.rows, plan.block_rows)
    head = pl.program_id(1) // row_blocks
    start = refs.starts[row]
    low, high = _span(plan, start, refs.lengths[row] if call.lengths else None)
    first, end = _part(plan, low, high, split)

    lines = pl.program_id(1) % row_blocks * plan.block_rows + jnp.arange(plan.block_rows, dtype=jnp.int32)
    real = lines < plan.rows
    queries, heads = lines // call.group, head * call.group + lines % call.group
    lanes = jnp.arange(padded(call.head_dim), dtype=jnp.int32)
    words = jnp.arange(padded(call.value_dim) // plan.packed, dtype=jnp.int32)  # of V
    in_value = (words < call.value_dim // plan.packed)[None, :]
    q = plgpu.load(
        refs.q.at[row, queries[:, None], heads[:, None], lanes[None, :]],
        mask=real[:, None] & (lanes < call.head_dim)[None, :],
        other=0.0,
    ).astype(plan.dtype)
    bits = plgpu.load(refs.bits.at[row, queries], mask=real, other=0) if call.tree else None

    def fetch(ref, slots, held, lanes, dim):
        """[block_k, lanes]; zero in empty slots, since 0 * NaN is NaN."""
        return plgpu.load(
            ref.at[row, slots[:, None], head, lanes[None, :]], mask=held[:, None] & (lanes < dim)[None, :], other=0
        )

    def step(i, carry):
        top, total, acc = carry
        base = i * plan.config.block_k
        keys = base + jnp.arange(plan.config.block_k, dtype=jnp.int32)
        # One modulo per block if blocks divide the ring, else one per key.
        whole = call.slots % plan.config.block_k == 0
        slots = base % call.slots + keys - base if whole else keys % call.slots
        held = (keys >= low) & (keys < high)
        k = fetch(refs.k, slots, held, lanes, call.head_dim).astype(plan.dtype)
        logits = (
            lax.dot_general(
                q, k, (((1,), (1,)), ((), ())), precision=precision_of(plan.dtype), preferred_element_type=jnp.float32
            )
            * call.scale
        )
        if call.int8:
            logits = logits * plgpu.load(refs.k_scale.at[row, head, slots], mask=held, other=0.0)[None, :]
        logits = soft_cap(logits, call.softcap)
        logits = jnp.where(_seen(plan, keys, queries, start, low, high, bits), logits, MASKED)
        higher = jnp.maximum(top, logits.max(axis=1))
        fade = jnp.exp(top - higher)
        weights = jnp.exp(logits - higher[:, None])
        total = total * fade + weights.sum(axis=1)
        if call.int8:
            weights = weights * plgpu.load(refs.v_scale.at[row, head, slots], mask=held, other=0.0)[None, :]
        v = fetch(refs.v, slots, held, words, call.value_dim // plan.packed)
        v = v.astype(plan.dtype) if plan.packed == 1 else v
        return higher, total, add_values(acc, fade, weights.astype(plan.dtype), v)

    top = jnp.full((plan.block_rows,), START, jnp.float32)
    total = jnp.zeros((plan.block_rows,), jnp.float32)
    if call.sinks:
        # Only one split adds the sink, which joins the denominator once.
        sink = plgpu.load(refs.sinks.at[heads], mask=real, other=0.0).astype(jnp.float32)
        top = jnp.where(split == 0, jnp.maximum(sink, START), top)
        total = jnp.where(split == 0, jnp.exp(sink - top), total)
    acc = (jnp.zeros((plan.block_rows, words.shape[0]), jnp.float32),) * plan.packed
    top, total, acc = lax.fori_loop(first, jnp.maximum(first, end), step, (top, total, acc))

    saw = top != START  # true for NaN, so that it propagates
    divisor = jnp.where(saw, total, 1.0)
    # A part without blocks writes only a log-sum-exp of -inf; of an empty row, the first part writes zeros.
    wrote = (real & ((split == 0) | (first < end)))[:, None] & in_value
    for i, part in enumerate(acc):
        plgpu.store(
            refs.out.at[split, row, queries[:, None], heads[:, None], words[None, :] * plan.packed + i],
            jnp.where(saw[:, None], part / divisor[:, None], 0.0).astype(refs.out.dtype),
            mask=wrote,
        )
    if refs.lse is not None:
        lse = jnp.where(saw, top + jnp.log(divisor), -jnp.inf)
        plgpu.store(refs.lse.at[split, row, queries, heads], lse, mask=real)
