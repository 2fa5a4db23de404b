"""The body of the TPU prefill kernel: one grid step attends with a block of queries to a block of keys.

Logits are scaled by log2(e) for exp2: softmax(x) = exp2(x * log2(e) - top) / sum. This saves a multiplication each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.call import Call
from pallas_kernels.layouts import LANES, in_lanes, sums_by_lane
from pallas_kernels.masking import LN_2, LOG2_E, MASKED, START, precision_of


@dataclass(frozen=True)
class Plan:
    """The static inputs of the kernel. Rows are the G query heads of a KV head times the block's queries."""

    call: Call
    config: Any  # tiles: `tpu.Config`
    heads: int  # KV heads in one group of lanes
    query_blocks: int  # of one row
    parts: int  # of the query blocks, each for one core
    steps: int  # key blocks that one query block sees at most
    extra: int  # columns of ones beside the values, which give the row sums; 0: the vector unit sums
    tree: int  # columns of the tree, padded; 0: no tree
    compute: jnp.dtype

    @property
    def static(self) -> bool:
        """Whether every query sees every slot: no loop bound is dynamic, nothing is masked."""
        return not (self.call.lengths or self.call.causal)

    @property
    def fixed(self) -> bool:
        """Whether every query block takes `steps` grid steps. Else tables tell which takes how many."""
        return self.static or self.steps == 1

    @property
    def pairs(self) -> int:
        """Query blocks of all rows."""
        return self.call.batch * self.query_blocks

    @property
    def most(self) -> int:
        """Entries of one part in the table of grid steps, at most."""
        return -(-self.pairs // self.parts) * self.steps

    @property
    def key_bits(self) -> int:
        """Bits of a key block's number."""
        return (self.call.slots // self.config.block_k - 1).bit_length()

    def pack(self, query_block, key_block):
        """Both blocks in one word of scalar memory; key blocks of positions become those of slots."""
        return query_block << self.key_bits | key_block % (self.call.slots // self.config.block_k)

    def place(self, part, step, key, blocks=None, *_):
        """The row, the query block and the key block of a grid step. `blocks`: the table, unless the plan is fixed."""
        if self.fixed:
            block = step * self.parts + part
            if self.pairs % self.parts:  # a part with fewer blocks computes its last one again
                block = jnp.where(block < self.pairs, block, block - self.parts)
        else:
            packed = blocks[part * self.most + step]
            block, key = packed >> self.key_bits, packed & (1 << self.key_bits) - 1
        if self.call.batch == 1:
            return 0, block, key
        return lax.div(block, self.query_blocks), lax.rem(block, self.query_blocks), key

    def count(self, first, last, live):
        """Grid steps of a query block with these key blocks. One of padding takes one, which writes its zeros."""
        return jnp.where(live, last - first + 1, 1)

    @property
    def rows(self) -> int:
        return self.call.group * self.config.block_q

    def length(self, lengths, row):
        return lengths[row] if self.call.lengths else self.call.slots

    def key_blocks(self, start, length, i):
        """The first and the last key block that query block i sees, and whether it has a query that is not padding.

        Key blocks are of positions under a window, else of slots, each visited once even if the ring has wrapped. A
        query block of padding gets the key blocks of the row's last queries, so that nothing is fetched for it.
        """
        every = self.call.slots // self.config.block_k - 1
        if self.static:
            return 0, every, True
        low = start + i * self.config.block_q
        live = low < length if self.call.causal else length > 0
        low = start + jnp.minimum(i, jnp.maximum(length - 1 - start, 0) // self.config.block_q) * self.config.block_q
        last = jnp.minimum(low + self.config.block_q, length) - 1 if self.call.causal else length - 1
        last = jnp.maximum(last, 0) // self.config.block_k
        if self.call.window is None:
            return 0, jnp.where(length > self.call.slots, every, last), live
        if self.tree:  # its tokens may lie less deep than their place in the chunk says
            low = start
        first = jnp.maximum(low - (self.call.window - 1), jnp.maximum(length - self.call.slots, 0))
        return jnp.minimum(first // self.config.block_k, last), last, live

    def position(self, place, length):
        """Positions of the keys at these places; they differ only for slots of a wrapped ring."""
        if self.call.window is not None or not self.call.lengths:
            return place
        newest = jnp.maximum(length - 1, 0)
        turn = newest // self.call.slots * self.call.slots
        return place + jnp.where(place <= newest - turn, turn, turn - self.call.slots)


class Step:
    """One grid step: its refs by name, and the positions of its queries and keys."""

    def __init__(self, plan: Plan, refs: dict):
        self.plan, self.refs = plan, refs
        self.call, self.tiles = plan.call, plan.config
        part, self.lane_group, step, key = (pl.program_id(axis) for axis in range(4))
        row, self.i, self.j = plan.place(part, step, key, refs.get("blocks"))
        if not plan.fixed:
            self.j = step - refs["begins"][row * plan.query_blocks + self.i]
        self.start = refs["starts"][row]
        self.length = plan.length(refs["lengths"], row)
        self.first, self.last, self.live = plan.key_blocks(self.start, self.length, self.i)
        self.low = self.start + self.i * self.tiles.block_q  # position of the first query
        self.key = (self.first + self.j) * self.tiles.block_k  # place of the first key: its position, or its slot

    def real_head(self, h: int):
        """Whether KV head h of this group of lanes exists: the last group may hold fewer."""
        return self.lane_group * self.plan.heads + h < self.call.kv_heads

    def begin(self):
        """Stack the queries of the G heads, and start the softmax: empty, or with the sinks."""
        plan, refs = self.plan, self.refs
        d = self.call.head_dim
        for h in range(plan.heads):
            for g in range(self.call.group):
                n, rows = h * self.call.group + g, pl.ds(g * self.tiles.block_q, self.tiles.block_q)
                refs["queries"][h, rows, :] = refs["q"][0, :, n * d : (n + 1) * d].astype(plan.compute)
                top = START
                if self.call.sinks:
                    # The last group may have lanes without a head: any finite sink will do there.
                    n = jnp.minimum(self.lane_group * plan.heads * self.call.group + n, self.call.heads - 1)
                    top = jnp.maximum(refs["sinks"][n] * LOG2_E, START)
                refs["top"][h, rows, :] = jnp.full((self.tiles.block_q, LANES), top, jnp.float32)
        total = 1.0 if self.call.sinks else 0.0
        refs["acc"][...] = jnp.zeros_like(refs["acc"])
        if plan.extra:
            if self.call.sinks:
                refs["acc"][:, :, self.call.value_dim :] = jnp.ones((plan.heads, plan.rows, plan.extra), jnp.float32)
        else:  # a row's sum is spread over the lanes: each lane holds a part
            refs["total"][...] = jnp.full_like(refs["total"], total / LANES)

    def walk(self):
        """Attend with this block of queries to the keys of this block that it sees."""
        plan = self.plan
        chunks = self.tiles.block_k // self.tiles.tile_k
        if plan.static:
            for c in range(chunks):
                self.attend(c * self.tiles.tile_k, None)
            return
        clean = self.clean(self.key, self.tiles.block_k)

        @pl.when(clean)
        def _():
            for c in range(chunks):
                self.attend(c * self.tiles.tile_k, None)

        @pl.when(jnp.logical_not(clean))
        def _():
            if chunks == 1:
                self.attend(0, self.key)
            else:
                lax.fori_loop(*self.chunks_seen(), self.attend_chunk, None)

    def clean(self, key, size: int):
        """Whether every query of the block sees all `size` keys from place `key` on: no mask is needed."""
        plan = self.plan
        end = key + size  # one past the last
        seen = (end <= self.length) & ((key if self.call.window is not None else 0) >= self.length - self.call.slots)
        if self.call.causal:
            seen &= end - 1 <= self.low
        if self.call.window is not None:
            seen &= key > self.low + self.tiles.block_q - 1 - self.call.window
        if plan.tree:
            seen &= end <= self.start
        return seen

    def chunks_seen(self):
        """The range of chunks in this block that have a key which some query sees."""
        begin, end = 0, self.length
        if self.call.causal:
            end = jnp.minimum(end, self.low + self.tiles.block_q)
        if self.call.window is None:
            end = jnp.where(self.length > self.call.slots, self.call.slots, end)
        else:
            low = self.start if self.plan.tree else self.low
            begin = jnp.maximum(self.length - self.call.slots, low - (self.call.window - 1))
            begin = jnp.maximum(begin - self.key, 0)
        end = jnp.minimum(end, self.key + self.tiles.block_k)
        return begin // self.tiles.tile_k, (end - self.key + self.tiles.tile_k - 1) // self.tiles.tile_k

    def attend_chunk(self, c, carry):
        offset = pl.multiple_of(c * self.tiles.tile_k, self.tiles.tile_k)
        clean = self.clean(self.key + offset, self.tiles.tile_k)

        @pl.when(clean)
        def _():
            self.attend(offset, None)

        @pl.when(jnp.logical_not(clean))
        def _():
            self.attend(offset, self.key + offset)

        return carry

    def attend(self, offset, key):
        """Attend to one chunk, for every head. `key`: place of its first key; None: no mask is needed."""
        mask = None if key is None else self.mask(key)
        for h in range(self.plan.heads):
            self.attend_head(h, offset, key, mask)

    def mask(self, key):
        """[block_q or 1, tile_k]: which keys of a chunk each query sees."""
        plan = self.plan
        place = plan.position(key + lax.broadcasted_iota(jnp.int32, (1, self.tiles.tile_k), 1), self.length)
        held = (place < self.length) & (place >= jnp.maximum(self.length - self.call.slots, 0))
        if not self.call.causal:
            return held
        query = self.low + lax.broadcasted_iota(jnp.int32, (self.tiles.block_q, 1), 0)
        place_or_never = jnp.where(held, place, jnp.iinfo(jnp.int32).max)
        mask = place_or_never <= query
        if self.call.window is not None and not plan.tree:
            mask &= place > query - self.call.window
        if plan.tree and self.call.window is not None:
            earlier = lax.broadcasted_iota(jnp.int32, (1, plan.tree), 1) < query - self.start
            depth = jnp.where(earlier, self.refs["tree"][0].astype(jnp.float32), 0.0).sum(axis=1, keepdims=True)
            mask &= (place >= self.start) | (place > self.start + depth.astype(jnp.int32) - self.call.window)
        if plan.tree:
            # Each key takes the tree's column place - start: a product with a one-hot matrix picks it.
            column = lax.broadcasted_iota(jnp.int32, (plan.tree, self.tiles.tile_k), 0)
            pick = (column == place - self.start).astype(jnp.float32).astype(jnp.bfloat16)
            picked = jnp.dot(self.refs["tree"][0], pick, preferred_element_type=jnp.float32)
            mask &= (picked > 0.5) | (place < self.start)
        return mask

    def logits(self, h: int, offset, mask):
        """[rows, tile_k], scaled for exp2."""
        plan, refs = self.plan, self.refs
        d = self.call.head_dim
        k = refs["k"][0, pl.ds(offset, self.tiles.tile_k), h * d : (h + 1) * d].astype(plan.compute)
        s = lax.dot_general(
            refs["queries"][h],
            k,
            (((1,), (1,)), ((), ())),
            precision=precision_of(plan.compute),
            preferred_element_type=jnp.float32,
        )
        scale = self.call.scale * LOG2_E if self.call.softcap is None else self.call.scale / self.call.softcap
        s = s * (self.scale_row("k_scale", h, offset) * scale if self.call.int8 else scale)
        if self.call.softcap is not None:
            s = jnp.tanh(s) * (self.call.softcap * LOG2_E)
        if mask is not None:
            s = jnp.where(mask[None], s.reshape(self.call.group, self.tiles.block_q, self.tiles.tile_k), MASKED)
            s = s.reshape(plan.rows, self.tiles.tile_k)
        return s

    def scale_row(self, name: str, h: int, offset):
        head = jnp.minimum(self.lane_group * self.plan.heads + h, self.call.kv_heads - 1)
        return self.refs[name][0, pl.ds(head, 1), pl.ds(offset, self.tiles.tile_k)]

    def values(self, h: int, offset, key):
        """[tile_k, value_dim + extra]; zero past the row's end, where memory may hold NaN."""
        plan = self.plan
        d = self.call.value_dim
        v = self.refs["v"][0, pl.ds(offset, self.tiles.tile_k), h * d : (h + 1) * d].astype(plan.compute)
        if key is not None and self.call.lengths:
            place = key + lax.broadcasted_iota(jnp.int32, (self.tiles.tile_k, 1), 0)
            v = jnp.where(place < self.length, v, jnp.zeros_like(v))
        if plan.extra:
            v = jnp.concatenate([v, jnp.ones((self.tiles.tile_k, plan.extra), plan.compute)], axis=1)
        return v

    def attend_head(self, h: int, offset, key, mask):
        """Online softmax over one chunk."""
        plan, refs = self.plan, self.refs
        s = self.logits(h, offset, mask)
        before = refs["top"][h]
        top = jnp.maximum(before, s.max(axis=1, keepdims=True))
        weights = jnp.exp2(s - in_lanes(top, self.tiles.tile_k))
        fade = jnp.exp2(before - top)
        refs["top"][h] = top
        if not plan.extra:
            refs["total"][h] = refs["total"][h] * fade + sums_by_lane(weights)
        if self.call.int8:
            row = self.scale_row("v_scale", h, offset)
            if key is not None:
                place = key + lax.broadcasted_iota(jnp.int32, (1, self.tiles.tile_k), 1)
                row = jnp.where(place < self.length, row, 0.0)
            weights = weights * row
        product = jnp.dot(
            weights.astype(plan.compute),
            self.values(h, offset, key),
            precision=precision_of(plan.compute),
            preferred_element_type=jnp.float32,
        )
        refs["acc"][h] = refs["acc"][h] * in_lanes(fade, self.call.value_dim + plan.extra) + product

    def finish(self):
        """Divide by the sums, and put the heads side by side again."""
        plan, refs = self.plan, self.refs
        d = self.call.value_dim
        for h in range(plan.heads):
            acc, top = refs["acc"][h], refs["top"][h][:, :1]
            total = acc[:, d : d + 1] if plan.extra else refs["total"][h].sum(axis=1, keepdims=True)
            saw = top != START  # true for NaN, so that it propagates
            out = jnp.where(saw, acc[:, :d] / jnp.where(saw, total, 1.0), 0.0).astype(refs["out"].dtype)
            lse = jnp.where(saw, top * LN_2 + jnp.log(total), -jnp.inf) if self.call.return_lse else None
            for g in range(self.call.group):
                n, rows = h * self.call.group + g, slice(g * self.tiles.block_q, (g + 1) * self.tiles.block_q)
                refs["out"][0, :, n * d : (n + 1) * d] = out[rows]
                if self.call.return_lse:
                    refs["lse"][0, 0, :, n : n + 1] = lse[rows]


def body(plan: Plan, names: tuple[str, ...], *refs):
    """The kernel. `names` are the names of the refs, in order."""
    step = Step(plan, dict(zip(names, refs, strict=True)))

    @pl.when(step.j == 0)
    def _():
        step.begin()

    if plan.static:
        step.walk()
    else:

        @pl.when(step.live & (step.first + step.j <= step.last))
        def _():
            step.walk()

    @pl.when(step.j == (plan.steps if plan.fixed else plan.count(step.first, step.last, step.live)) - 1)
    def _():
        step.finish()
