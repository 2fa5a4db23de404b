"""The body of decode attention on GPU (Triton): one part of one row's context for one KV head a program.

K, V and the queries are read where they lie, through arrays of indices with a mask: what no query sees is not
read, and head sizes that are no power of two are padded in registers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.masking import MASKED, precision_of, soft_cap


@dataclass(frozen=True)
class Plan:
    """What the kernel is built from: static facts of a call, its tiles, and what follows from both."""

    queries: int
    heads: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    slots: int
    key_block: int
    row_block: int
    splits: int
    least_blocks: int  # a part has at least so many blocks: its result has to be written and merged
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    full: bool  # every row holds all slots
    sinks: bool
    tree: bool
    scaled: bool
    dtype: jnp.dtype  # what the tensor cores multiply

    @property
    def rows(self) -> int:
        """Queries of one KV head: row t * G + g."""
        return self.queries * self.group


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
    if plan.full:
        low, high = jnp.int32(0), jnp.int32(plan.slots)
    else:
        high = length
        if plan.causal:
            high = jnp.where(start < length, jnp.minimum(length, start + plan.queries), 0)
        low = jnp.maximum(length - plan.slots, 0)
    if plan.window:
        low = jnp.maximum(low, start - plan.window + 1)
    return low, high


def _part(plan: Plan, low, high, split):
    """The blocks [first, end) of a split: equal parts, fewer for a short row; they depend on no neighbour."""
    first, end = low // plan.key_block, pl.cdiv(high, plan.key_block)
    if plan.splits == 1:
        return first, end
    size = jnp.maximum(pl.cdiv(end - first, plan.splits), plan.least_blocks)
    return first + split * size, jnp.minimum(first + (split + 1) * size, end)


def _seen(plan: Plan, keys, queries, start, low, high, bits):
    """[rows, keys]: what each query sees; `bits` holds a query's tree."""
    seen = ((keys >= low) & (keys < high))[None, :]
    position = (start + queries)[:, None]
    if plan.causal:
        seen = seen & (keys[None, :] <= position)
    if plan.window:
        seen = seen & (keys[None, :] > position - plan.window)
    if plan.tree:
        among = keys - start
        chosen = (
            lax.shift_right_logical(
                jnp.broadcast_to(bits[:, None], (bits.shape[0], keys.shape[0])),
                jnp.broadcast_to(jnp.clip(among, 0, 31)[None, :], (bits.shape[0], keys.shape[0])),
            )
            & 1
        )
        seen = seen & (((among < 0) | (among >= plan.queries))[None, :] | (chosen == 1))
    return seen


def body(plan: Plan, refs: Refs) -> None:
    """Grid (B, K * row blocks, splits)."""
    row, split = pl.program_id(0), pl.program_id(2)
    row_blocks = pl.cdiv(plan.rows, plan.row_block)
    head = pl.program_id(1) // row_blocks
    start = refs.starts[row]
    low, high = _span(plan, start, None if plan.full else refs.lengths[row])
    first, end = _part(plan, low, high, split)

    lines = pl.program_id(1) % row_blocks * plan.row_block + jnp.arange(plan.row_block, dtype=jnp.int32)
    real = lines < plan.rows
    queries, heads = lines // plan.group, head * plan.group + lines % plan.group
    lanes = jnp.arange(padded(plan.head_dim), dtype=jnp.int32)
    value_lanes = jnp.arange(padded(plan.value_dim), dtype=jnp.int32)
    q = plgpu.load(
        refs.q.at[row, queries[:, None], heads[:, None], lanes[None, :]],
        mask=real[:, None] & (lanes < plan.head_dim)[None, :],
        other=0.0,
    ).astype(plan.dtype)
    bits = plgpu.load(refs.bits.at[row, queries], mask=real, other=0) if plan.tree else None

    def fetch(ref, slots, held, lanes, dim):
        """[key_block, lanes]; zero where nothing is held, so that a weight of zero meets no NaN."""
        return plgpu.load(
            ref.at[row, slots[:, None], head, lanes[None, :]], mask=held[:, None] & (lanes < dim)[None, :], other=0
        )

    def step(i, carry):
        top, total, acc = carry
        base = i * plan.key_block
        keys = base + jnp.arange(plan.key_block, dtype=jnp.int32)
        # One modulo for the block where blocks divide the ring, else one for each key.
        slots = base % plan.slots + keys - base if plan.slots % plan.key_block == 0 else keys % plan.slots
        held = (keys >= low) & (keys < high)
        k = fetch(refs.k, slots, held, lanes, plan.head_dim).astype(plan.dtype)
        logits = (
            lax.dot_general(
                q, k, (((1,), (1,)), ((), ())), precision=precision_of(plan.dtype), preferred_element_type=jnp.float32
            )
            * plan.scale
        )
        if plan.scaled:
            logits = logits * plgpu.load(refs.k_scale.at[row, head, slots], mask=held, other=0.0)[None, :]
        logits = soft_cap(logits, plan.softcap)
        logits = jnp.where(_seen(plan, keys, queries, start, low, high, bits), logits, MASKED)
        higher = jnp.maximum(top, logits.max(axis=1))
        fade = jnp.exp(top - higher)
        weights = jnp.exp(logits - higher[:, None])
        total = total * fade + weights.sum(axis=1)
        if plan.scaled:
            weights = weights * plgpu.load(refs.v_scale.at[row, head, slots], mask=held, other=0.0)[None, :]
        v = fetch(refs.v, slots, held, value_lanes, plan.value_dim).astype(plan.dtype)
        acc = acc * fade[:, None] + lax.dot_general(
            weights.astype(plan.dtype),
            v,
            (((1,), (0,)), ((), ())),
            precision=precision_of(plan.dtype),
            preferred_element_type=jnp.float32,
        )
        return higher, total, acc

    top = jnp.full((plan.row_block,), MASKED, jnp.float32)
    total = jnp.zeros((plan.row_block,), jnp.float32)
    if plan.sinks:
        # Only one split may hold the sink: it enters the denominator once.
        sink = plgpu.load(refs.sinks.at[heads], mask=real, other=0.0).astype(jnp.float32)
        top = jnp.where(split == 0, jnp.maximum(sink, MASKED), top)
        total = jnp.where(split == 0, jnp.exp(sink - top), total)
    acc = jnp.zeros((plan.row_block, value_lanes.shape[0]), jnp.float32)
    top, total, acc = lax.fori_loop(first, jnp.maximum(first, end), step, (top, total, acc))

    saw = top != MASKED  # true for NaN, which must come out as NaN
    divisor = jnp.where(saw, total, 1.0)
    out = jnp.where(saw[:, None], acc / divisor[:, None], 0.0)
    # A part without blocks writes no result, only that it saw nothing; a row without any writes zeros.
    wrote = real & ((split == 0) | (first < end))
    plgpu.store(
        refs.out.at[split, row, queries[:, None], heads[:, None], value_lanes[None, :]],
        out.astype(refs.out.dtype),
        mask=wrote[:, None] & (value_lanes < plan.value_dim)[None, :],
    )
    if refs.lse is not None:
        lse = jnp.where(saw, top + jnp.log(divisor), -jnp.inf)
        plgpu.store(refs.lse.at[split, row, queries, heads], lse, mask=real)
