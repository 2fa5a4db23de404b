"""Keys and values in int8: one scale per token and head."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


def quantize_kv(x: Float[Array, "*n H"]) -> tuple[Int8[Array, "*n H"], Float[Array, "*n"]]:
    """Quantize vectors to int8: (values, scales) with x ~ values * scales and scale = max|x| / 127 per vector.

    Rounding is half to even; the largest error is half a scale. A vector of zeros gets the scale 0.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import quantize_kv
      >>> values, scales = jax.jit(quantize_kv)(jnp.array([[254.0, -127.0, 5.0]]))
      >>> values.tolist(), scales.tolist()  # -127 / 2 = -63.5 and 5 / 2 = 2.5 go to the even neighbour
      ([[127, -64, 2]], [2.0])
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    steps = wide / jnp.where(scale == 0, 1.0, scale)[..., None]
    return jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8), scale
