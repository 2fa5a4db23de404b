"""Argument checks that the attention ops share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """The static facts of a call."""

    batch: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    slots: int
    dtype: object
    kv_dtype: object
    causal: bool
    window: int | None
    softcap: float | None
    sinks: bool
    tree: bool
    lengths: bool
    return_lse: bool
    layout: str


def check_attention(op: str, q, k, v, query_positions, lengths, window, softcap) -> None:
    """Raise ValueError, naming the argument and what it should be, for shapes that do not fit."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q must be [B, T, N, H] and k [B, K, S, H], got {q.shape} and {k.shape}")
    b, t, n, h = q.shape
    if k.shape[0] != b or k.shape[3] != h or n % k.shape[1]:
        raise ValueError(f"{op}: k {k.shape} does not fit q {q.shape}: [B, K, S, H] with N a multiple of K")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v {v.shape} must have the shape of k {k.shape}")
    if query_positions.shape != (b, t):
        raise ValueError(f"{op}: query_positions must be [B, T] = {(b, t)}, got {query_positions.shape}")
    if lengths.shape != (b,):
        raise ValueError(f"{op}: lengths must be [B] = {(b,)}, got {lengths.shape}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window must be at least 1, got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")
