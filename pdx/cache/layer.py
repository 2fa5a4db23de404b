"""One layer of a cache, dense or paged: how its keys and values are declared, stored and appended.

The memory layout depends on the device: the one that its attention reads without a copy (`pallas_kernels.layouts`).
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import quantize_kv, write_pages
from pallas_kernels.layouts import SUBLANES, Layout, cache_shape, folded_width, slot_axis, unfold
from pdx.cache.rows import PackedRows, TokenRows
from pdx.config import ModelConfig
from pdx.errors import RequestError
from pdx.shapes import round_up
from pdx.sharding import ArraySpec, is_spec, mesh_axis

CACHE_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16, "int8": jnp.int8}


@struct.dataclass
class LayerCache:
    """Keys and values of one layer, stored in `layout` with `kv_heads` heads in all (see `stored_heads`).

    The first axis, `row_axis`, is the batch of a dense cache or the pages of a paged one: a dense row is one page with
    all of the row's slots. In int8 each token and head has a scale, [B, Kp, S]. Attention multiplies logits by the K
    scales and probabilities by the V scales, so nothing is dequantized in memory.
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
        """Tokens per row, or per page."""
        return self.k.shape[slot_axis(self.layout)]

    @property
    def scales(self) -> dict[str, Array]:
        """The scales of int8 keys and values, as keyword arguments of the attention ops; empty for floats."""
        return {} if self.k_scale is None else {"k_scale": self.k_scale, "v_scale": self.v_scale}

    def specs(self) -> LayerCache:
        """The layer with an `ArraySpec` for each leaf."""
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
        """Write the tokens of a call to the slots that `rows` maps them to; padding is not written.

        On a mesh this runs per device, on its own heads (`layers.attention`). `implementation`: see
        `pallas_kernels.write_pages`.
        """
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        scales = {}
        if self.scales:
            (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
            scales = {"k_scale": k_scale, "v_scale": v_scale}
        slots = rows.slots(self.slots)
        return self._written(k, v, scales, slots=slots, implementation=implementation, interpret=interpret)

    def move(
        self, source: Int[Array, "B M"], target: Int[Array, "B M"], heads: int, head_dim: int, real: Bool[Array, "B M"]
    ) -> LayerCache:
        """Copy the tokens at positions `source` of each row of a dense cache to positions `target`, where `real`.

        They are moved as stored, without rounding. `heads`, `head_dim`: of what this device holds.
        """
        batch, m = source.shape
        row = jnp.arange(batch)[:, None]

        def at(x: Array, heads_axis: bool) -> Array:
            found = x[row, :, source % self.slots] if heads_axis else x[row, source % self.slots]
            return found.reshape(batch * m, *found.shape[2:])

        k, v = (at(x, self.layout == "heads_first") for x in (self.k, self.v))
        if self.layout == "folded":
            k, v = (unfold(x, heads, head_dim) for x in (k, v))
        scales = {name: at(x, True)[:, :heads] for name, x in self.scales.items()}
        slots = jnp.where(real, row * self.slots + target % self.slots, -1).reshape(-1)
        return self._written(k, v, scales, slots=slots)

    def _written(self, k: Array, v: Array, scales: dict[str, Array], **settings: Any) -> LayerCache:
        """The cache with these tokens and their scales by name; `settings`: of `write_pages`."""
        scales = self.scales | {f"new_{name}": x for name, x in scales.items()}
        k, v = k.astype(self.k.dtype), v.astype(self.v.dtype)
        written = write_pages(self.k, self.v, k, v, layout=self.layout, **scales, **settings)
        return self.replace(**dict(zip(("k", "v", *self.scales), written, strict=True)))


def _spec(shape: tuple[int, ...], dtype, layout: Layout, kv_heads: int, row_axis: str) -> ArraySpec:
    """Keys or values of a layer. `folded` shards whole heads, and rounds each device's part up to whole lanes."""
    axes = {
        "heads_first": (row_axis, "kv_heads", None, None),
        "heads_last": (row_axis, None, "kv_heads", None),
        "folded": (row_axis, None, "kv_heads"),
    }[layout]
    units = (*shape[:2], kv_heads) if layout == "folded" else None
    return ArraySpec(shape, axes, dtype, units=units, init="zeros")


def _scale_spec(shape: tuple[int, ...], kv_heads: int, row_axis: str) -> ArraySpec:
    """Scales of int8 keys or values: sharded like the heads, with each device's part rounded up."""
    units = (shape[0], kv_heads, shape[2])
    return ArraySpec(shape, (row_axis, "kv_heads", None), jnp.float32, units=units, init="zeros")


def stored_heads(cfg: ModelConfig, mesh: Mesh | None) -> int:
    """KV heads that a cache on `mesh` holds.

    Where `model` divides the query heads but not the KV heads, each KV head is stored several times in succession.
    Each device then holds exactly the KV heads that its query heads attend to.
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
    """Declare one layer of `count` rows (or pages) of `slots` tokens: its leaves are `ArraySpec`s."""
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
    """The layout that a platform's attention reads without a copy; None: the platform of JAX's default backend."""
    return {"tpu": "folded", "gpu": "heads_last"}.get(platform or jax.default_backend(), "heads_first")


def cache_dtype(dtype) -> jnp.dtype:
    """The type of keys and values: one of `CACHE_DTYPES`, by name or as a jax or numpy type. Raises RequestError."""
    with suppress(TypeError):  # not a type at all
        found = jnp.dtype(CACHE_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
        if dtype is not None and found in map(jnp.dtype, CACHE_DTYPES.values()):
            return found
    raise RequestError(f"dtype {dtype!r} of a cache is not one of {', '.join(CACHE_DTYPES)}")


def zeros(specs, mesh: Mesh | None):
    """An empty cache, as `specs` declare it."""

    def leaf(spec: ArraySpec):
        return jnp.zeros(spec.shape, spec.dtype, device=spec.sharding(mesh) if mesh else None)

    return jax.tree.map(leaf, specs, is_leaf=is_spec)
