"""The body of prefill attention on GPU (Triton): a program takes one block of a row's queries for one KV head.

K, V and the queries are read in place through arrays of indices: head sizes that are not a power of two are padded in
registers only. Logits are scaled by log2(e) for exp2, which saves a multiplication each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.call import Call
from pallas_kernels.decode_attention.gpu_kernel import padded
from pallas_kernels.masking import LN_2, LOG2_E, MASKED, START, precision_of


@dataclass(frozen=True)
class Plan:
    """The static inputs of the kernel: the call, its tiles, and what follows from both."""

    call: Call
    config: Any  # tiles: `gpu.Config`
    dtype: jnp.dtype  # operand type of the dots

    @property
    def rows(self) -> int:
        return self.call.queries * self.call.group

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // self.config.block_rows)


@dataclass(frozen=True)
class Refs:
    """The kernel's operands by name; None: the call has no such operand."""

    starts: object
    lengths: object
    q: object
    k: object
    v: object
    k_scale: object
    v_scale: object
    sinks: object
    tree: object
    depths: object
    out: object
    lse: object


@dataclass(frozen=True)
class Block:
    """The queries and keys of a program."""

    row: object
    head: object  # KV head
    queries: object  # [block_rows]: indices in the chunk
    real: object  # [block_rows]: false for padding
    start: object
    low: object  # the row holds positions [low, high)
    high: object


def spans(plan: Plan, block: Block, first, last):
    """Key blocks [begin, end) that the queries `first` to `last` see; those in [clean, edge) need no mask."""
    call, tiles = plan.call, plan.config
    size = tiles.block_k
    begin, end = block.low, block.high
    clean, edge = block.low, block.high  # positions that every query sees
    if call.causal:
        end = jnp.minimum(end, block.start + last + 1)
        edge = jnp.minimum(edge, block.start + first + 1)
    if call.window is not None:
        # A token of a tree may lie less deep than its place in the chunk says.
        begin = jnp.maximum(begin, block.start + (0 if call.tree else first) - call.window + 1)
        clean = jnp.maximum(clean, block.start + last - call.window + 1)
    if call.tree:
        edge = jnp.minimum(edge, block.start)
    if call.lengths and call.causal:
        end = jnp.where(block.start + first < block.high, end, 0)
    if call.lengths and call.window is None:  # in a wrapped ring the first block also holds the newest tokens
        clean, edge = (jnp.where(block.low > 0, 0, x) for x in (clean, edge))
    begin, end = begin // size, pl.cdiv(end, size)
    end = jnp.maximum(begin, end)
    clean = jnp.clip(pl.cdiv(clean, size), begin, end)
    return begin, clean, jnp.clip(edge // size, clean, end), end


def body(plan: Plan, refs: Refs) -> None:
    """Grid (query blocks, K, B)."""
    call, tiles = plan.call, plan.config
    # Under a causal mask the last queries see the most keys: they start first.
    i, head, row = plan.row_blocks - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
    lines = i * tiles.block_rows + jnp.arange(tiles.block_rows, dtype=jnp.int32)
    real = lines < plan.rows
    queries, heads = lines // call.group, head * call.group + lines % call.group
    high = refs.lengths[row] if call.lengths else jnp.int32(call.slots)
    block = Block(row, head, queries, real, refs.starts[row], jnp.maximum(high - call.slots, 0), high)
    first = i * tiles.block_rows // call.group
    last = jnp.minimum((i + 1) * tiles.block_rows - 1, plan.rows - 1) // call.group
    begin, clean, edge, end = spans(plan, block, first, last)

    lanes, value_lanes = (_lanes(dim) for dim in (call.head_dim, call.value_dim))
    q = plgpu.load(
        refs.q.at[row, queries[:, None], heads[:, None], lanes[None, :]],
        mask=real[:, None] & (lanes < call.head_dim)[None, :],
        other=0.0,
    ).astype(plan.dtype)
    top = jnp.full((tiles.block_rows,), START, jnp.float32)
    total = jnp.zeros((tiles.block_rows,), jnp.float32)
    if call.sinks:
        sinks = plgpu.load(refs.sinks.at[heads], mask=real, other=0.0).astype(jnp.float32)
        top, total = jnp.maximum(sinks * LOG2_E, START), jnp.ones((tiles.block_rows,), jnp.float32)
    carry = (top, total, jnp.zeros((tiles.block_rows, value_lanes.shape[0]), jnp.float32))

    def masked(i, carry):
        return attend(plan, refs, block, q, i, carry, True)

    def unmasked(i, carry):
        return attend(plan, refs, block, q, i, carry, False)

    if call.window is not None:
        carry = lax.fori_loop(begin, clean, masked, carry)
    carry = lax.fori_loop(clean, edge, unmasked, carry)
    if call.causal or call.lengths or call.slots % tiles.block_k:
        carry = lax.fori_loop(edge, end, masked, carry)

    top, total, acc = carry
    saw = top != START  # true for NaN, so that it propagates
    divisor = jnp.where(saw, total, 1.0)
    out = jnp.where(saw[:, None], acc / divisor[:, None], 0.0)
    plgpu.store(
        refs.out.at[row, queries[:, None], heads[:, None], value_lanes[None, :]],
        out.astype(refs.out.dtype),
        mask=real[:, None] & (value_lanes < call.value_dim)[None, :],
    )
    if refs.lse is not None:
        lse = jnp.where(saw, top * LN_2 + jnp.log(divisor), -jnp.inf)
        plgpu.store(refs.lse.at[row, queries, heads], lse, mask=real)


def _lanes(dim: int):
    return jnp.arange(padded(dim), dtype=jnp.int32)


def fetch(plan: Plan, ref, block: Block, slots, held, dim: int):
    """[block_k, dim rounded up to a power of two] of K or V; zero in empty slots, since 0 * NaN is NaN."""
    tiles = plan.config
    lanes = _lanes(dim)
    mask = None if held is None else held[:, None]
    if lanes.shape[0] != dim:
        inside = jnp.broadcast_to((lanes < dim)[None, :], (tiles.block_k, lanes.shape[0]))
        mask = inside if mask is None else mask & inside
    at = ref.at[block.row, slots[:, None], block.head, lanes[None, :]]
    x = plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0)
    return x.astype(plan.dtype)


def scales(ref, block: Block, slots, held):
    at = ref.at[block.row, block.head, slots]
    return (plgpu.load(at) if held is None else plgpu.load(at, mask=held, other=0.0))[None, :]


def seen(plan: Plan, refs: Refs, block: Block, keys, held):
    """[block_rows, block_k]: which keys each query sees."""
    call, tiles = plan.call, plan.config
    position = (block.start + block.queries)[:, None]
    mask = jnp.broadcast_to(held[None, :], (tiles.block_rows, tiles.block_k))
    if call.causal:
        mask = mask & (keys[None, :] <= position)
    if call.window is not None:
        if call.tree:
            depths = plgpu.load(refs.depths.at[block.row, block.queries], mask=block.real, other=0)
            position = (block.start + depths)[:, None]
        inside = keys[None, :] > position - call.window
        mask = mask & (inside | (keys >= block.start)[None, :] if call.tree else inside)
    if call.tree:
        among = keys - block.start
        own = (among >= 0) & (among < call.queries)
        shown = plgpu.load(
            refs.tree.at[block.row, block.queries[:, None], jnp.where(own, among, 0)[None, :]],
            mask=block.real[:, None] & own[None, :],
            other=1,
        )
        mask = mask & (shown != 0)
    return mask


def attend(plan: Plan, refs: Refs, block: Block, q, i, carry, masked: bool):
    """Online softmax over key block i."""
    call, tiles = plan.call, plan.config
    top, total, acc = carry
    base = i * tiles.block_k
    keys = base + jnp.arange(tiles.block_k, dtype=jnp.int32)
    # One modulo per block if blocks divide the ring, else one per key.
    slots = base % call.slots + keys - base if call.slots % tiles.block_k == 0 else keys % call.slots
    held = (keys >= block.low) & (keys < block.high) if masked else None
    k = fetch(plan, refs.k, block, slots, held, call.head_dim)
    s = lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), precision=precision_of(plan.dtype), preferred_element_type=jnp.float32
    )
    scale = call.scale * LOG2_E if call.softcap is None else call.scale / call.softcap
    s = s * (scales(refs.k_scale, block, slots, held) * scale) if call.int8 else s * scale
    if call.softcap is not None:
        s = jnp.tanh(s) * (call.softcap * LOG2_E)
    if masked:
        s = jnp.where(seen(plan, refs, block, keys, held), s, MASKED)
    higher = jnp.maximum(top, s.max(axis=1))
    fade = jnp.exp2(top - higher)
    weights = jnp.exp2(s - higher[:, None])
    total = total * fade + weights.sum(axis=1)
    if call.int8:
        weights = weights * scales(refs.v_scale, block, slots, held)
    v = fetch(plan, refs.v, block, slots, held, call.value_dim)
    acc = acc * fade[:, None] + lax.dot_general(
        weights.astype(plan.dtype),
        v,
        (((1,), (0,)), ((), ())),
        precision=precision_of(plan.dtype),
        preferred_element_type=jnp.float32,
    )
    return higher, total, acc
