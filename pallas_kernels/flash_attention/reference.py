"""The definition of attention over a dense cache, in a page of jnp: the whole score matrix at once.

It is plain array operations with static shapes, so it differentiates and vmaps. Its memory grows with T*S.
"""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.layouts import Layout, as_int32, from_layout
from pallas_kernels.masking import MASKED, precision_of, sink_logits, soft_cap, visible


def slot_positions(lengths: Int[Array, " B"], slots: int) -> Int[Array, "B S"]:
    """The position that each slot of a ring holds; below zero for an empty slot.

    A cache of S slots keeps position p in slot p mod S. A cache that never wraps follows the same rule.
    """
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots


def attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    *,
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "B Kp S"] | None = None,
    v_scale: Float[Array, "B Kp S"] | None = None,
    tree: Bool[Array, "B T T"] | None = None,
    layout: Layout = "heads_first",
    kv_heads: int | None = None,
    value_dim: int | None = None,
    return_lse: bool = False,
):
    """Softmax attention of T queries a row over what the row's cache holds. Its memory grows with T*S.

    Arguments, results and errors are those of `flash_attention`, without implementation and tiles. It has a
    gradient, also under `jit`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import reference_attention
      >>> q, k = jnp.ones((1, 1, 4, 8)), jnp.zeros((1, 2, 16, 8))  # [B, T, N, H], [B, K, S, H]
      >>> v = jnp.ones((1, 2, 16, 8)) * jnp.arange(16.0)[:, None]  # the value of position p is p
      >>> @jax.jit
      ... @jax.value_and_grad
      ... def attend(v):
      ...     out = reference_attention(q, k, v, starts=jnp.array([3]), lengths=jnp.array([4]), scale=1.0)
      ...     return out[0, 0, 0, 0]
      >>> mean, weights = attend(v)  # equal keys give equal weights
      >>> float(mean), weights[0, 0, :6, 0].tolist()
      (1.5, [0.25, 0.25, 0.25, 0.25, 0.0, 0.0])
    """
    b, t, n, h = q.shape
    if layout == "heads_first":
        kv_heads, k, v = k.shape[1], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    else:
        kv_heads = cast(int, kv_heads) if layout == "folded" else k.shape[2]
        k, v = from_layout(k, layout, kv_heads, h), from_layout(v, layout, kv_heads, value_dim or h)
    slots, starts, lengths = k.shape[1], as_int32(starts), as_int32(lengths)
    precision = precision_of(q.dtype)
    # Widening is exact, and XLA on the CPU has no kernel for this product in bf16. At bf16's precision an
    # accelerator multiplies the f32 copies in bf16 anyway.
    grouped, k, v = (x.astype(jnp.float32) for x in (q.reshape(b, t, kv_heads, n // kv_heads, h), k, v))
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, precision=precision)
    if k_scale is not None:
        logits *= k_scale[:, :kv_heads, None, None, :]
    logits = soft_cap(logits * scale, softcap)
    if lengths is None:
        lengths = jnp.full((b,), slots, jnp.int32)
    key_positions = slot_positions(lengths, slots)
    positions = starts[:, None] + jnp.arange(t)
    mask = visible(positions, key_positions, causal=causal, window=window, tree=tree, starts=starts)[:, None, None]
    held = key_positions >= 0  # an empty slot may hold NaN
    v = jnp.where(held[:, :, None, None], v, 0)
    logits = jnp.where(mask, logits, MASKED)
    top = logits.max(-1, keepdims=True)
    sink = sink_logits(sinks)
    if sink is not None:
        sink = sink.reshape(kv_heads, -1)[None, :, :, None, None]
        top = jnp.maximum(top, sink)
    weights = jnp.exp(logits - top) * mask
    total = weights.sum(-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(sink - top)
    shares = weights / jnp.maximum(total, 1e-30)
    if v_scale is not None:
        shares *= jnp.where(held[:, None], v_scale[:, :kv_heads], 0)[:, :, None, None, :]
    out = jnp.einsum("bkgts,bskh->btkgh", shares, v, precision=precision)
    out = out.reshape(b, t, n, v.shape[-1]).astype(q.dtype)
    if not return_lse:
        return out
    return out, (top + jnp.log(total)).reshape(b, n, t).transpose(0, 2, 1)
