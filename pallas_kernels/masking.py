"""The attention mask, and the arithmetic that all attention paths share."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The running maximum starts at START; a masked logit is MASKED. Both are finite, so that a query that sees nothing
# gives zero and not NaN. exp(MASKED - START) is exactly zero, so masked keys have no weight even before a key is seen.
START, MASKED = -1e30, -2e30
# softmax(x) = exp2(x * log2(e) - top) / sum: with the logits' scale, log2(e) is no multiplication more.
LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453


def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    *,
    causal: bool = True,
    window: int | None = None,
    tree: Bool[Array, "B T C"] | None = None,
    starts: Int[Array, " B"] | None = None,
) -> Bool[Array, "B T S"]:
    """Which keys each query sees: the causal mask, the window and the tree, each if given.

    A key position below zero marks a slot that holds nothing of this row. The tree masks the chunk's own tokens only,
    the C positions from `starts` on; the window masks only what came before them, by the depth of each query.
    """
    q, k = query_positions[:, :, None], key_positions[:, None, :]
    mask = k >= 0
    if causal:
        mask &= k <= q
    if tree is None:
        return mask if window is None else mask & (k > q - window)
    before = cast(Array, starts)[:, None]
    place = key_positions - before
    own = ((place >= 0) & (place < tree.shape[2]))[:, None, :]
    if window is not None:
        depths = tree_depths(tree, query_positions - before)
        mask &= own | (k > (before + depths)[:, :, None] - window)
    place = jnp.broadcast_to(jnp.clip(place, 0, tree.shape[2] - 1)[:, None, :], mask.shape)
    return mask & (~own | jnp.take_along_axis(tree, place, axis=2))


def tree_depths(tree: Bool[Array, "B T C"], index: Int[Array, "B T"] | None = None) -> Int[Array, "B T"]:
    """How deep each query lies in the tree: the earlier tokens of the chunk that it sees.

    `index`: which of the C tokens each query is; None: the first T.
    """
    if index is None:
        index = jnp.broadcast_to(jnp.arange(tree.shape[1]), tree.shape[:2])
    return (tree & (jnp.arange(tree.shape[2]) < index[:, :, None])).sum(2, dtype=jnp.int32)


def tree_bits(tree: Bool[Array, "B T T"]) -> Int[Array, "B T"]:
    """The tree of up to 16 tokens for a kernel: bit j, whether a query sees token j; from bit 16 on, its depth."""
    return (tree.astype(jnp.int32) << jnp.arange(tree.shape[2])).sum(2, dtype=jnp.int32) + (tree_depths(tree) << 16)


def soft_cap(logits: Float[Array, ...], cap: float | None) -> Float[Array, ...]:
    """cap * tanh(logits / cap), as in Gemma 2; None: the logits unchanged."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def sink_logits(sinks: Float[Array, " N"] | None) -> Float[Array, " N"] | None:
    """Sinks in f32. -inf is no sink. Infinity becomes NaN: it would take all weight and silently give zeros."""
    if sinks is None:
        return None
    sinks = sinks.astype(jnp.float32)
    return jnp.where(sinks == jnp.inf, jnp.nan, sinks)


def precision_of(dtype) -> jax.lax.Precision:
    """HIGHEST for f32: by default accelerators multiply f32 with less than IEEE precision."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT
