"""Which stored key a query may see, and the arithmetic that every attention path shares."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row with nothing to see gives zero and not NaN.
MASKED = -1e30


def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Causal, and within the window where there is one.

    A key position below zero is a slot that holds nothing of this row.
    """
    q, k = query_positions[:, :, None], key_positions[:, None, :]
    mask = (k <= q) & (k >= 0)
    return mask if window is None else mask & (k > q - window)


def soft_cap(logits: Float[Array, ...], cap: float | None) -> Float[Array, ...]:
    """cap * tanh(logits / cap), as Gemma 2 bounds its logits; None leaves them alone."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def precision_of(dtype) -> jax.lax.Precision:
    """f32 means IEEE f32 in every dot: accelerators use less unless they are told."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT
