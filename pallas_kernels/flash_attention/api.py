"""Prefill attention: a block of queries, at an offset, against a dense cache."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_attention
from pallas_kernels.dispatch import Choice, Implementation, choose
from pallas_kernels.flash_attention import xla

IMPLEMENTATIONS = {"xla": xla.attention}


def explain(implementation: Implementation = "auto", platform: str | None = None) -> Choice:
    """Which path a call takes, and why. Raises as `flash_attention` does."""
    return choose("flash_attention", implementation, IMPLEMENTATIONS, platform)


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    query_positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """Causal softmax attention of a chunk of queries against what each row's cache holds.

    Args:
      q: T queries a row; N = K * G query heads, G to a KV head.
      k, v: the cache as stored, S slots a row; position p lies in slot p mod S (a ring; a cache that
        is never longer than S does not wrap). This chunk's own keys and values are in it already.
        Slots that hold none of the row's positions may hold anything, NaN included.
      query_positions: absolute position of each query. A query outside its row (below 0, or at or past
        `lengths`) is padding: it is given zeros or finite values, and nothing is read for it.
      lengths: tokens each row holds, this chunk included; 0 for a row that takes no part.
      scale: multiplies the logits.
      window: a query sees this many positions, itself included; None: all before it. A ring must hold
        at least window - 1 + T of them.
      softcap: bounds the logits to cap * tanh(logits / cap).
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      One vector a query and head, in the dtype of q; softmax and accumulation are in f32.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: a named implementation that does not exist for this call.

    Source: Dao et al. 2022 (FlashAttention); the meaning is `reference.attention`.
    """
    check_attention("flash_attention", q, k, v, query_positions, lengths, window, softcap)
    run = IMPLEMENTATIONS[explain(implementation).implementation]
    return run(q, k, v, query_positions=query_positions, lengths=lengths, scale=scale, window=window, softcap=softcap)
