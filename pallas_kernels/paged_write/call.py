"""The static facts of a page write, and the checks of its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.attention.call import check_array
from pallas_kernels.layouts import Layout
from pallas_kernels.paged_attention.call import check_layout, check_pages, check_scales, page_size


@dataclass(frozen=True)
class Call:
    """What implementations choose from."""

    tokens: int  # T
    kv_heads: int  # K
    head_dim: int  # H
    value_dim: int  # Hv
    pages: int  # P
    page: int  # p
    scale_heads: int  # Kp, 0 without scales
    dtype: str  # of the pages
    layout: Layout


def make_call(k_pages, v_pages, k, v, slots, layout: Layout, pool_scales, new_scales) -> Call:
    """Check the arguments of `api.write_pages` and gather their static facts. Raises ValueError."""
    op = "write_pages"
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages), ("k", k), ("v", v)):
        check_array(op, name, x, "floating", "int8")
    check_array(op, "slots", slots, "integer")
    check_layout(op, layout, k_pages, v_pages)
    if k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"{op}: k must be [T, K, H] and v [T, K, Hv], got {k.shape} and {v.shape}")
    tokens, heads, size = k.shape
    check_pages(op, k_pages, v_pages, layout, heads, size, v.shape[2])
    check_scales(op, k_pages, *pool_scales, layout, heads)
    if slots.shape != (tokens,):
        raise ValueError(f"{op}: slots must be [T] = {(tokens,)}, got {slots.shape}")
    int8 = k_pages.dtype == jnp.int8
    if int8 != (k.dtype == jnp.int8) or v.dtype != k.dtype:
        raise ValueError(
            f"{op}: int8 pages take int8 k and v (see quantize_kv), others none; "
            f"got {k.dtype} and {v.dtype} for {k_pages.dtype} pages"
        )
    for name, x in zip(("new_k_scale", "new_v_scale"), new_scales, strict=True):
        if (x is not None) != int8 or (int8 and x.shape != (tokens, heads)):
            raise ValueError(f"{op}: {name} must be [T, K] = {(tokens, heads)} for int8 pages, None for others")
    page = page_size(k_pages, layout)
    scale_heads = pool_scales[0].shape[1] if int8 else 0
    return Call(tokens, heads, size, v.shape[2], k_pages.shape[0], page, scale_heads, str(k_pages.dtype), layout)
