"""The body of decode attention on GPU (Triton): one part of one row's context for one KV head a program.

K, V and the queries are read where they lie, through arrays of indices with a mask: what no query sees is not
read, and head sizes that are no power of two are padded in registers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.call import Call
from pallas_kernels.masking import MASKED, START, precision_of, soft_cap


@dataclass(frozen=True)
class Plan:
    """What the kernel is built from: static facts of a call, its tiles, and what follows from both."""

    call: Call
    config: Any  # tiles: `gpu.Config`
    block_rows: int  # of config, no more than there are rows
    least_blocks: int  # a part has at least so many blocks: its result has to be written and merged
    dtype: jnp.dtype  # what the tensor cores multiply

    @property
    def rows(self) -> int:
        """Queries of one KV head: row t * G + g."""
        return self.call.queries * self.call.group


@dataclass(frozen=True)
class Refs:
    """The kernel's operands by name; None where the call has none."""

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
    """What n rows or lanes take in registers: a power of two, and no less than a dot multiplies.

    Triton compiles a bf16 product over eight lanes without a word, and an H200 gave wrong sums for it.
    """
    return max(16, pl.next_power_of_2(n))


def _span(plan: Plan, start, length):
    """The positions [low, high) that some query of the row sees."""
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
    """The blocks [first, end) of a split: equal parts, fewer for a short row; they depend on no neighbour."""
    first, end = low // plan.config.block_k, pl.cdiv(high, plan.config.block_k)
    if plan.config.splits == 1:
        return first, end
    size = jnp.maximum(pl.cdiv(end - first, plan.config.splits), plan.least_blocks)
    return first + split * size, jnp.minimum(first + (split + 1) * size, end)


def _seen(plan: Plan, keys, queries, start, low, high, bits):
    """[rows, keys]: what each query sees; `bits` holds a query's tree."""
    seen = ((keys >= low) & (keys < high))[None, :]
    position = (start + queries)[:, None]
    if plan.call.causal:
        seen = seen & (keys[None, :] <= position)
    if plan.call.window:
        seen = seen & (keys[None, :] > position - plan.call.window)
    if plan.call.tree:
        among = keys - start
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
    value_lanes = jnp.arange(padded(call.value_dim), dtype=jnp.int32)
    q = plgpu.load(
        refs.q.at[row, queries[:, None], heads[:, None], lanes[None, :]],
        mask=real[:, None] & (lanes < call.head_dim)[None, :],
        other=0.0,
    ).astype(plan.dtype)
    bits = plgpu.load(refs.bits.at[row, queries], mask=real, other=0) if call.tree else None

    def fetch(ref, slots, held, lanes, dim):
        """[block_k, lanes]; zero where nothing is held, so that a weight of zero meets no NaN."""
        return plgpu.load(
            ref.at[row, slots[:, None], head, lanes[None, :]], mask=held[:, None] & (lanes < dim)[None, :], other=0
        )

    def step(i, carry):
        top, total, acc = carry
        base = i * plan.config.block_k
        keys = base + jnp.arange(plan.config.block_k, dtype=jnp.int32)
        # One modulo for the block where blocks divide the ring, else one for each key.
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
        v = fetch(refs.v, slots, held, value_lanes, call.value_dim).astype(plan.dtype)
        acc = acc * fade[:, None] + lax.dot_general(
            weights.astype(plan.dtype),
            v,
            (((1,), (0,)), ((), ())),
            precision=precision_of(plan.dtype),
            preferred_element_type=jnp.float32,
        )
        return higher, total, acc

    top = jnp.full((plan.block_rows,), START, jnp.float32)
    total = jnp.zeros((plan.block_rows,), jnp.float32)
    if call.sinks:
        # Only one split may hold the sink: it enters the denominator once.
        sink = plgpu.load(refs.sinks.at[heads], mask=real, other=0.0).astype(jnp.float32)
        top = jnp.where(split == 0, jnp.maximum(sink, START), top)
        total = jnp.where(split == 0, jnp.exp(sink - top), total)
    acc = jnp.zeros((plan.block_rows, value_lanes.shape[0]), jnp.float32)
    top, total, acc = lax.fori_loop(first, jnp.maximum(first, end), step, (top, total, acc))

    saw = top != START  # true for NaN, which must come out as NaN
    divisor = jnp.where(saw, total, 1.0)
    out = jnp.where(saw[:, None], acc / divisor[:, None], 0.0)
    # A part without blocks writes no result, only that it saw nothing; a row without any writes zeros.
    wrote = real & ((split == 0) | (first < end))
    plgpu.store(
        refs.out.at[split, row, queries[:, None], heads[:, None], value_lanes[None, :]],
        out.astype(refs.out.dtype),
        mask=wrote[:, None] & (value_lanes < call.value_dim)[None, :],
    )
    if refs.lse is not None:
        lse = jnp.where(saw, top + jnp.log(divisor), -jnp.inf)
        plgpu.store(refs.lse.at[split, row, queries, heads], lse, mask=real)
