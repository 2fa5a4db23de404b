"""The static facts of a paged call, the checks of its arguments, and the layouts of pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import check_whole, refuse_row, seen
from pallas_kernels.attention.call import check_arrays, check_softcap, plain_scale
from pallas_kernels.layouts import LAYOUTS, Layout, cache_shape, folded_width, slot_axis

SHAPES = {"folded": "[P, p, C]", "heads_last": "[P, p, K, H]", "heads_first": "[P, K, p, H]"}


@dataclass(frozen=True)
class Call:
    """The static facts of one call. An implementation's `supported` and `heuristic` decide by them."""

    tokens: int  # T, packed queries
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    value_dim: int  # Hv
    rows: int  # R
    width: int  # M, pages of a block table's row
    pages: int  # P
    page: int  # p, tokens per page
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
    decode_queries: int = 1
    scale: float | None = 1.0  # None: traced, and among the arrays

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def single_rows(self) -> int:
        """The first rows that own at most one query each. A kernel that computes only those apart sees no others."""
        return self.decode_rows if self.decode_queries == 1 else 0

    @property
    def capacity(self) -> int:
        """Tokens that a row's block table can address; there are no keys past them."""
        return self.width * self.page

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's K and V, scales included."""
        width = folded_width if self.layout == "folded" else int.__mul__
        columns = width(self.kv_heads, self.head_dim) + width(self.kv_heads, self.value_dim)
        return jnp.dtype(self.kv_dtype).itemsize * columns + 2 * 4 * self.scale_heads


def known(block_tables, call: Call):
    """Block tables clipped to pages of the pool: entries that no query sees may be any number."""
    return jnp.clip(block_tables, 0, call.pages - 1).astype(jnp.int32)


def page_size(pages, layout: Layout) -> int:
    return pages.shape[slot_axis(layout)]


def check_layout(op: str, layout: Layout, *pools) -> None:
    """Raise ValueError for an unknown layout, or for pages of another rank."""
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
    """Raise ValueError unless int8 pages have scales that fit, and other pages have none."""
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
    """The number of KV heads, from the pages' shape; for folded pages, `kv_heads`."""
    stored = None if layout == "folded" else pages.shape[2 if layout == "heads_last" else 1]
    if stored is None and kv_heads is None:
        raise ValueError(f"{op}: folded pages do not say how many heads they hold: give kv_heads")
    if stored is not None and kv_heads not in (None, stored):
        raise ValueError(f"{op}: kv_heads is {kv_heads}, but the pages {pages.shape} hold {stored}")
    return stored or kv_heads


def make_call(
    arrays: Mapping[str, Any],
    *,
    scale: float,
    layout: Layout,
    window: int | None = None,
    softcap: float | None = None,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    return_lse: bool = False,
    decode_rows: int = 0,
    decode_queries: int = 1,
    max_queries: int | None = None,
) -> Call:
    """Check the arguments of `api.paged_attention` and gather the static facts.

    Args:
      arrays: by name: q, k_pages, v_pages, block_tables, lengths, query_starts, sinks, k_scale, v_scale. The last
        three may be None or absent.

    Raises:
      ValueError: an argument does not fit; the message names it and says what it should be.
    """
    op, stored, integers = "paged_attention", ("k_pages", "v_pages"), ("block_tables", "lengths", "query_starts")
    arrays = dict.fromkeys(("sinks", "k_scale", "v_scale")) | dict(arrays)
    check_arrays(op, arrays, stored, integers)
    given = {
        "kv_heads": kv_heads,
        "value_dim": value_dim,
        "max_queries": max_queries,
        "window": window,
        "decode_rows": decode_rows,
        "decode_queries": decode_queries,
    }
    for name, x in given.items():
        if x is not None or name.startswith("decode"):
            check_whole(op, name, x)
    kv_heads, value_dim = _check_pools(op, arrays, layout, kv_heads, value_dim)
    q, k_pages, sinks, k_scale = (arrays[name] for name in ("q", "k_pages", "sinks", "k_scale"))
    tokens, heads, size = q.shape
    rows = _check_rows(op, *(arrays[name] for name in integers))
    if not 0 <= decode_rows <= rows:
        raise ValueError(f"{op}: decode_rows must be 0 to R = {rows}, got {decode_rows}")
    for name, count in (("max_queries", max_queries), ("decode_queries", decode_queries)):
        if count is not None and count < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {count}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"{op}: sinks must be [N] = {(heads,)}, got {sinks.shape}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window must be at least 1, got {window}")
    check_softcap(op, softcap)
    most = min(max_queries or tokens, tokens)
    return Call(
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        value_dim=value_dim,
        rows=rows,
        width=arrays["block_tables"].shape[1],
        pages=k_pages.shape[0],
        page=page_size(k_pages, layout),
        scale_heads=0 if k_scale is None else k_scale.shape[1],
        dtype=str(q.dtype),
        kv_dtype=str(k_pages.dtype),
        layout=layout,
        window=window,
        softcap=softcap,
        sinks=sinks is not None,
        return_lse=return_lse,
        decode_rows=rows if most <= decode_queries else decode_rows,
        max_queries=most,
        decode_queries=min(decode_queries, most),
        scale=plain_scale(op, scale),
    )


def _check_pools(op: str, arrays: Mapping[str, Any], layout: Layout, kv_heads, value_dim) -> tuple[int, int]:
    """Check that pages and scales fit q; return the KV heads and the head size of V."""
    q, k_pages, v_pages, block_tables = (arrays[name] for name in ("q", "k_pages", "v_pages", "block_tables"))
    check_layout(op, layout, k_pages, v_pages)
    if q.ndim != 3:
        raise ValueError(f"{op}: q must be [T, N, H], got {q.shape}")
    if min(*q.shape, *k_pages.shape, *v_pages.shape, *block_tables.shape) < 1:
        raise ValueError(
            f"{op}: no axis may be empty, got q {q.shape}, k_pages {k_pages.shape}, "
            f"v_pages {v_pages.shape}, block_tables {block_tables.shape}"
        )
    _, heads, size = q.shape
    kv_heads = heads_of(op, k_pages, layout, kv_heads)
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads are no multiple of {kv_heads} KV heads")
    value_dim = value_dim if value_dim is not None else (size if layout == "folded" else v_pages.shape[-1])
    check_pages(op, k_pages, v_pages, layout, kv_heads, size, value_dim)
    check_scales(op, k_pages, arrays["k_scale"], arrays["v_scale"], layout, kv_heads)
    return kv_heads, value_dim


def _check_rows(op: str, block_tables, lengths, query_starts) -> int:
    """Check that the rows' arrays agree; return the number of rows."""
    rows = lengths.shape[0] if lengths.ndim == 1 else -1
    if rows < 1 or block_tables.ndim != 2 or block_tables.shape[0] != rows or query_starts.shape != (rows + 1,):
        raise ValueError(
            f"{op}: block_tables [R, M], lengths [R] and query_starts [R+1] must agree, "
            f"got {block_tables.shape}, {lengths.shape}, {query_starts.shape}"
        )
    return rows


def check_packed(call: Call, block_tables, lengths, query_starts) -> None:
    """Raise ValueError for impossible rows: out of order, longer than their table, on a page outside of the pool.

    Waits for the arrays.
    """
    op = "paged_attention"
    if (found := seen(query_starts)) is not None:
        (starts,) = found
        if starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] > call.tokens:
            raise ValueError(
                f"{op}: query_starts must begin with 0, never fall and end at T = {call.tokens} or "
                f"before, got {_some(starts)}"
            )
        most = np.full(call.rows, call.max_queries)
        most[: call.decode_rows] = call.decode_queries
        refuse_row(
            np.diff(starts) > most,
            lambda r: (
                f"{op}: row {r} owns {np.diff(starts)[r]} queries, and "
                f"decode_rows, decode_queries or max_queries promise at most {most[r]}"
            ),
        )
    if (found := seen(lengths)) is not None:
        (held,) = found
        refuse_row(held < 0, lambda r: f"{op}: row {r} has length {held[r]}: give 0 for a row that takes no part")
        refuse_row(
            held > call.capacity,
            lambda r: (
                f"{op}: row {r} holds {held[r]} tokens, and its block table names {call.width} pages of "
                f"{call.page}: give it more"
            ),
        )
    if (found := seen(lengths, query_starts)) is not None:
        held, asked = found[0], np.diff(found[1])
        refuse_row(
            (held > 0) & (asked > held),
            lambda r: (
                f"{op}: row {r} has {asked[r]} queries and only {held[r]} tokens: lengths count this step's tokens too"
            ),
        )
    if (found := seen(block_tables, lengths, query_starts)) is not None:
        tables, held, asked = found[0], found[1], np.diff(found[2])
        place = np.arange(call.width)
        first = np.zeros_like(held) if call.window is None else np.maximum(held - asked - call.window + 1, 0)
        read = (asked > 0) & (held > 0)
        read = read[:, None] & (place >= (first // call.page)[:, None]) & (place <= ((held - 1) // call.page)[:, None])
        outside = read & ((tables < 0) | (tables >= call.pages))
        refuse_row(
            outside.any(1),
            lambda r: (
                f"{op}: row {r} reads page {tables[r, outside[r].argmax()]} by its block "
                f"table, and the pool has {call.pages}"
            ),
        )


def _some(x: np.ndarray) -> str:
    """The first few numbers, for a message."""
    return f"{x[:8].tolist()}{' ...' if len(x) > 8 else ''}"
