"""The paged KV-cache: fixed-size pages that block tables assign to requests. Kwon et al. 2023 (PagedAttention).

Layers with the same window form a page group, with its own pool of pages and its own block table, since a window layer
can free pages that a full layer must keep. The host knows which page belongs to which request; the cache holds pages
and no lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from pallas_kernels.hardware import platform_of
from pallas_kernels.layouts import Layout
from pdx.arguments import integer
from pdx.cache.given import check_cache, whole_numbers
from pdx.cache.layer import LayerCache, cache_dtype, default_layout, layer_specs, zeros
from pdx.cache.rows import PackedRows
from pdx.config import ModelConfig
from pdx.errors import RequestError
from pdx.meshes import as_mesh, on_own_mesh
from pdx.sharding import constrain, is_spec

# Tokens per page. On a TPU a DMA moves whole tiles, and a page's int8 scales fill lanes, one token each.
PAGE_SIZES: dict[Layout, int] = {"folded": 128, "heads_last": 64, "heads_first": 64}


def page_groups(cfg: ModelConfig) -> tuple[int | None, ...]:
    """The page groups of a model: its distinct windows, in the order of its layers. None: the whole context.

    Example:
      >>> import dataclasses
      >>> pdx.page_groups(cfg)
      (None,)
      >>> pdx.page_groups(dataclasses.replace(cfg, windows=(128, None)))
      (128, None)
    """
    return tuple(dict.fromkeys(cfg.windows))


@struct.dataclass
class PagedCache:
    """The pages of every layer. Layers of one page group have the same number of pages and share a block table.

    Example:
      >>> cache = pdx.init_paged_cache(cfg, pages=4, page_size=64)
      >>> cache.page_size, cache.pages, cache.page_bytes  # 2 layers x 2 x 64 tokens x 2 heads of 8 x 4 bytes
      (64, (4,), (16384,))
    """

    layers: tuple[LayerCache, ...]
    groups: tuple[int | None, ...] = struct.field(pytree_node=False)
    group_of_layer: tuple[int, ...] = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    ROWS: ClassVar = PackedRows  # what describes the tokens of a call

    @property
    def page_size(self) -> int:
        return self.layers[0].slots

    @property
    def pages(self) -> tuple[int, ...]:
        """Number of pages of each page group."""
        return tuple(self.layers[self.group_of_layer.index(g)].k.shape[0] for g in range(len(self.groups)))

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """Bytes of one page of each page group, summed over its layers and over all devices."""
        found = [0] * len(self.groups)
        for layer, group in zip(self.layers, self.group_of_layer, strict=True):
            for spec in jax.tree.leaves(layer.specs(), is_leaf=is_spec):
                found[group] += spec.held_bytes(self.mesh) // spec.shape[0]
        return tuple(found)

    def rows(self, new_lengths, batch: int, tokens: int) -> PackedRows:
        """Raises ValueError: the number of new tokens does not say to which pages they belong."""
        raise ValueError(
            f"over a paged cache tokens [{batch}, {tokens}] must be packed, [1, T], and come with rows: "
            "PackedRows.packed(T, block_tables, held_lengths, query_starts)"
        )

    def layer_rows(self, rows: PackedRows) -> list[PackedRows]:
        """The rows as each layer sees them: with the block table of its page group."""
        groups = [rows.of_group(g) for g in range(len(self.groups))]
        return [groups[g] for g in self.group_of_layer]

    def first_layers(self, count: int) -> PagedCache:
        """The pages of the first `count` layers."""
        return replace(self, layers=self.layers[:count], group_of_layer=self.group_of_layer[:count])

    def with_first(self, first: PagedCache) -> PagedCache:
        """The cache with the pages of `first`, the cache of its first layers."""
        return replace(self, layers=(*first.layers, *self.layers[len(first.layers) :]))

    def last_layer(self) -> PagedCache:
        """The pages of the last layer."""
        return replace(self, layers=self.layers[-1:], group_of_layer=self.group_of_layer[-1:])

    def with_last(self, last: PagedCache) -> PagedCache:
        """The cache with the pages of `last`, the cache of its last layer."""
        return replace(self, layers=(*self.layers[:-1], *last.layers))

    def advance(self, rows: PackedRows, layers: tuple[LayerCache, ...]) -> PagedCache:
        """The cache with `layers`, to which the tokens of `rows` were appended."""
        return replace(self, layers=layers).placed()

    def placed(self) -> PagedCache:
        """The cache constrained to its placement on the mesh. A jitted function must return it so."""
        if self.mesh is None:
            return self
        specs = replace(self, layers=tuple(layer.specs() for layer in self.layers))
        return jax.tree.map(lambda s, x: constrain(x, s, self.mesh), specs, self, is_leaf=is_spec)


def paged_cache_specs(
    cfg: ModelConfig,
    pages: int | Sequence[int],
    *,
    page_size: int | None = None,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
) -> PagedCache:
    """Declare the cache: a `PagedCache` whose leaves are `ArraySpec`s. See `init_paged_cache`."""
    if not isinstance(cfg, ModelConfig):
        raise RequestError(f"cfg is {type(cfg).__name__}: it must be a ModelConfig, such as the config of a model")
    groups, layout, dtype = page_groups(cfg), layout or default_layout(), cache_dtype(dtype)
    many = isinstance(pages, Sequence) or getattr(pages, "ndim", 0) == 1
    counts = tuple(integer("pages", p) for p in (cast(Any, pages) if many else (pages,) * len(groups)))
    page_size = PAGE_SIZES[layout] if page_size is None else integer("page_size", page_size)
    if len(counts) != len(groups) or min(counts) < 1 or page_size < 1:
        raise ValueError(
            f"pages {pages} of {page_size} tokens: a number of at least 1 for each of the page groups "
            f"{groups} is needed (windows; None: whole contexts)"
        )
    mesh = as_mesh(mesh)
    if mesh is not None and mesh.shape["data"] > 1:
        raise RequestError(
            f"a paged cache lies on one replica, but the mesh has data={mesh.shape['data']}: packed "
            "tokens cannot be dealt out by rows; use data=1, and an engine for each replica"
        )
    of_layer = tuple(groups.index(w) for w in cfg.windows)
    layers = [layer_specs(cfg, counts[g], page_size, "pages", dtype=dtype, mesh=mesh, layout=layout) for g in of_layer]
    return PagedCache(tuple(layers), groups, of_layer, mesh)


@on_own_mesh
def init_paged_cache(
    cfg: ModelConfig,
    pages: int | Sequence[int],
    *,
    page_size: int | None = None,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
) -> PagedCache:
    """An empty paged cache.

    Args:
      pages: how many pages: one number for all page groups (see `page_groups`), or one per group.
      page_size: tokens per page; None: what suits the layout.
      dtype, layout, mesh: as in `init_cache`, but rows cannot be sharded over `data`.

    Raises:
      ValueError: not a number of pages for each group; RequestError: a mesh with more than one replica.

    Example:
      >>> cache = pdx.init_paged_cache(cfg, pages=4)
      >>> cache.pages, len(cache.layers)
      ((4,), 2)
    """
    specs = paged_cache_specs(cfg, pages, page_size=page_size, dtype=dtype, mesh=mesh, layout=layout)
    return zeros(specs, specs.mesh)


def copy_pages(cache: PagedCache, group: int, src: Int[Array, " n"], dst: Int[Array, " n"]) -> PagedCache:
    """Copy pages `src` of a page group over pages `dst`, in all its layers (copy on write).

    The cache is donated. Where `dst` is -1, nothing is copied. All sources are read before any page is written.

    Raises:
      RequestError: no such group, or pages that are no whole numbers [n]; DonatedError: a cache that is used up.

    Example, a request that shares page 0 and writes to its own copy, page 3:
      >>> cache = pdx.init_paged_cache(cfg, pages=4)
      >>> cache = pdx.copy_pages(cache, 0, jnp.array([0]), jnp.array([3]))
    """
    check_cache(cache, PagedCache)
    group = integer("group", group, 0, len(cache.groups) - 1)
    src = whole_numbers("src", src, (None,), "[n]")
    return _copy_pages(cache, group, src, whole_numbers("dst", dst, src.shape, "[n], as src"))


@partial(jax.jit, static_argnames="group", donate_argnames="cache")
def _copy_pages(cache, group, src, dst):
    layers = [
        jax.tree.map(lambda x: _copied(x, src, dst), layer) if g == group else layer
        for layer, g in zip(cache.layers, cache.group_of_layer, strict=True)
    ]
    return cache.replace(layers=tuple(layers)).placed()


# Of the jitted program, for those that compile it themselves.
cast(Any, copy_pages).lower, cast(Any, copy_pages).program = _copy_pages.lower, _copy_pages


def _copied(x: Array, src: Int[Array, " n"], dst: Int[Array, " n"]) -> Array:
    count, n = x.shape[0], src.shape[0]
    real, of = (dst >= 0) & (dst < count), jnp.clip(src, 0, count - 1)
    if platform_of() != "tpu":
        return x.at[jnp.where(real, dst, count)].set(x[of], mode="drop")
    # For a scatter a TPU changes the layout of a whole int8 pool. It does not for page-wise updates, provided that all
    # reads come before all writes. A skipped copy (-1) writes a page over itself, so it must precede the real ones.
    order = jnp.argsort(real, stable=True)
    dst, src = jnp.where(real, dst, 0)[order], jnp.where(real, of, 0)[order]
    x, sources = lax.optimization_barrier((x, [lax.dynamic_index_in_dim(x, src[i]) for i in range(n)]))
    for i, page in enumerate(sources):
        x = lax.dynamic_update_index_in_dim(x, page, dst[i], 0)
    return x
