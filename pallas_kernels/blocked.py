"""Attention in XLA block by block, with an online softmax: memory does not grow with T*S, time follows the context.

The loops run over blocks of *positions*, between the first that any query of the block can see and the
last that any row holds, so capacity costs nothing and keys outside a window are neither read nor computed.
Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021 (chunked attention).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.masking import MASKED, precision_of, soft_cap, visible


def block_size(slots: int, wanted: int) -> int:
    """The largest divisor of `slots` up to `wanted`: a block of positions must be one run of slots."""
    return max(d for d in range(1, min(slots, wanted) + 1) if slots % d == 0)


def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    query_positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    scale: float,
    window: int | None,
    softcap: float | None,
    query_block: int,
    key_block: int,
) -> Float[Array, "B T N H"]:
    """The same function as `flash_attention.reference.attention`, in blocks of at most the given sizes."""
    b, t, n, h = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    group = n // kv_heads
    precision = precision_of(q.dtype)
    bs, bq = block_size(slots, key_block), min(t, query_block)
    blocks = -(-t // bq)
    padding = blocks * bq - t
    if padding:
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        query_positions = jnp.pad(query_positions, ((0, 0), (0, padding)), constant_values=-1)
    # Rows of G*bq queries for each KV head: one matmul reads a block of K once for the whole group.
    rows = q.reshape(b, blocks, bq, kv_heads, group, h).transpose(1, 0, 3, 4, 2, 5)  # [blocks, B, K, G, bq, H]
    position_rows = query_positions.reshape(b, blocks, bq).transpose(1, 0, 2)

    def attend_block(rows, positions):
        rows = rows.reshape(b, kv_heads, group * bq, h)

        def body(i, carry):
            top, total, acc = carry
            slot = (i * bs) % slots
            keys = lax.dynamic_slice_in_dim(k, slot, bs, axis=2)
            values = lax.dynamic_slice_in_dim(v, slot, bs, axis=2)
            logits = jnp.einsum("bkmh,bksh->bkms", rows, keys, precision=precision, preferred_element_type=jnp.float32)
            key_positions = jnp.broadcast_to(i * bs + jnp.arange(bs), (b, bs))
            # In a ring, a slot of this block may hold a newer position of a longer row.
            held = (key_positions < lengths[:, None]) & (key_positions >= lengths[:, None] - slots)
            mask = visible(positions, jnp.where(held, key_positions, -1), window)
            # What a slot's last request left there has weight zero, but zero times NaN is NaN.
            values = jnp.where(held[:, None, :, None], values, 0)
            logits = soft_cap(logits.reshape(b, kv_heads, group, bq, bs) * scale, softcap)
            logits = jnp.where(mask[:, None, None], logits, MASKED).reshape(b, kv_heads, group * bq, bs)
            new_top = jnp.maximum(top, logits.max(-1))
            weights = jnp.exp(logits - new_top[..., None])
            fade = jnp.exp(top - new_top)
            acc = acc * fade[..., None] + jnp.einsum(
                "bkms,bksh->bkmh", weights.astype(v.dtype), values, precision=precision,
                preferred_element_type=jnp.float32)  # fmt: skip
            return new_top, total * fade + weights.sum(-1), acc

        # Queries of padding and of inactive rows lie outside their row: no block is read for them.
        real = (positions >= 0) & (positions < lengths[:, None])
        last = jnp.max(jnp.where(real, positions, -1))
        first = jnp.zeros((), jnp.int32)
        if window is not None:
            earliest = jnp.min(jnp.where(real, positions, jnp.iinfo(jnp.int32).max))
            first = jnp.maximum(earliest - (window - 1), 0) // bs
        m = group * bq
        start = (
            # Equal to a masked logit: what a query gathers before it sees anything fades to exactly zero later.
            jnp.full((b, kv_heads, m), MASKED, jnp.float32),
            jnp.zeros((b, kv_heads, m), jnp.float32),
            jnp.zeros((b, kv_heads, m, h), jnp.float32),
        )
        top, total, acc = lax.fori_loop(first, last // bs + 1, body, start)
        saw = (top != MASKED)[..., None]  # true for NaN, which must come out as NaN
        out = jnp.where(saw, acc / jnp.where(saw, total[..., None], 1.0), 0.0)
        return out.reshape(b, kv_heads, group, bq, h).astype(q.dtype)

    if t == bq:
        out = attend_block(rows[0], position_rows[0])[None]
    else:
        out = lax.map(lambda args: attend_block(*args), (rows, position_rows))
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, blocks * bq, n, h)[:, :t]
