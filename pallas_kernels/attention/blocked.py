"""Attention in XLA, block by block, with an online softmax. Memory does not grow with T*S; time follows the context.

The loop runs over blocks of *positions*, to the last that a row holds. So unused capacity costs nothing. With a window
each row begins at the first block that its own queries see: the loop has about (window + queries) / block turns,
however far apart the rows are.
Sources: Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021 (chunked attention).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.call import Call
from pallas_kernels.layouts import head_axes, run_of_slots, slot_block
from pallas_kernels.masking import MASKED, START, precision_of, soft_cap, visible


def block_size(slots: int, wanted: int) -> int:
    """The largest divisor of `slots` up to `wanted`: then each block of positions is one run of slots."""
    return max(d for d in range(1, min(slots, wanted) + 1) if slots % d == 0)


def blocked_attention(arrays: Mapping[str, Array], call: Call, query_block: int, key_block: int):
    """Compute `flash_attention.reference.attention` in blocks of at most `query_block` by `key_block`."""
    q, starts, tree = arrays["q"], arrays["starts"], arrays.get("tree")
    b, t, n, h = q.shape
    kv_heads, group, bq = call.kv_heads, call.group, min(t, query_block)
    blocks = -(-t // bq)
    padding = blocks * bq - t
    positions = starts[:, None] + jnp.arange(t, dtype=jnp.int32)
    if padding:
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
        tree = None if tree is None else jnp.pad(tree, ((0, 0), (0, padding), (0, 0)))
    # A KV head's G*bq queries are the rows of one matmul, which reads a block of K once for the whole group.
    rows = q.reshape(b, blocks, bq, kv_heads, group, h).transpose(1, 0, 3, 4, 2, 5)  # [blocks, B, K, G, bq, H]
    positions = positions.reshape(b, blocks, bq).transpose(1, 0, 2)
    branches = None if tree is None else tree.reshape(b, blocks, bq, t).transpose(1, 0, 2, 3)
    lengths = arrays.get("lengths")
    if lengths is None:
        lengths = jnp.full((b,), call.slots, jnp.int32)
    cache = _Cache(arrays, call, lengths, block_size(call.slots, key_block))

    if blocks == 1:
        out, lse = _attend(cache, rows[0], positions[0], None if branches is None else branches[0])
        out, lse = out[None], None if lse is None else lse[None]
    else:
        out, lse = lax.map(lambda args: _attend(cache, *args), (rows, positions, branches))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(b, blocks * bq, n, call.value_dim)[:, :t]
    if not call.return_lse:
        return out
    return out, lse.transpose(1, 0, 4, 2, 3).reshape(b, blocks * bq, n)[:, :t]


Block = Int[Array, ""] | Int[Array, " B"]  # which block of positions: one for all rows, or each row's own


class _Cache:
    """The cache that the queries attend to, read in blocks of `size` positions."""

    def __init__(self, arrays: Mapping[str, Array], call: Call, lengths: Int[Array, " B"], size: int):
        self.arrays, self.call, self.lengths, self.size = arrays, call, lengths, size
        self.axes = head_axes(call.layout)
        self.scale = arrays.get("scale", call.scale)
        self.precision = precision_of(arrays["q"].dtype)

    def positions(self, i: Block) -> tuple[Int[Array, "B s"], Bool[Array, "B s"]]:
        """The positions of a block, and which of them the rows hold."""
        at = i[..., None] * self.size + jnp.arange(self.size)
        at = jnp.broadcast_to(at, (self.lengths.shape[0], self.size))
        # In a ring, a slot may hold a newer position instead: one turn further.
        return at, (at < self.lengths[:, None]) & (at >= self.lengths[:, None] - self.call.slots)

    def scores(self, i: Block, rows: Float[Array, "B K m H"]) -> Float[Array, "B K m s"]:
        """Q times a block of K, in f32, not scaled yet."""
        keys = self._block(i, "k", rows.shape[-1], rows.dtype)
        scores = jnp.einsum(
            f"bkmh,{self.axes}->bkms", rows, keys, precision=self.precision, preferred_element_type=jnp.float32
        )
        return scores * self._scales(i, "k_scale") if self.call.int8 else scores

    def weighted(self, i: Block, weights: Float[Array, "B K m s"], held: Bool[Array, "B s"], dtype):
        """The weighted sum of a block of V, in f32."""
        values = self._block(i, "v", self.call.value_dim, dtype)
        # Stale values have weight zero, but they may be NaN, and zero times NaN is NaN.
        values = jnp.where(held[:, None, :, None] if self.axes == "bksh" else held[:, :, None, None], values, 0)
        if self.call.int8:
            weights = weights * jnp.where(held[:, None, None], self._scales(i, "v_scale"), 0)
        return jnp.einsum(
            f"bkms,{self.axes}->bkmh",
            weights.astype(values.dtype),
            values,
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )

    def _block(self, i: Block, name: str, width: int, dtype) -> Array:
        slot = (i * self.size) % self.call.slots
        block = slot_block(self.arrays[name], self.call.layout, slot, self.size, self.call.kv_heads, width)
        # int8 is widened block by block: the cache itself is never dequantized.
        return block.astype(dtype) if self.call.int8 else block

    def _scales(self, i: Block, name: str) -> Float[Array, "B K 1 s"]:
        slot = (i * self.size) % self.call.slots
        scales = run_of_slots(self.arrays[name], slot, self.size, axis=2)
        return scales[:, : self.call.kv_heads, None]


def _attend(cache: _Cache, rows: Float[Array, "B K G t H"], positions: Int[Array, "B t"], branches):
    """One block of queries over the blocks of keys that it sees. Returns [B, K, G, t, Hv] and the log-sum-exp."""
    call, (b, kv_heads, group, bq, h), dtype = cache.call, rows.shape, rows.dtype
    m = group * bq
    rows = rows.reshape(b, kv_heads, m, h)

    first, turns = _span(positions, cache.lengths, cache.arrays["starts"], call, cache.size)

    def body(turn, carry):
        top, total, acc = carry
        i = first + turn
        at, held = cache.positions(i)
        mask = visible(
            positions,
            jnp.where(held, at, -1),
            causal=call.causal,
            window=call.window,
            tree=branches,
            starts=cache.arrays["starts"],
        )
        logits = cache.scores(i, rows).reshape(b, kv_heads, group, bq, cache.size)
        logits = soft_cap(logits * cache.scale, call.softcap)
        logits = jnp.where(mask[:, None, None], logits, MASKED).reshape(b, kv_heads, m, cache.size)
        new_top = jnp.maximum(top, logits.max(-1))
        weights = jnp.exp(logits - new_top[..., None])
        fade = jnp.exp(top - new_top)
        total = total * fade + weights.sum(-1)
        return new_top, total, acc * fade[..., None] + cache.weighted(i, weights, held, dtype)

    start = (
        jnp.full((b, kv_heads, m), START, jnp.float32),
        jnp.zeros((b, kv_heads, m), jnp.float32),
        jnp.zeros((b, kv_heads, m, call.value_dim), jnp.float32),
    )
    sinks = cache.arrays.get("sinks")
    if sinks is not None:
        sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, group), bq, axis=1)[None]
    top, total, acc = lax.fori_loop(0, turns, body, start)
    out, lse = _finish(top, total, acc, sinks)
    out = out.reshape(b, kv_heads, group, bq, call.value_dim).astype(dtype)
    return out, lse.reshape(b, kv_heads, group, bq) if call.return_lse else None


def _span(positions: Int[Array, "B t"], lengths: Int[Array, " B"], starts: Int[Array, " B"], call: Call, block: int):
    """The first block of positions that these queries see, and the turns of a loop that begins there.

    With a window the first block is each row's own, and the turns are those of the row that needs the most.
    Padding queries, and those of inactive rows, are outside of their row: no block is read for them.
    """
    real = (positions >= 0) & (positions < lengths[:, None])
    ends = positions
    if not call.causal:
        real, ends = (jnp.broadcast_to(x[:, None], positions.shape) for x in (lengths > 0, lengths - 1))
    end = jnp.where(real, ends, -1).max(1) // block + 1
    if call.window is None:
        return jnp.zeros((), jnp.int32), end.max()
    # A token of a tree may lie less deep than its place in the chunk says.
    least = jnp.broadcast_to(starts[:, None], positions.shape) if call.tree else positions
    earliest = jnp.where(real, least, jnp.iinfo(jnp.int32).max).min(1)
    first = jnp.minimum(jnp.maximum(earliest - (call.window - 1), 0) // block, end)
    return first, (end - first).max()


def _finish(top, total, acc, sink):
    """Results and log-sum-exp from a softmax's running maximum, sum and weighted values; the sink joins here."""
    saw = top != START  # true for NaN, so that it propagates
    if sink is not None:
        new_top = jnp.maximum(top, sink)
        fade = jnp.where(saw, jnp.exp(top - new_top), 0)
        total, acc = total * fade + jnp.exp(sink - new_top), acc * fade[..., None]
        top, saw = new_top, new_top != START  # -inf: no sink
    total = jnp.where(saw, total, 1.0)
    out = jnp.where(saw[..., None], acc / total[..., None], 0.0)
    return out, jnp.where(saw, top + jnp.log(total), -jnp.inf)
