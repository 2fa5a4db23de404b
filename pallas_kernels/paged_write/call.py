"""The static facts of a page write, and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import check_array, seen
from pallas_kernels.layouts import Layout
from pallas_kernels.paged_attention.call import check_layout, check_pages, check_scales, page_size


@dataclass(frozen=True)
class Call:
    """The static facts of one page write."""

    tokens: int  # T
    kv_heads: int  # K
    head_dim: int  # H
    value_dim: int  # Hv
    pages: int  # P
    page: int  # p
    scale_heads: int  # Kp, 0 without scales
    dtype: str  # of the pages
    layout: Layout

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the arrays written to, in the order of the results."""
        return ("k_pages", "v_pages", "k_scale", "v_scale") if self.scale_heads else ("k_pages", "v_pages")

    @property
    def new(self) -> tuple[str, ...]:
        """Names of the new values for each of the `pools`."""
        return ("k", "v", "new_k_scale", "new_v_scale") if self.scale_heads else ("k", "v")


def make_call(arrays: Mapping[str, Any], layout: Layout) -> Call:
    """Check the arguments of `api.write_pages` and gather the static facts. Raises ValueError."""
    op = "write_pages"
    k_pages, v_pages, k, v, slots = (arrays[name] for name in ("k_pages", "v_pages", "k", "v", "slots"))
    for name in ("k_pages", "v_pages", "k", "v"):
        check_array(op, name, arrays[name], "floating", "int8")
    check_array(op, "slots", slots, "integer")
    check_layout(op, layout, k_pages, v_pages)
    if k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"{op}: k must be [T, K, H] and v [T, K, Hv], got {k.shape} and {v.shape}")
    tokens, heads, size = k.shape
    check_pages(op, k_pages, v_pages, layout, heads, size, v.shape[2])
    check_scales(op, k_pages, arrays["k_scale"], arrays["v_scale"], layout, heads)
    if slots.shape != (tokens,):
        raise ValueError(f"{op}: slots must be [T] = {(tokens,)}, got {slots.shape}")
    int8 = k_pages.dtype == jnp.int8
    if int8 != (k.dtype == jnp.int8) or v.dtype != k.dtype:
        raise ValueError(
            f"{op}: int8 pages take int8 k and v (see quantize_kv), others none; "
            f"got {k.dtype} and {v.dtype} for {k_pages.dtype} pages"
        )
    for name in ("new_k_scale", "new_v_scale"):
        x = arrays[name]
        if (x is not None) != int8 or (int8 and x.shape != (tokens, heads)):
            raise ValueError(f"{op}: {name} must be [T, K] = {(tokens, heads)} for int8 pages, None for others")
    page = page_size(k_pages, layout)
    scale_heads = arrays["k_scale"].shape[1] if int8 else 0
    return Call(tokens, heads, size, v.shape[2], k_pages.shape[0], page, scale_heads, str(k_pages.dtype), layout)


def check_slots(end: int, slots) -> None:
    """Raise ValueError if two tokens have the same slot below `end`. Waits for the array."""
    if (found := seen(slots)) is None:
        return
    kept = found[0][(found[0] >= 0) & (found[0] < end)]
    slot, count = np.unique(kept, return_counts=True)
    if (twice := slot[count > 1]).size:
        raise ValueError(
            f"write_pages: slots must be distinct, and two tokens are for slot {twice[0]}: give -1 to drop one"
        )
