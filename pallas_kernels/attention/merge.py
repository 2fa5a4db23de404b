"""The merge of a context's parts, which the Pallas decode kernels share."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge(
    out: Float[Array, "P *rows H"], lse: Float[Array, " P *rows"]
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
    """Merge P parts of a context, each with a softmax of its own, into one softmax, in f32.

    A part that saw nothing has a log-sum-exp of -inf; its output may be anything.
    Source: Dao et al. 2023 (Flash-Decoding).
    """
    top = lse.max(0)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(lse - top)
    total = weights.sum(0)
    saw = total != 0
    parts = jnp.where((lse == -jnp.inf)[..., None], 0.0, out.astype(jnp.float32))
    merged = (weights[..., None] * parts).sum(0) / jnp.where(saw, total, 1.0)[..., None]
    return merged, jnp.where(saw, top + jnp.log(jnp.where(saw, total, 1.0)), -jnp.inf)
