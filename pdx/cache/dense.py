"""The dense KV-cache: a row of slots for each request, a pytree that is passed in and returned.

A window layer keeps only its window, as a ring: slot = position mod slots. A full layer is the same ring and never
wraps. The memory layout depends on the device: the one that its attention reads without a copy
(`pallas_kernels.layouts`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from pallas_kernels.layouts import Layout
from pdx.arguments import integer
from pdx.cache.given import as_new_lengths, check_alive, whole_numbers
from pdx.cache.layer import LayerCache, cache_dtype, default_layout, layer_specs, zeros
from pdx.cache.rows import TokenRows
from pdx.config import ModelConfig
from pdx.errors import ContextLengthError, RequestError
from pdx.meshes import as_mesh, on_own_mesh, on_several_devices
from pdx.shapes import DEFAULT_CHUNK, SLOT_MULTIPLE, layer_slots, round_up
from pdx.sharding import ArraySpec, constrain, is_spec, mesh_axis, place_rows, row_spec


@struct.dataclass
class DenseCache:
    """The cache of B requests: its layers, the tokens that each row holds (`lengths`), and static facts.

    `written` is the longest that each row has been since it was empty. What a ring has overwritten depends on it, so
    `truncate` needs it.

    Example:
      >>> cache = pdx.init_cache(cfg, batch=2, capacity=128)
      >>> logits, cache = pdx.prefill(params, cfg, tokens, lengths, cache)
      >>> cache = cache.truncate(jnp.array([1, 0]))  # row 1 is free for another request
      >>> cache.lengths.tolist()
      [1, 0]
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " B"]
    written: Int[Array, " B"]
    capacity: int = struct.field(pytree_node=False)
    chunk: int = struct.field(pytree_node=False)
    windows: tuple[int | None, ...] = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    ROWS: ClassVar = TokenRows  # what describes the tokens of a call

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    def rows(self, new_lengths: Int[Array, " B"] | None, batch: int, tokens: int) -> TokenRows:
        """Describe tokens [B, T] = [batch, tokens] of a call; the first `new_lengths` of each row are real.

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
        # A token past the end would wrap and overwrite the row's first ones. It is dropped instead.
        return replace(rows, real=rows.real & (rows.positions < self.capacity))

    def layer_rows(self, rows: TokenRows) -> list[TokenRows]:
        """The rows as each layer sees them."""
        return [rows] * len(self.layers)

    def advance(self, rows: TokenRows, layers: tuple[LayerCache, ...]) -> DenseCache:
        """The cache with `layers`, to which the tokens of `rows` were appended."""
        total = self.lengths + rows.new_lengths
        return replace(self, layers=layers, lengths=total, written=jnp.maximum(self.written, total)).placed()

    def placed(self) -> DenseCache:
        """The cache constrained to its placement on the mesh. A jitted function must return it so."""
        if self.mesh is None:
            return self
        return jax.tree.map(lambda s, x: constrain(x, s, self.mesh), self.specs(), self, is_leaf=is_spec)

    def specs(self) -> DenseCache:
        """The cache with an `ArraySpec` for each leaf."""
        lengths: Any = row_spec(self.lengths)
        written: Any = row_spec(self.written)
        return replace(self, layers=tuple(x.specs() for x in self.layers), lengths=lengths, written=written)

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
    def truncate(self, keep_lengths: Int[ArrayLike, " B"]) -> DenseCache:
        """Keep the first `keep_lengths` [B] tokens of each row and forget the rest; no data moves.

        A shorter row stays as it is; 0 empties a row for the next request. Outside of a trace it raises
        ContextLengthError where a ring has overwritten what the shorter row would need.
        """
        check_alive(self)
        keep = jnp.asarray(whole_numbers("keep_lengths", keep_lengths, self.lengths.shape, "[B]"), jnp.int32)
        kept = jnp.minimum(self.lengths, keep)
        if not any(isinstance(x, jax.core.Tracer) for x in (keep, self.lengths, self.written)):
            self._check_held(np.asarray(kept))
        return replace(self, lengths=kept, written=jnp.where(kept == 0, 0, self.written))

    def emptied(self, rows: Bool[Array, " B"]) -> DenseCache:
        """The cache in which these rows are empty, for other requests."""
        return self.truncate(jnp.where(rows, 0, self.lengths))

    def keep_path(
        self, starts: Int[Array, " B"], path: Int[Array, "B M"], counts: Int[Array, " B"], head_dim: int
    ) -> DenseCache:
        """Close up one path of a token tree: of its nodes, which lie from position `starts` on, the first `counts` [B]
        of `path` move to the positions behind one another. `truncate` then drops the rest.

        Node 0 stays where it is. A path never descends, so no node is overwritten before it is read.
        """
        steps = jnp.arange(1, path.shape[1])
        source, target = starts[:, None] + path[:, 1:], starts[:, None] + steps
        real = (steps < counts[:, None]) & (source != target)

        def moved(layer: LayerCache) -> LayerCache:
            mesh = self.mesh
            if not on_several_devices(mesh):
                return layer.move(source, target, layer.kv_heads, head_dim, real)
            specs = layer.specs()
            axis, row = mesh_axis("kv_heads", layer.kv_heads, mesh), PartitionSpec(mesh_axis("batch", self.batch, mesh))
            heads = layer.kv_heads // (mesh.shape[axis] if axis else 1)
            stored = jax.tree.map(lambda spec: spec.partition(mesh), specs, is_leaf=is_spec)
            run = jax.shard_map(
                lambda layer, source, target, real: layer.move(source, target, heads, head_dim, real),
                mesh=mesh,
                in_specs=(stored, row, row, row),
                out_specs=stored,
                check_vma=False,
            )
            return run(layer, source, target, real)

        return replace(self, layers=tuple(map(moved, self.layers)))

    def first_layers(self, count: int) -> DenseCache:
        """The cache of the first `count` layers."""
        return replace(self, layers=self.layers[:count], windows=self.windows[:count])

    def with_first(self, first: DenseCache) -> DenseCache:
        """The cache with the keys and values of `first`, the cache of its first layers; lengths stay."""
        return replace(self, layers=(*first.layers, *self.layers[len(first.layers) :]))

    def holding(self, tokens: int) -> DenseCache:
        """The cache as if each row held `tokens` tokens, whatever lies in it: to measure what a step costs."""
        lengths = place_rows(jnp.full(self.batch, tokens, jnp.int32), self.mesh)
        return replace(self, lengths=lengths, written=jnp.copy(lengths))

    def _check_held(self, keep_lengths: np.ndarray) -> None:
        written = np.asarray(self.written)
        for layer, window in zip(self.layers, self.windows, strict=True):
            slots = layer.slots
            if window is None or slots >= self.capacity:
                continue
            # A row that keeps n tokens has its next query at position n, which sees from n - window + 1 on.
            needed = np.maximum(keep_lengths - window + 1, 0)
            lost = np.flatnonzero((written - slots > needed) & (keep_lengths > 0))
            if lost.size:
                row = int(lost[0])
                raise ContextLengthError(
                    f"row {row} was {written[row]} tokens long and cannot go back to {keep_lengths[row]}: a layer with "
                    f"a window of {window} keeps {slots} positions, so the earliest it can go back to is "
                    f"{written[row] - slots + window - 1}, or 0"
                )


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
    """Declare the cache: a `DenseCache` whose leaves are `ArraySpec`s."""
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

    count: Any = ArraySpec((batch,), ("batch",), jnp.int32, init="zeros")
    layers = tuple(layer(w) for w in cfg.windows)
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

    Steps run up to the capacity, even past the context that the model was trained for; `generate` and the engine
    limit requests to the context.

    Args:
      chunk: the most tokens that one prefill call may append; it sets the size of window layers.
      dtype: of keys and values. int8: they are quantized as they are appended, one scale per token and head.
      mesh: rows are sharded over `data` and KV heads over `model`; see `pdx.meshes.as_mesh` for what is accepted.
      layout: of keys and values in memory; None: the one that this device's attention reads fastest.

    Raises:
      RequestError: a number below 1, what is no mesh, or a dtype that is not f32, bf16, f16 or int8.

    Example:
      >>> cache = pdx.init_cache(cfg, batch=2, capacity=100, dtype=jnp.bfloat16)
      >>> cache.capacity, len(cache.layers), cache.lengths.tolist()
      (128, 2, [0, 0])
    """
    specs = cache_specs(cfg, batch, capacity, chunk=chunk, dtype=dtype, mesh=mesh, layout=layout)
    return zeros(specs, specs.mesh)
