"""The static facts of a call of attention over a dense cache, and the checks of its arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import check_array, check_whole, refuse_row, seen
from pallas_kernels.layouts import LAYOUTS, Layout, as_int32, cache_shape, slot_axis
from pallas_kernels.masking import sink_logits


@dataclass(frozen=True)
class Call:
    """The static facts of one call. An implementation's `supported` and `heuristic` decide by them."""

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
    scale: float | None = 1.0  # None: traced, and among the arrays
    whole: bool = False  # every row is known to start at position 0, while tracing

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def int8(self) -> bool:
        """Whether K and V are int8, with scales."""
        return self.kv_dtype == "int8"


def check_arrays(op: str, arrays: Mapping[str, Any], stored: tuple[str, ...], integers: tuple[str, ...]) -> None:
    """Raise ValueError unless all arrays have types that attention takes.

    Args:
      arrays: by name. `tree` is boolean; those not listed below are floating. Both may be None.
      stored: names of K and V, which are floating or int8.
      integers: names of the arrays of positions, lengths and indices.
    """
    check_array(op, "q", arrays["q"], "floating")
    for name in stored:
        check_array(op, name, arrays[name], "floating", "int8")
    for name in integers:
        check_array(op, name, arrays[name], "integer")
    for name, x in arrays.items():
        if x is not None and name not in ("q", *stored, *integers):
            check_array(op, name, x, "bool" if name == "tree" else "floating")


def plain_scale(op: str, scale: Any) -> float | None:
    """The scale of the logits as a float; None if it is traced. Raises ValueError unless it is finite."""
    if isinstance(scale, jax.core.Tracer):
        return None
    number = isinstance(scale, int | float | np.generic | jax.Array | np.ndarray)
    if not number or np.ndim(scale) or not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be a finite number, such as head_dim ** -0.5, got {scale!r}")
    return float(scale)


def check_softcap(op: str, softcap: Any) -> None:
    """Raise ValueError unless the cap is positive and finite: an infinite one would give NaN, not uncapped logits."""
    if softcap is not None and not (isinstance(softcap, int | float | np.generic) and 0 < softcap < math.inf):
        raise ValueError(f"{op}: softcap must be positive and finite, or None for no cap; got {softcap!r}")


def make_call(
    op: str,
    arrays: Mapping[str, Any],
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    layout: Layout = "heads_first",
    kv_heads: int | None = None,
    value_dim: int | None = None,
    return_lse: bool = False,
) -> Call:
    """Check the arguments of an op over a dense cache and gather the static facts.

    Args:
      arrays: by name: q, k, v, starts, lengths, sinks, k_scale, v_scale, tree. None or absent: the call has no such
        array.

    Raises:
      ValueError: an argument does not fit; the message names it and says what it should be.
    """
    arrays = dict.fromkeys(("lengths", "sinks", "k_scale", "v_scale", "tree")) | dict(arrays)
    check_arrays(op, arrays, ("k", "v"), ("starts",) if arrays["lengths"] is None else ("starts", "lengths"))
    kv_heads, value_dim = _check_cache(op, arrays, layout, kv_heads, value_dim)
    q, k, tree = arrays["q"], arrays["k"], arrays["tree"]
    b, t, n, h = q.shape
    for name, shape, axes in (
        ("starts", (b,), "[B]"),
        ("lengths", (b,), "[B]"),
        ("sinks", (n,), "[N]"),
        ("tree", (b, t, t), "[B, T, T]"),
    ):
        if arrays[name] is not None and arrays[name].shape != shape:
            raise ValueError(f"{op}: {name} must be {axes} = {shape}, got {arrays[name].shape}")
    if window is not None:
        check_whole(op, "window", window)
        if window < 1 or not causal:
            raise ValueError(f"{op}: window must be at least 1 and causal, got window {window}, causal {causal}")
    if tree is not None and not causal:
        raise ValueError(f"{op}: a tree says what a causal query sees of its own chunk; causal is False")
    check_softcap(op, softcap)
    return Call(
        op=op,
        batch=b,
        queries=t,
        heads=n,
        kv_heads=kv_heads,
        head_dim=h,
        value_dim=value_dim,
        slots=k.shape[slot_axis(layout)],
        dtype=str(q.dtype),
        kv_dtype=str(k.dtype),
        layout=layout,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=arrays["sinks"] is not None,
        tree=tree is not None,
        lengths=arrays["lengths"] is not None,
        return_lse=return_lse,
        scale=plain_scale(op, scale),
        whole=(known := seen(arrays["starts"])) is not None and not known[0].any(),
    )


def _check_cache(op: str, arrays: Mapping[str, Any], layout: Layout, kv_heads, value_dim) -> tuple[int, int]:
    """Check that K, V and the scales of int8 fit q; return the KV heads and the head size of V."""
    q, k, v = (arrays[name] for name in "qkv")
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    rank = 3 if layout == "folded" else 4
    axes = {"heads_first": "[B, K, S, H]", "heads_last": "[B, S, K, H]", "folded": "[B, S, C]"}[layout]
    if q.ndim != 4 or k.ndim != rank or v.ndim != rank:
        raise ValueError(
            f"{op}: q must be [B, T, N, H] and k, v {axes} ({layout}), got {q.shape}, {k.shape}, {v.shape}"
        )
    b, t, n, h = q.shape
    slots = k.shape[slot_axis(layout)]
    if layout != "folded":
        head_axis = 1 if layout == "heads_first" else 2
        kv_heads, value_dim = k.shape[head_axis], v.shape[3]
    elif kv_heads is None:
        raise ValueError(f"{op}: folded arrays do not say how many KV heads lie in them: give kv_heads")
    value_dim = h if value_dim is None else value_dim
    check_whole(op, "kv_heads", kv_heads)
    check_whole(op, "value_dim", value_dim)
    if min(b, t, n, h, slots, kv_heads, value_dim) < 1:
        raise ValueError(f"{op}: no axis may be empty, got q {q.shape}, k {k.shape}, v {v.shape}, kv_heads {kv_heads}")
    if n % kv_heads or k.shape != cache_shape(layout, b, slots, kv_heads, h):
        raise ValueError(f"{op}: k {k.shape} does not fit q {q.shape}: {axes} with N a multiple of K = {kv_heads}")
    beside = cache_shape(layout, b, slots, kv_heads, value_dim)
    if v.shape != beside:
        raise ValueError(f"{op}: v must be {axes} beside k = {beside}, got {v.shape}")
    if v.dtype != k.dtype:
        raise ValueError(f"{op}: k is {k.dtype} and v is {v.dtype}: they must be of one type")
    quantized = jnp.dtype(k.dtype) == jnp.int8
    scales = {name: arrays[name] for name in ("k_scale", "v_scale")}
    if any(quantized != (x is not None) for x in scales.values()):
        raise ValueError(f"{op}: int8 keys and values come with k_scale and v_scale, others without; k is {k.dtype}")
    for name, x in scales.items():
        if x is not None and (x.ndim != 3 or x.shape[::2] != (b, slots) or x.shape[1] < kv_heads):
            raise ValueError(f"{op}: {name} must be [B, K or more, S] = {(b, kv_heads, slots)}, got {x.shape}")
    return kv_heads, value_dim


def check_rows(op: str, starts, lengths) -> None:
    """Raise ValueError if a row's start or length is below zero. Waits for the arrays."""
    found = seen(starts) if lengths is None else seen(starts, lengths)
    if found is None:
        return
    starts, lengths = found[0], found[-1]
    if len(found) == 2:
        refuse_row(lengths < 0, lambda r: f"{op}: row {r} has length {lengths[r]}: give 0 for a row that takes no part")
    part = lengths > 0 if len(found) == 2 else np.ones_like(starts, bool)
    refuse_row(
        (starts < 0) & part, lambda r: f"{op}: row {r} starts at {starts[r]}: its first query's position, from 0"
    )


def as_given_to_kernels(arrays: Mapping[str, Any], scale: Any, *integers: str) -> dict[str, Any]:
    """The arrays that implementations get: integers in int32, sinks in f32, and the scale if it is traced."""
    traced = {"scale": scale} if isinstance(scale, jax.core.Tracer) else {}
    return {**arrays, **traced, **{n: as_int32(arrays[n]) for n in integers}, "sinks": sink_logits(arrays["sinks"])}
