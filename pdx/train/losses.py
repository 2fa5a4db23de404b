"""Losses against what the target thought, of which the likeliest tokens are known at each position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# What is left to the tokens that are not known is at least this.
LEAST = 1e-5


def divergence(
    logits: Float[Array, "*b V"], ids: Int[Array, "*b k"], logprobs: Float[Array, "*b k"]
) -> Float[Array, "*b"]:
    """KL divergence in nats of the student's distribution from the target's, all other tokens taken as one.

    Args:
      logits: of the student.
      ids, logprobs: the target's likeliest tokens; an id of -1 is one that the student lacks, and counts as another.

    Example:
      >>> from pdx.train.losses import divergence
      >>> logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
      >>> round(float(divergence(logits, jnp.array([0, 1]), jnp.log(jnp.array([0.5, 0.25])))), 4)
      0.0
      >>> round(float(divergence(logits, jnp.array([1, 0]), jnp.log(jnp.array([0.5, 0.25])))), 4)
      0.1733
    """
    known = ids >= 0
    target = jnp.where(known, logprobs.astype(jnp.float32), -jnp.inf)
    own = jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    p = jnp.exp(target)
    q = jnp.where(known, jnp.exp(own), 0.0)
    rest_p, rest_q = (jnp.clip(1 - x.sum(-1), LEAST, 1.0) for x in (p, q))
    named = jnp.where(known, p * (jnp.where(known, target, 0.0) - own), 0.0).sum(-1)
    return named + rest_p * (jnp.log(rest_p) - jnp.log(rest_q))


def mean(x: Float[Array, "*b"], real: Bool[Array, "*b"]) -> Float[Array, ""]:
    """The mean over the positions that are real."""
    return jnp.where(real, x, 0.0).sum() / jnp.maximum(real.sum(), 1)
