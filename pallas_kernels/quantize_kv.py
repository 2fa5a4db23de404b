"""Keys and values in int8: one scale a token and head."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


def quantize_kv(x: Float[Array, "*n H"]) -> tuple[Int8[Array, "*n H"], Float[Array, "*n"]]:
    """Round to whole numbers of scale = max|x| / 127, halves to even: (values, scales), x ~ values * scales.

    A vector of zeros gets the scale 0; the largest error is half a scale.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    steps = wide / jnp.where(scale == 0, 1.0, scale)[..., None]
    return jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8), scale
