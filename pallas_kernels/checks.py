"""What the attention ops are called with: the static facts of a call, and the checks that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.layouts import LAYOUTS, Layout, cache_shape, slot_axis


@dataclass(frozen=True)
class Call:
    """The static facts of one attention call over a dense cache; what `supported` and `heuristic` judge by."""

    op: str
    batch: int
    queries: int  # T
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    value_dim: int  # Hv
    slots: int  # S
    dtype: str
    kv_dtype: str
    layout: Layout = "heads_first"
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    tree: bool = False
    lengths: bool = True  # False: every row holds S tokens
    return_lse: bool = False

    @property
    def group(self) -> int:
        """Query heads to a KV head."""
        return self.heads // self.kv_heads


def describe(
    op: str, q, k, v, *, starts, lengths, causal: bool, window: int | None, softcap: float | None, sinks, k_scale,
    v_scale, tree, layout: Layout, kv_heads: int | None, value_dim: int | None, return_lse: bool,
) -> Call:  # fmt: skip
    """The `Call` that these arguments make. Raises ValueError naming the argument and what it should be."""

    def expect(name: str, x: Any, shape: tuple[int, ...], axes: str):
        if x is not None and x.shape != shape:
            raise ValueError(f"{op}: {name} must be {axes} = {shape}, got {x.shape}")

    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    rank = 3 if layout == "folded" else 4
    axes = {"heads_first": "[B, K, S, H]", "heads_last": "[B, S, K, H]", "folded": "[B, S, C]"}[layout]
    if q.ndim != 4 or k.ndim != rank or v.ndim != rank:
        raise ValueError(f"{op}: q must be [B, T, N, H] and k, v {axes} ({layout}), "
                         f"got {q.shape}, {k.shape}, {v.shape}")
    b, t, n, h = q.shape
    slots = k.shape[slot_axis(layout)]
    if layout != "folded":
        head_axis = 1 if layout == "heads_first" else 2
        kv_heads, value_dim = k.shape[head_axis], v.shape[3]
    elif kv_heads is None:
        raise ValueError(f"{op}: folded arrays do not say how many KV heads lie in them: give kv_heads")
    value_dim = h if value_dim is None else value_dim
    if n % kv_heads or k.shape != cache_shape(layout, b, slots, kv_heads, h):
        raise ValueError(f"{op}: k {k.shape} does not fit q {q.shape}: {axes} with N a multiple of K = {kv_heads}")
    expect("v", v, cache_shape(layout, b, slots, kv_heads, value_dim), f"{axes} beside k")
    expect("starts", starts, (b,), "[B]")
    expect("lengths", lengths, (b,), "[B]")
    expect("sinks", sinks, (n,), "[N]")
    expect("tree", tree, (b, t, t), "[B, T, T]")
    quantized = jnp.dtype(k.dtype) == jnp.int8
    if v.dtype != k.dtype:
        raise ValueError(f"{op}: k is {k.dtype} and v is {v.dtype}: they must be of one type")
    if quantized != (k_scale is not None) or quantized != (v_scale is not None):
        raise ValueError(f"{op}: int8 keys and values come with k_scale and v_scale, others without; k is {k.dtype}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and (scale.ndim != 3 or scale.shape[::2] != (b, slots) or scale.shape[1] < kv_heads):
            raise ValueError(f"{op}: {name} must be [B, K or more, S] = {(b, kv_heads, slots)}, got {scale.shape}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"{op}: window must be at least 1 and causal, got window {window}, causal {causal}")
    if tree is not None and not causal:
        raise ValueError(f"{op}: a tree says what a causal query sees of its own chunk; causal is False")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")
    return Call(
        op, b, t, n, kv_heads, h, value_dim, slots, str(q.dtype), str(k.dtype), layout, causal, window, softcap,
        sinks is not None, tree is not None, lengths is not None, return_lse,
    )  # fmt: skip
