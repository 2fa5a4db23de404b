"""What the attention ops are called with: the static facts of a call, and the checks that they share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def check_array(op: str, name: str, x: Any, *kinds: str) -> None:
    """Raise ValueError unless `x` is an array, or stands for one, of one of these kinds of jax.numpy's types."""
    wanted = f"{op}: {name} must be an array of {' or '.join(kinds)} type, got"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{wanted} {type(x).__name__}" + (": give jnp.asarray of it" if isinstance(x, list) else ""))
    if not any(jnp.issubdtype(x.dtype, getattr(jnp, kind)) for kind in kinds):
        raise ValueError(f"{wanted} {x.dtype}")


def check_arrays(op: str, q: Any, stored: dict[str, Any], integers: dict[str, Any], optional: dict[str, Any]) -> None:
    """Raise ValueError unless queries, keys and values are arrays of types that attention takes, and so the others.

    Args:
      stored, integers: by name, K and V, and what says where things are.
      optional: by name, those that may be None: the mask `tree`, and floating ones.
    """
    check_array(op, "q", q, "floating")
    for name, x in stored.items():
        check_array(op, name, x, "floating", "int8")
    for name, x in integers.items():
        check_array(op, name, x, "integer")
    for name, x in optional.items():
        if x is not None:
            check_array(op, name, x, "bool" if name == "tree" else "floating")


def check_whole(op: str, name: str, x: Any) -> None:
    """Raise ValueError unless a static argument is an int: a float would fail inside of a loop."""
    if not isinstance(x, int | np.integer) or isinstance(x, bool):
        raise ValueError(f"{op}: {name} must be a whole number, got {x!r}")


def check_scale(op: str, scale: Any) -> None:
    """Raise ValueError unless the logits can be multiplied by `scale`."""
    number = isinstance(scale, int | float | np.generic)
    if not (number and math.isfinite(scale)) and not isinstance(scale, jax.Array | np.ndarray):
        raise ValueError(f"{op}: scale must be a finite number, such as head_dim ** -0.5, got {scale!r}")


def check_softcap(op: str, softcap: Any) -> None:
    """Raise ValueError unless the cap bounds something: an infinite one would give NaN, not uncapped logits."""
    if softcap is not None and not (isinstance(softcap, int | float | np.generic) and 0 < softcap < math.inf):
        raise ValueError(f"{op}: softcap must be positive and finite, or None for no cap; got {softcap!r}")


def describe(
    op: str,
    q,
    k,
    v,
    *,
    starts,
    lengths,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks,
    k_scale,
    v_scale,
    tree,
    layout: Layout,
    kv_heads: int | None,
    value_dim: int | None,
    return_lse: bool,
) -> Call:
    """The `Call` that these arguments make. Raises ValueError naming the argument and what it should be."""

    def expect(name: str, x: Any, shape: tuple[int, ...], axes: str):
        if x is not None and x.shape != shape:
            raise ValueError(f"{op}: {name} must be {axes} = {shape}, got {x.shape}")

    held = {"starts": starts} if lengths is None else {"starts": starts, "lengths": lengths}
    check_arrays(op, q, {"k": k, "v": v}, held, {"sinks": sinks, "k_scale": k_scale, "v_scale": v_scale, "tree": tree})
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
    if window is not None:
        check_whole(op, "window", window)
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"{op}: window must be at least 1 and causal, got window {window}, causal {causal}")
    if tree is not None and not causal:
        raise ValueError(f"{op}: a tree says what a causal query sees of its own chunk; causal is False")
    check_softcap(op, softcap)
    return Call(
        op,
        b,
        t,
        n,
        kv_heads,
        h,
        value_dim,
        slots,
        str(q.dtype),
        str(k.dtype),
        layout,
        causal,
        window,
        softcap,
        sinks is not None,
        tree is not None,
        lengths is not None,
        return_lse,
    )
