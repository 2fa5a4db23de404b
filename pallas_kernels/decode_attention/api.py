"""Decode attention: one query a row, or a few of a draft, against a long cache."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_attention
from pallas_kernels.decode_attention import xla
from pallas_kernels.dispatch import Choice, Implementation, choose

MAX_QUERIES = 16
IMPLEMENTATIONS = {"xla": xla.attention}


def explain(implementation: Implementation = "auto", platform: str | None = None) -> Choice:
    """Which path a call takes, and why. Raises as `decode_attention` does."""
    return choose("decode_attention", implementation, IMPLEMENTATIONS, platform)


def decode_attention(
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
    """Softmax attention of 1 to 16 queries a row; bound by the reading of K and V.

    The arguments are those of `flash_attention`; the G query heads of a KV head share one read of it,
    and what is read follows the longest row, not the capacity.

    Raises:
      ValueError: shapes that do not fit, or more than 16 queries a row.
      NotImplementedError: a named implementation that does not exist for this call.

    Source: Dao et al. 2023 (Flash-Decoding); the meaning is `flash_attention.reference.attention`.
    """
    check_attention("decode_attention", q, k, v, query_positions, lengths, window, softcap)
    if q.shape[1] > MAX_QUERIES:
        raise ValueError(f"decode_attention takes 1 to {MAX_QUERIES} queries a row, got {q.shape[1]}: "
                         f"use flash_attention")
    run = IMPLEMENTATIONS[explain(implementation).implementation]
    return run(q, k, v, query_positions=query_positions, lengths=lengths, scale=scale, window=window, softcap=softcap)
