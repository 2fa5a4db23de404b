"""RMS norm."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*b D"], factor: Float[Array, " D"], eps: float) -> Float[Array, "*b D"]:
    """x / rms(x) * factor over the last axis, computed in f32. Zhang & Sennrich 2019."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * factor).astype(x.dtype)
