"""The static facts of a paged call, the checks of its arguments, and the layouts of pages."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.attention.call import check_arrays, check_softcap, check_whole
from pallas_kernels.layouts import LAYOUTS, Layout, cache_shape, folded_width, slot_axis

# Where a running maximum starts, and a masked logit: so far below it that its weight exp(MASKED - START) is exactly
# zero, also before a query has seen a key.
START, MASKED = -1e30, -2e30
SHAPES = {"folded": "[P, p, C]", "heads_last": "[P, p, K, H]", "heads_first": "[P, K, p, H]"}


@dataclass(frozen=True)
class Call:
    """What a call is before its arrays have values; implementations choose from it."""

    tokens: int  # T, packed queries
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    value_dim: int  # Hv
    rows: int  # R
    width: int  # M, pages a block table row can name
    pages: int  # P
    page: int  # p, tokens a page
    scale_heads: int  # Kp, 0 without scales
    dtype: str
    kv_dtype: str
    layout: Layout
    window: int | None
    softcap: float | None
    sinks: bool
    return_lse: bool
    decode_rows: int
    max_queries: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def capacity(self) -> int:
        """Tokens that a row's block table can name; there are no keys behind them."""
        return self.width * self.page

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's K and V in memory, scales included."""
        width = folded_width if self.layout == "folded" else int.__mul__
        columns = width(self.kv_heads, self.head_dim) + width(self.kv_heads, self.value_dim)
        return jnp.dtype(self.kv_dtype).itemsize * columns + 2 * 4 * self.scale_heads


def known(block_tables, call: Call):
    """Block tables whose every entry names a page of the pool: what no query sees may be any number."""
    return jnp.clip(block_tables, 0, call.pages - 1).astype(jnp.int32)


def page_size(pages, layout: Layout) -> int:
    return pages.shape[slot_axis(layout)]


def check_layout(op: str, layout: Layout, *pools) -> None:
    """Raise ValueError for an unknown layout, or for pages whose rank is not that layout's."""
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if {x.ndim for x in pools} != {3 if layout == "folded" else 4}:
        raise ValueError(
            f"{op}: pages must be {SHAPES[layout]} in layout {layout!r}, "
            f"got {' and '.join(str(x.shape) for x in pools)}"
        )


def check_pages(op: str, k_pages, v_pages, layout: Layout, heads: int, size: int, value_size: int) -> None:
    """Raise ValueError unless the pages hold `heads` heads of these sizes in `layout`."""
    pages, page = k_pages.shape[0], page_size(k_pages, layout)
    for name, x, dim in (("k_pages", k_pages, size), ("v_pages", v_pages, value_size)):
        shape = cache_shape(layout, pages, page, heads, dim)
        if x.shape != shape:
            raise ValueError(
                f"{op}: {name} must be {SHAPES[layout]} = {shape} for {heads} heads of {dim}, got {x.shape}"
            )
    if v_pages.dtype != k_pages.dtype:
        raise ValueError(f"{op}: k_pages are {k_pages.dtype} and v_pages {v_pages.dtype}: they must be of one type")


def check_scales(op: str, k_pages, k_scale, v_scale, layout: Layout, heads: int) -> None:
    """Raise ValueError unless there are scales exactly where the pages are int8, and they fit."""
    if (k_scale is None) != (v_scale is None):
        raise ValueError(f"{op}: k_scale and v_scale go together")
    if (k_scale is not None) != (k_pages.dtype == jnp.int8):
        raise ValueError(f"{op}: int8 pages need k_scale and v_scale, others take none; pages are {k_pages.dtype}")
    if k_scale is None:
        return
    size = page_size(k_pages, layout)
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        fits = x.ndim == 3 and x.shape[0] == k_pages.shape[0] and x.shape[1] >= heads and x.shape[2] == size
        if not fits:
            raise ValueError(
                f"{op}: {name} must be [P, Kp, p] = ({k_pages.shape[0]}, at least {heads}, {size}), got {x.shape}"
            )


def heads_of(op: str, pages, layout: Layout, kv_heads: int | None) -> int:
    """How many heads pages hold: read from their shape, or told for folded ones."""
    stored = None if layout == "folded" else pages.shape[2 if layout == "heads_last" else 1]
    if stored is None and kv_heads is None:
        raise ValueError(f"{op}: folded pages do not say how many heads they hold: give kv_heads")
    if stored is not None and kv_heads not in (None, stored):
        raise ValueError(f"{op}: kv_heads is {kv_heads}, but the pages {pages.shape} hold {stored}")
    return stored or kv_heads


def make_call(
    q,
    k_pages,
    v_pages,
    *,
    block_tables,
    lengths,
    query_starts,
    window,
    softcap,
    sinks,
    k_scale,
    v_scale,
    layout,
    kv_heads,
    value_dim,
    return_lse,
    decode_rows,
    max_queries,
) -> Call:
    """Check the arguments of `api.paged_attention` and gather their static facts. Raises ValueError."""
    op = "paged_attention"
    check_arrays(
        op,
        q,
        {"k_pages": k_pages, "v_pages": v_pages},
        {"block_tables": block_tables, "lengths": lengths, "query_starts": query_starts},
        {"sinks": sinks, "k_scale": k_scale, "v_scale": v_scale},
    )
    given = {
        "kv_heads": kv_heads,
        "value_dim": value_dim,
        "max_queries": max_queries,
        "window": window,
        "decode_rows": decode_rows,
    }
    for name, x in given.items():
        if x is not None or name == "decode_rows":
            check_whole(op, name, x)
    check_layout(op, layout, k_pages, v_pages)
    if q.ndim != 3:
        raise ValueError(f"{op}: q must be [T, N, H], got {q.shape}")
    if min(*q.shape, *k_pages.shape, *v_pages.shape, *block_tables.shape) < 1:
        raise ValueError(
            f"{op}: no axis may be empty, got q {q.shape}, k_pages {k_pages.shape}, "
            f"v_pages {v_pages.shape}, block_tables {block_tables.shape}"
        )
    tokens, heads, size = q.shape
    kv_heads = heads_of(op, k_pages, layout, kv_heads)
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads are no multiple of {kv_heads} KV heads")
    value_dim = value_dim if value_dim is not None else (size if layout == "folded" else v_pages.shape[-1])
    check_pages(op, k_pages, v_pages, layout, kv_heads, size, value_dim)
    page = page_size(k_pages, layout)
    check_scales(op, k_pages, k_scale, v_scale, layout, kv_heads)
    rows = lengths.shape[0] if lengths.ndim == 1 else -1
    if rows < 1 or block_tables.ndim != 2 or block_tables.shape[0] != rows or query_starts.shape != (rows + 1,):
        raise ValueError(
            f"{op}: block_tables [R, M], lengths [R] and query_starts [R+1] must agree, "
            f"got {block_tables.shape}, {lengths.shape}, {query_starts.shape}"
        )
    if not 0 <= decode_rows <= rows:
        raise ValueError(f"{op}: decode_rows must be 0 to R = {rows}, got {decode_rows}")
    if max_queries is not None and max_queries < 1:
        raise ValueError(f"{op}: max_queries must be at least 1, got {max_queries}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"{op}: sinks must be [N] = {(heads,)}, got {sinks.shape}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window must be at least 1, got {window}")
    check_softcap(op, softcap)
    most = min(max_queries or tokens, tokens)
    return Call(
        tokens,
        heads,
        kv_heads,
        size,
        value_dim,
        rows,
        block_tables.shape[1],
        k_pages.shape[0],
        page,
        0 if k_scale is None else k_scale.shape[1],
        str(q.dtype),
        str(k_pages.dtype),
        layout,
        window,
        softcap,
        sinks is not None,
        return_lse,
        rows if most == 1 else decode_rows,
        most,
    )
