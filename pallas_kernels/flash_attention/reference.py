"""What attention over a dense cache means, in a page: the whole score matrix at once.

Plain array operations with static shapes, so it differentiates and vmaps; its memory grows with T*S.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masking import MASKED, precision_of, soft_cap, visible


def slot_positions(lengths: Int[Array, " B"], slots: int) -> Int[Array, "B S"]:
    """The position that each slot of a ring holds; below zero where it holds nothing.

    A cache of S slots keeps position p in slot p mod S. A cache that never wraps is the same thing.
    """
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    query_positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of T queries a row over what the row's cache holds; the contract is in `api.py`."""
    b, t, n, h = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    precision = precision_of(q.dtype)
    # Widening is exact, and XLA on the CPU has no kernel for this product of bf16; at bf16's precision an
    # accelerator multiplies the f32 copies in bf16 all the same.
    grouped, k, v = (x.astype(jnp.float32) for x in (q.reshape(b, t, kv_heads, n // kv_heads, h), k, v))
    logits = jnp.einsum("btkgh,bksh->bkgts", grouped, k, precision=precision)
    logits = soft_cap(logits * scale, softcap)
    key_positions = slot_positions(lengths, slots)
    mask = visible(query_positions, key_positions, window)[:, None, None]
    v = jnp.where((key_positions >= 0)[:, None, :, None], v, 0)  # a slot that holds nothing may hold NaN
    logits = jnp.where(mask, logits, MASKED)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True)) * mask
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("bkgts,bksh->btkgh", weights, v, precision=precision)
    return out.reshape(b, t, n, h).astype(q.dtype)
