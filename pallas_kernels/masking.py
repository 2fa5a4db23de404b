"""Which stored key a query may see, and the arithmetic that every attention path shares."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Where a running maximum starts, and a masked logit: finite, so that a row with nothing to see gives zero and not NaN,
# and so far below the start that its weight exp(MASKED - START) is exactly zero before a query has seen a key.
START, MASKED = -1e30, -2e30


def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    *,
    causal: bool = True,
    window: int | None = None,
    tree: Bool[Array, "B T C"] | None = None,
    starts: Int[Array, " B"] | None = None,
) -> Bool[Array, "B T S"]:
    """Causal, within the window and as the tree says, where there are such.

    A key position below zero is a slot that holds nothing of this row. The tree speaks of the C positions from
    `starts` on, the chunk's own.
    """
    q, k = query_positions[:, :, None], key_positions[:, None, :]
    mask = k >= 0
    if causal:
        mask &= k <= q
    if window is not None:
        mask &= k > q - window
    if tree is not None:
        place = key_positions - starts[:, None]
        own = (place >= 0) & (place < tree.shape[2])
        place = jnp.broadcast_to(jnp.clip(place, 0, tree.shape[2] - 1)[:, None, :], mask.shape)
        mask &= ~own[:, None, :] | jnp.take_along_axis(tree, place, axis=2)
    return mask


def soft_cap(logits: Float[Array, ...], cap: float | None) -> Float[Array, ...]:
    """cap * tanh(logits / cap), as Gemma 2 bounds its logits; None leaves them alone."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def sink_logits(sinks: Float[Array, " N"] | None) -> Float[Array, " N"] | None:
    """Sinks in f32. One of -inf is none; one of infinity, a softmax of nothing else, is NaN: it must not give zeros."""
    if sinks is None:
        return None
    sinks = sinks.astype(jnp.float32)
    return jnp.where(sinks == jnp.inf, jnp.nan, sinks)


def precision_of(dtype) -> jax.lax.Precision:
    """f32 means IEEE f32 in every dot: accelerators use less unless they are told."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT
