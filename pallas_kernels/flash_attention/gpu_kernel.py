"""The body of prefill attention on GPU (Triton): one block of a row's queries for one KV head a program.

K, V and the queries are read where they lie, through arrays of indices: head sizes that are no power of two are
padded in registers only. Logits live in the base of exp2, which saves a multiplication for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_attention.gpu_kernel import padded
from pallas_kernels.masking import MASKED, precision_of

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class Plan:
    """What the kernel is built from: static facts of a call, its tiles, and what follows from both."""

    queries: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    slots: int
    row_block: int  # a row is one query of one head: row t * G + g of a KV head
    key_block: int
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    lengths: bool
    sinks: bool
    tree: bool
    scaled: bool
    dtype: jnp.dtype  # what the tensor cores multiply

    @property
    def rows(self) -> int:
        return self.queries * self.group

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // self.row_block)


@dataclass(frozen=True)
class Refs:
    """The kernel's operands by name; None where the call has none."""

    starts: object
    lengths: object
    q: object
    k: object
    v: object
    k_scale: object
    v_scale: object
    sinks: object
    tree: object
    out: object
    lse: object


@dataclass(frozen=True)
class Block:
    """Where a program's queries and keys are."""

    row: object
    head: object  # of K and V
    queries: object  # [row_block]: their places in the chunk
    real: object  # [row_block]: whether there is such a query
    start: object
    low: object  # positions [low, high) are held by the row
    high: object


def spans(plan: Plan, block: Block, first, last):
    """Key blocks [begin, end) that the queries `first` to `last` see, and of them [clean, edge) without a mask."""
    size = plan.key_block
    begin, end = block.low, block.high
    clean, edge = block.low, block.high  # positions that every query sees
    if plan.causal:
        end = jnp.minimum(end, block.start + last + 1)
        edge = jnp.minimum(edge, block.start + first + 1)
    if plan.window is not None:
        begin = jnp.maximum(begin, block.start + first - plan.window + 1)
        clean = jnp.maximum(clean, block.start + last - plan.window + 1)
    if plan.tree:
        edge = jnp.minimum(edge, block.start)
    if plan.lengths and plan.causal:
        end = jnp.where(block.start + first < block.high, end, 0)
    if plan.lengths and plan.window is None:  # a ring that has wrapped: its first block holds the row's newest too
        clean, edge = (jnp.where(block.low > 0, 0, x) for x in (clean, edge))
    begin, end = begin // size, pl.cdiv(end, size)
    end = jnp.maximum(begin, end)
    clean = jnp.clip(pl.cdiv(clean, size), begin, end)
    return begin, clean, jnp.clip(edge // size, clean, end), end


def body(plan: Plan, refs: Refs) -> None:
    """Grid (query blocks, K, B)."""
    # The last queries see the most under a causal mask: they start first.
    i, head, row = plan.row_blocks - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
    lines = i * plan.row_block + jnp.arange(plan.row_block, dtype=jnp.int32)
    real = lines < plan.rows
    queries, heads = lines // plan.group, head * plan.group + lines % plan.group
    high = refs.lengths[row] if plan.lengths else jnp.int32(plan.slots)
    block = Block(row, head, queries, real, refs.starts[row], jnp.maximum(high - plan.slots, 0), high)
    first = i * plan.row_block // plan.group
    last = jnp.minimum((i + 1) * plan.row_block - 1, plan.rows - 1) // plan.group
    begin, clean, edge, end = spans(plan, block, first, last)

    lanes, value_lanes = (_lanes(dim) for dim in (plan.head_dim, plan.value_dim))
    q = plgpu.load(
        refs.q.at[row, queries[:, None], heads[:, None], lanes[None, :]],
        mask=real[:, None] & (lanes < plan.head_dim)[None, :],
        other=0.0,
    ).astype(plan.dtype)
    top = jnp.full((plan.row_block,), MASKED, jnp.float32)
    total = jnp.zeros((plan.row_block,), jnp.float32)
    if plan.sinks:
        sinks = plgpu.load(refs.sinks.at[heads], mask=real, other=0.0).astype(jnp.float32)
        top, total = jnp.maximum(sinks * LOG2_E, MASKED), jnp.ones((plan.row_block,), jnp.float32)
    carry = (top, total, jnp.zeros((plan.row_block, value_lanes.shape[0]), jnp.float32))

    def masked(i, carry):
        return attend(plan, refs, block, q, i, carry, True)

    def unmasked(i, carry):
        return attend(plan, refs, block, q, i, carry, False)

    if plan.window is not None:
        carry = lax.fori_loop(begin, clean, masked, carry)
    carry = lax.fori_loop(clean, edge, unmasked, carry)
    if plan.causal or plan.lengths or plan.slots % plan.key_block:
        carry = lax.fori_loop(edge, end, masked, carry)

    top, total, acc = carry
    saw = top != MASKED  # true for NaN, which must come out as NaN
    divisor = jnp.where(saw, total, 1.0)
    out = jnp.where(saw[:, None], acc / divisor[:, None], 0.0)
    plgpu.store(
        refs.out.at[row, queries[:, None], heads[:, None], value_lanes[None, :]],
        out.astype(refs.out.dtype),
        mask=real[:, None] & (value_lanes < plan.value_dim)[None, :],
    )
    if refs.lse is not None:
        lse = jnp.where(saw, top * LN_2 + jnp.log(divisor), -jnp.inf)
        plgpu.store(refs.lse.at[row, queries, heads], lse, mask=real)


def _lanes(dim: int):
    return jnp.arange(padded(dim), dtype=jnp.int32)


def fetch(plan: Plan, ref, block: Block, slots, held, dim: int):
    """[key_block, dim to a power of two] of K or V; zero where nothing is held: a weight of zero must meet no NaN."""
    lanes = _lanes(dim)
    mask = None if held is None else held[:, None]
    if lanes.shape[0] != dim:
        inside = jnp.broadcast_to((lanes < dim)[None, :], (plan.key_block, lanes.shape[0]))
        mask = inside if mask is None else mask & inside
    at = ref.at[block.row, slots[:, None], block.head, lanes[None, :]]
    x = plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0)
    return x.astype(plan.dtype)


def scales(ref, block: Block, slots, held):
    at = ref.at[block.row, block.head, slots]
    return (plgpu.load(at) if held is None else plgpu.load(at, mask=held, other=0.0))[None, :]


def seen(plan: Plan, refs: Refs, block: Block, keys, held):
    """[row_block, key_block]: which keys each query sees."""
    position = (block.start + block.queries)[:, None]
    mask = jnp.broadcast_to(held[None, :], (plan.row_block, plan.key_block))
    if plan.causal:
        mask = mask & (keys[None, :] <= position)
    if plan.window is not None:
        mask = mask & (keys[None, :] > position - plan.window)
    if plan.tree:
        among = keys - block.start
        own = (among >= 0) & (among < plan.queries)
        shown = plgpu.load(
            refs.tree.at[block.row, block.queries[:, None], jnp.where(own, among, 0)[None, :]],
            mask=block.real[:, None] & own[None, :],
            other=1,
        )
        mask = mask & (shown != 0)
    return mask


def attend(plan: Plan, refs: Refs, block: Block, q, i, carry, masked: bool):
    """Online softmax over key block i."""
    top, total, acc = carry
    base = i * plan.key_block
    keys = base + jnp.arange(plan.key_block, dtype=jnp.int32)
    # One modulo for the block where blocks divide the ring, else one for each key.
    slots = base % plan.slots + keys - base if plan.slots % plan.key_block == 0 else keys % plan.slots
    held = (keys >= block.low) & (keys < block.high) if masked else None
    k = fetch(plan, refs.k, block, slots, held, plan.head_dim)
    s = lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), precision=precision_of(plan.dtype), preferred_element_type=jnp.float32
    )
    scale = plan.scale * LOG2_E if plan.softcap is None else plan.scale / plan.softcap
    s = s * (scales(refs.k_scale, block, slots, held) * scale) if plan.scaled else s * scale
    if plan.softcap is not None:
        s = jnp.tanh(s) * (plan.softcap * LOG2_E)
    if masked:
        s = jnp.where(seen(plan, refs, block, keys, held), s, MASKED)
    higher = jnp.maximum(top, s.max(axis=1))
    fade = jnp.exp2(top - higher)
    weights = jnp.exp2(s - higher[:, None])
    total = total * fade + weights.sum(axis=1)
    if plan.scaled:
        weights = weights * scales(refs.v_scale, block, slots, held)
    v = fetch(plan, refs.v, block, slots, held, plan.value_dim)
    acc = acc * fade[:, None] + lax.dot_general(
        weights.astype(plan.dtype),
        v,
        (((1,), (0,)), ((), ())),
        precision=precision_of(plan.dtype),
        preferred_element_type=jnp.float32,
    )
    return higher, total, acc
