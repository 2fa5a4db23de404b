"""Attention in XLA, block by block, with an online softmax. Memory does not grow with T*S; time follows the context.

The loop runs over blocks of *positions*, from the first that a query of the block sees to the last that a row holds.
So unused capacity costs nothing, and keys outside a window are neither read nor computed.
Sources: Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021 (chunked attention).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.attention.call import Call
from pallas_kernels.layouts import head_axes, slot_block
from pallas_kernels.masking import MASKED, START, precision_of, soft_cap, visible


def block_size(slots: int, wanted: int) -> int:
    """The largest divisor of `slots` up to `wanted`: then each block of positions is one run of slots."""
    return max(d for d in range(1, min(slots, wanted) + 1) if slots % d == 0)


def blocked_attention(arrays: Mapping[str, Array], call: Call, query_block: int, key_block: int):
    """Compute `flash_attention.reference.attention` in blocks of at most `query_block` by `key_block`."""
    q, k, v, starts = (arrays[name] for name in ("q", "k", "v", "starts"))
    lengths, sinks, tree = (arrays.get(name) for name in ("lengths", "sinks", "tree"))
    b, t, n, h = q.shape
    slots, kv_heads, group, value_dim = call.slots, call.kv_heads, call.group, call.value_dim
    precision, scale = precision_of(q.dtype), arrays.get("scale", call.scale)
    axes = head_axes(call.layout)
    bs, bq = block_size(slots, key_block), min(t, query_block)
    blocks = -(-t // bq)
    padding = blocks * bq - t
    if lengths is None:
        lengths = jnp.full((b,), slots, jnp.int32)
    query_positions = starts[:, None] + jnp.arange(t, dtype=jnp.int32)
    if padding:
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        query_positions = jnp.pad(query_positions, ((0, 0), (0, padding)), constant_values=-1)
        tree = None if tree is None else jnp.pad(tree, ((0, 0), (0, padding), (0, 0)))
    # A KV head's G*bq queries are the rows of one matmul, which reads a block of K once for the whole group.
    rows = q.reshape(b, blocks, bq, kv_heads, group, h).transpose(1, 0, 3, 4, 2, 5)  # [blocks, B, K, G, bq, H]
    position_rows = query_positions.reshape(b, blocks, bq).transpose(1, 0, 2)
    tree_rows = None if tree is None else tree.reshape(b, blocks, bq, t).transpose(1, 0, 2, 3)

    def scales(x, slot):
        return lax.dynamic_slice_in_dim(x, slot, bs, axis=2)[:, :kv_heads]

    def attend_block(rows, positions, branches):
        rows = rows.reshape(b, kv_heads, group * bq, h)

        def body(i, carry):
            top, total, acc = carry
            slot = (i * bs) % slots
            keys = slot_block(k, call.layout, slot, bs, kv_heads, h)
            values = slot_block(v, call.layout, slot, bs, kv_heads, value_dim)
            if call.int8:  # widened block by block: the cache itself is never dequantized
                keys, values = keys.astype(q.dtype), values.astype(q.dtype)
            logits = jnp.einsum(
                f"bkmh,{axes}->bkms", rows, keys, precision=precision, preferred_element_type=jnp.float32
            )
            if call.int8:
                logits *= scales(arrays["k_scale"], slot)[:, :, None]
            key_positions = jnp.broadcast_to(i * bs + jnp.arange(bs), (b, bs))
            # In a ring, a slot may hold a newer position instead: one turn further.
            held = (key_positions < lengths[:, None]) & (key_positions >= lengths[:, None] - slots)
            mask = visible(
                positions,
                jnp.where(held, key_positions, -1),
                causal=call.causal,
                window=call.window,
                tree=branches,
                starts=starts,
            )
            # Stale values have weight zero, but they may be NaN, and zero times NaN is NaN.
            values = jnp.where(held[:, None, :, None] if axes == "bksh" else held[:, :, None, None], values, 0)
            logits = soft_cap(logits.reshape(b, kv_heads, group, bq, bs) * scale, call.softcap)
            logits = jnp.where(mask[:, None, None], logits, MASKED).reshape(b, kv_heads, group * bq, bs)
            new_top = jnp.maximum(top, logits.max(-1))
            weights = jnp.exp(logits - new_top[..., None])
            fade = jnp.exp(top - new_top)
            total = total * fade + weights.sum(-1)
            if call.int8:
                weights *= jnp.where(held[:, None], scales(arrays["v_scale"], slot), 0)[:, :, None]
            acc = acc * fade[..., None] + jnp.einsum(
                f"bkms,{axes}->bkmh",
                weights.astype(values.dtype),
                values,
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            return new_top, total, acc

        m = group * bq
        start = (
            jnp.full((b, kv_heads, m), START, jnp.float32),
            jnp.zeros((b, kv_heads, m), jnp.float32),
            jnp.zeros((b, kv_heads, m, value_dim), jnp.float32),
        )
        begin, end = _span(positions, lengths, starts, call, bs)
        sink = None
        if sinks is not None:
            sink = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, group), bq, axis=1)[None]
        out, lse = _finish(*lax.fori_loop(begin, end, body, start), sink)
        out = out.reshape(b, kv_heads, group, bq, value_dim).astype(q.dtype)
        return out, lse.reshape(b, kv_heads, group, bq) if call.return_lse else None

    if t == bq:
        out, lse = attend_block(rows[0], position_rows[0], None if tree is None else tree_rows[0])
        out, lse = out[None], None if lse is None else lse[None]
    else:
        out, lse = lax.map(lambda args: attend_block(*args), (rows, position_rows, tree_rows))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(b, blocks * bq, n, value_dim)[:, :t]
    if not call.return_lse:
        return out
    return out, lse.transpose(1, 0, 4, 2, 3).reshape(b, blocks * bq, n)[:, :t]


def _span(positions: Int[Array, "B t"], lengths: Int[Array, " B"], starts: Int[Array, " B"], call: Call, block: int):
    """The first block of positions that these queries see, and one past the last.

    Padding queries, and those of inactive rows, are outside of their row: no block is read for them.
    """
    real = (positions >= 0) & (positions < lengths[:, None])
    ends = positions
    if not call.causal:
        real, ends = (jnp.broadcast_to(x[:, None], positions.shape) for x in (lengths > 0, lengths - 1))
    last = jnp.max(jnp.where(real, ends, -1))
    first = jnp.zeros((), jnp.int32)
    if call.window is not None:
        # A token of a tree may lie less deep than its place in the chunk says.
        least = jnp.broadcast_to(starts[:, None], positions.shape) if call.tree else positions
        earliest = jnp.min(jnp.where(real, least, jnp.iinfo(jnp.int32).max))
        first = jnp.maximum(earliest - (call.window - 1), 0) // block
    return first, last // block + 1


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
