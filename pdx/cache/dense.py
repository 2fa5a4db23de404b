"""The dense KV-cache: a row of slots for each request, a pytree that is passed in and returned.

A layer with a window keeps only its window, as a ring: slot = position mod slots. Full layers are the
same ring that never wraps. How keys and values lie in memory is the device's matter
(`pallas_kernels.layouts`): what its attention reads without a copy.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pallas_kernels import quantize_kv, write_pages
from pallas_kernels.layouts import SUBLANES, Layout, cache_shape, folded_width, slot_axis
from pdx.arguments import integer
from pdx.cache.given import as_new_lengths, check_alive, whole_numbers
from pdx.cache.rows import PackedRows, TokenRows
from pdx.config import ModelConfig
from pdx.errors import ContextLengthError, RequestError
from pdx.meshes import as_mesh, on_own_mesh
from pdx.shapes import DEFAULT_CHUNK, SLOT_MULTIPLE, layer_slots, round_up
from pdx.sharding import ArraySpec, constrain, is_spec, mesh_axis, row_spec

CACHE_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16, "int8": jnp.int8}


@struct.dataclass
class LayerCache:
    """Keys and values of one layer, as they lie in memory: in `layout`, `kv_heads` heads in all (see `stored_heads`).

    The first axis, `row_axis`, is the batch of a dense cache or the pages of a paged one: a row of a dense cache is a
    page of its slots. In int8 each token and head has a scale, [B, Kp, S], that attention multiplies its logits and
    probabilities with: nothing is dequantized in memory.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None
    layout: Layout = struct.field(pytree_node=False, default="heads_first")
    kv_heads: int = struct.field(pytree_node=False, default=1)
    row_axis: Literal["batch", "pages"] = struct.field(pytree_node=False, default="batch")

    @property
    def slots(self) -> int:
        """Tokens of a row, or of a page."""
        return self.k.shape[slot_axis(self.layout)]

    @property
    def scales(self) -> dict[str, Array]:
        """The scales of int8 keys and values as the attention ops take them; else nothing."""
        return {} if self.k_scale is None else {"k_scale": self.k_scale, "v_scale": self.v_scale}

    def specs(self) -> LayerCache:
        """What the leaves are, as declared."""
        found = {
            n: _spec(x.shape, x.dtype, self.layout, self.kv_heads, self.row_axis)
            for n, x in (("k", self.k), ("v", self.v))
        }
        found |= {name: _scale_spec(x.shape, self.kv_heads, self.row_axis) for name, x in self.scales.items()}
        return self.replace(**found)

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        rows: TokenRows | PackedRows,
        implementation: str = "auto",
        interpret: bool = False,
    ) -> LayerCache:
        """Write the tokens of a call where `rows` says they belong; padding costs no write.

        On a mesh this is called on each device's own heads (`layers.attention`). `implementation`: see
        `pallas_kernels.write_pages`.
        """
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        scales = {}
        if self.scales:
            (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
            scales = self.scales | {"new_k_scale": k_scale, "new_v_scale": v_scale}
        written = write_pages(
            self.k,
            self.v,
            k.astype(self.k.dtype),
            v.astype(self.v.dtype),
            slots=rows.slots(self.slots),
            layout=self.layout,
            **scales,
            implementation=implementation,
            interpret=interpret,
        )
        return self.replace(**dict(zip(("k", "v", *self.scales), written, strict=True)))


@struct.dataclass
class DenseCache:
    """The cache of B requests: a list of layers, the tokens each row holds, and what never changes.

    `written` is the longest that a row has been since it was empty: what a ring has overwritten
    depends on that, and `truncate` needs to know.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " B"]
    written: Int[Array, " B"]
    capacity: int = struct.field(pytree_node=False)
    chunk: int = struct.field(pytree_node=False)
    windows: tuple[int | None, ...] = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    ROWS: ClassVar = TokenRows  # what says whose the tokens of a call are

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    def rows(self, new_lengths: Int[Array, " B"] | None, batch: int, tokens: int) -> TokenRows:
        """Whose the tokens [B, T] = [batch, tokens] of a call are, of which each row's first `new_lengths` are real.

        Raises:
          ValueError: more tokens than the cache takes at once.
          RequestError: `new_lengths` of another shape or type.
        """
        if tokens > self.chunk:
            raise ValueError(
                f"a chunk of {tokens} tokens is more than this cache takes at once, {self.chunk}: "
                f"send smaller chunks, or init_cache(..., chunk={tokens})"
            )
        rows = TokenRows.behind(self.lengths, as_new_lengths(new_lengths, batch, tokens), tokens)
        # A token past the end would overwrite the row's first ones: dropped, it can be truncated away.
        return rows.replace(real=rows.real & (rows.positions < self.capacity))

    def layer_rows(self, rows: TokenRows) -> list[TokenRows]:
        """The rows as each layer sees them."""
        return [rows] * len(self.layers)

    def advance(self, rows: TokenRows, layers: tuple[LayerCache, ...]) -> DenseCache:
        """The cache with `layers`, to which the tokens of `rows` were appended."""
        total = self.lengths + rows.new_lengths
        return self.replace(layers=layers, lengths=total, written=jnp.maximum(self.written, total)).placed()

    def placed(self) -> DenseCache:
        """The cache held to its placement on the mesh, inside a jitted function: how it must be returned."""
        if self.mesh is None:
            return self
        return jax.tree.map(lambda s, x: constrain(x, s, self.mesh), self.specs(), self, is_leaf=is_spec)

    def specs(self) -> DenseCache:
        """What the leaves are, as declared."""
        return self.replace(
            layers=tuple(layer.specs() for layer in self.layers),
            lengths=row_spec(self.lengths),
            written=row_spec(self.written),
        )

    def check_room(self, new_lengths) -> None:
        """Raise ContextLengthError where `new_lengths` [B] more tokens do not fit. Waits for the device."""
        held, new = np.asarray(self.lengths), np.asarray(new_lengths).astype(int)
        full = np.flatnonzero(held + new > self.capacity)
        if full.size:
            row = int(full[0])
            raise ContextLengthError(
                f"row {row} holds {held[row]} tokens and was given {new[row]} more, but the cache has room for "
                f"{self.capacity}: make it larger (init_cache(..., capacity=...)) or send less"
            )

    @on_own_mesh
    def truncate(self, keep_lengths: Int[Array, " B"]) -> DenseCache:
        """Keep the first `keep_lengths` tokens of each row and forget the rest; nothing is moved.

        A row that is shorter already stays as it is; 0 empties a row for the next request. Called with
        arrays that hold values (not under a trace), it raises ContextLengthError where a ring has
        overwritten what the shorter row would need.
        """
        check_alive(self)
        keep = jnp.asarray(whole_numbers("keep_lengths", keep_lengths, self.lengths.shape, "[B]"), jnp.int32)
        kept = jnp.minimum(self.lengths, keep)
        if not any(isinstance(x, jax.core.Tracer) for x in (keep, self.lengths, self.written)):
            self._check_held(np.asarray(kept))
        return self.replace(lengths=kept, written=jnp.where(kept == 0, 0, self.written))

    def _check_held(self, keep_lengths: np.ndarray) -> None:
        written = np.asarray(self.written)
        for layer, window in zip(self.layers, self.windows, strict=True):
            slots = layer.slots
            if window is None or slots >= self.capacity:
                continue
            # The next query, at position n of a row that keeps n, sees from n - window + 1 on.
            needed = np.maximum(keep_lengths - window + 1, 0)
            lost = np.flatnonzero((written - slots > needed) & (keep_lengths > 0))
            if lost.size:
                row = int(lost[0])
                raise ContextLengthError(
                    f"row {row} was {written[row]} tokens long and cannot go back to {keep_lengths[row]}: a layer with "
                    f"a window of {window} keeps {slots} positions, so the earliest it can go back to is "
                    f"{written[row] - slots + window - 1}, or 0"
                )


def _spec(shape: tuple[int, ...], dtype, layout: Layout, kv_heads: int, row_axis: str) -> ArraySpec:
    """Keys or values of a layer. In `folded`, heads are dealt out whole, each device's rounded up to whole lanes."""
    axes = {
        "heads_first": (row_axis, "kv_heads", None, None),
        "heads_last": (row_axis, None, "kv_heads", None),
        "folded": (row_axis, None, "kv_heads"),
    }[layout]
    units = (*shape[:2], kv_heads) if layout == "folded" else None
    return ArraySpec(shape, axes, dtype, units=units, init="zeros")


def _scale_spec(shape: tuple[int, ...], kv_heads: int, row_axis: str) -> ArraySpec:
    """Scales of int8 keys or values: dealt out as the heads are, each device's rounded up."""
    units = (shape[0], kv_heads, shape[2])
    return ArraySpec(shape, (row_axis, "kv_heads", None), jnp.float32, units=units, init="zeros")


def stored_heads(cfg: ModelConfig, mesh: Mesh | None) -> int:
    """KV heads that a cache on `mesh` holds.

    Where query heads divide over `model` and KV heads do not, each KV head is stored several times in a row, so that
    every device has a copy of those that its query heads attend to, and no others.
    """
    ways = mesh.shape["model"] if mesh is not None else 1
    return math.lcm(cfg.num_kv_heads, ways) if cfg.num_heads % ways == 0 else cfg.num_kv_heads


def layer_specs(
    cfg: ModelConfig,
    count: int,
    slots: int,
    row_axis: Literal["batch", "pages"],
    *,
    dtype,
    mesh: Mesh | None,
    layout: Layout,
) -> LayerCache:
    """One layer of `count` rows (or pages) of `slots` tokens, as declared: its leaves are `ArraySpec`s."""
    heads = stored_heads(cfg, mesh)
    axis = mesh_axis("kv_heads", heads, mesh) if mesh else None
    shards = mesh.shape[axis] if axis else 1
    shape = cache_shape(layout, count, slots, heads, cfg.head_dim)
    if layout == "folded":
        shape = (*shape[:2], shards * folded_width(heads // shards, cfg.head_dim))
    spec = _spec(shape, dtype, layout, heads, row_axis)
    if jnp.dtype(dtype) != jnp.int8:
        return LayerCache(spec, spec, layout=layout, kv_heads=heads, row_axis=row_axis)
    padded = round_up(heads // shards, SUBLANES) * shards if layout == "folded" else heads
    scale = _scale_spec((count, padded, slots), heads, row_axis)
    return LayerCache(spec, spec, scale, scale, layout, heads, row_axis)


def default_layout(platform: str | None = None) -> Layout:
    """What the attention of a platform (None: JAX's default backend) reads without a copy."""
    return {"tpu": "folded", "gpu": "heads_last"}.get(platform or jax.default_backend(), "heads_first")


def cache_dtype(dtype) -> jnp.dtype:
    """The type of keys and values: one of `CACHE_DTYPES`, by name or as a jax or numpy type. Raises RequestError."""
    with suppress(TypeError):  # what is no type at all
        found = jnp.dtype(CACHE_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
        if dtype is not None and found in map(jnp.dtype, CACHE_DTYPES.values()):
            return found
    raise RequestError(f"dtype {dtype!r} of a cache is not one of {', '.join(CACHE_DTYPES)}")


def cache_specs(
    cfg: ModelConfig,
    batch: int,
    capacity: int,
    *,
    chunk: int = DEFAULT_CHUNK,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
) -> DenseCache:
    """The cache as declared: a `DenseCache` whose leaves are `ArraySpec`s."""
    if not isinstance(cfg, ModelConfig):
        raise RequestError(f"cfg is {type(cfg).__name__}: it must be a ModelConfig, such as the config of a model")
    batch, capacity, chunk = (integer(n, x) for n, x in (("batch", batch), ("capacity", capacity), ("chunk", chunk)))
    dtype = cache_dtype(dtype)
    mesh = as_mesh(mesh)
    if batch < 1 or capacity < 1 or chunk < 1:
        raise RequestError(f"batch {batch}, capacity {capacity} and chunk {chunk} must be at least 1")
    capacity = round_up(capacity, SLOT_MULTIPLE)

    def layer(window):
        slots = layer_slots(window, capacity, chunk)
        return layer_specs(cfg, batch, slots, "batch", dtype=dtype, mesh=mesh, layout=layout or default_layout())

    count, layers = ArraySpec((batch,), ("batch",), jnp.int32, init="zeros"), tuple(layer(w) for w in cfg.windows)
    return DenseCache(layers, count, count, capacity, min(chunk, capacity), cfg.windows, mesh)


@on_own_mesh
def init_cache(
    cfg: ModelConfig,
    batch: int,
    capacity: int,
    *,
    chunk: int = DEFAULT_CHUNK,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
) -> DenseCache:
    """An empty cache for `batch` requests of up to `capacity` tokens (rounded up to a multiple of 128).

    Steps run up to the capacity, be it more than the context that the model was trained for; `generate` and the engine
    hold requests to the context.
    `chunk` is the most tokens one prefill call may append: window layers are laid out for it.
    `dtype` int8: keys and values are quantized as they are appended, a scale for each token and head.
    With a `mesh`, rows go over `data` and KV heads over `model`; see `pdx.meshes.as_mesh` for what is one. `layout`:
    how it lies in memory; None: as this device's attention reads it best.

    Raises:
      RequestError: a number below 1, what is no mesh, or a dtype that is not f32, bf16, f16 or int8.
    """
    specs = cache_specs(cfg, batch, capacity, chunk=chunk, dtype=dtype, mesh=mesh, layout=layout)
    return zeros(specs, specs.mesh)


def zeros(specs, mesh: Mesh | None):
    """A cache as declared by `specs`, empty."""

    def leaf(spec: ArraySpec):
        return jnp.zeros(spec.shape, spec.dtype, device=spec.sharding(mesh) if mesh else None)

    return jax.tree.map(leaf, specs, is_leaf=is_spec)
