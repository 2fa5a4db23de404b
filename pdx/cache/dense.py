"""The dense KV-cache: a row of slots for each request, a pytree that is passed in and returned.

A layer with a window keeps only its window, as a ring: slot = position mod slots. Full layers are the
same ring that never wraps. Layout in memory: ``[B, K, S, H]``, which XLA on the CPU reads several times
faster than ``[B, S, K, H]``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pdx.config import ModelConfig
from pdx.errors import ContextLengthError
from pdx.shapes import round_up
from pdx.sharding import ArraySpec, constrain, is_spec

SLOT_MULTIPLE = 128
# A draft and its verified token: what `truncate` must be able to take back at any time.
MAX_DRAFT = 16
DEFAULT_CHUNK = 512


@struct.dataclass
class LayerCache:
    """Keys and values of one layer, as they lie in memory."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]

    def append(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
    ) -> LayerCache:  # fmt: skip
        """Write the valid tokens at their positions; the others write nothing anywhere."""
        slots = self.k.shape[2]
        # An index past the end is dropped by the scatter: padding and inactive rows cost no write.
        slot = jnp.where(valid, positions % slots, slots)
        rows = jnp.arange(k.shape[0])[:, None]

        def write(store, new):
            return store.at[rows, :, slot].set(new.astype(store.dtype), mode="drop")

        return LayerCache(write(self.k, k), write(self.v, v))


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

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    def advance(self, lengths: Int[Array, " B"], layers: tuple[LayerCache, ...]) -> DenseCache:
        """The cache with `layers` and `lengths` more tokens a row."""
        total = self.lengths + lengths
        return self.replace(layers=layers, lengths=total, written=jnp.maximum(self.written, total)).placed()

    def placed(self) -> DenseCache:
        """The cache held to its placement on the mesh, inside a jitted function: how it must be returned."""
        return jax.tree.map(lambda x: constrain(x, _spec(x.shape, x.dtype), self.mesh), self)

    def check_room(self, lengths) -> None:
        """Raise ContextLengthError where `lengths` [B] more tokens do not fit. Waits for the device."""
        held, new = np.asarray(self.lengths), np.asarray(lengths).astype(int)
        full = np.flatnonzero(held + new > self.capacity)
        if full.size:
            row = int(full[0])
            raise ContextLengthError(
                f"row {row} holds {held[row]} tokens and was given {new[row]} more, but the cache has room for "
                f"{self.capacity}: make it larger (init_cache(..., capacity=...)) or send less"
            )

    def truncate(self, lengths: Int[Array, " B"]) -> DenseCache:
        """Keep the first `lengths` tokens of each row and forget the rest; nothing is moved.

        A row that is shorter already stays as it is; 0 empties a row for the next request. Called with
        arrays that hold values (not under a trace), it raises ContextLengthError where a ring has
        overwritten what the shorter row would need.
        """
        lengths = jnp.asarray(lengths, jnp.int32)
        new = jnp.minimum(self.lengths, lengths)
        if not any(isinstance(x, jax.core.Tracer) for x in (lengths, self.lengths, self.written)):
            self._check_held(np.asarray(new))
        return self.replace(lengths=new, written=jnp.where(new == 0, 0, self.written))

    def _check_held(self, lengths: np.ndarray) -> None:
        written = np.asarray(self.written)
        for layer, window in zip(self.layers, self.windows, strict=True):
            slots = layer.k.shape[2]
            if window is None or slots >= self.capacity:
                continue
            # The next query, at position `lengths`, sees from lengths - window + 1 on.
            needed = np.maximum(lengths - window + 1, 0)
            lost = np.flatnonzero((written - slots > needed) & (lengths > 0))
            if lost.size:
                row = int(lost[0])
                raise ContextLengthError(
                    f"row {row} was {written[row]} tokens long and cannot go back to {lengths[row]}: a layer with "
                    f"a window of {window} keeps {slots} positions, so the earliest it can go back to is "
                    f"{written[row] - slots + window - 1}, or 0"
                )


def _spec(shape: tuple[int, ...], dtype) -> ArraySpec:
    """What a leaf of the cache is: [B, K, S, H] keys or values, or a count a row."""
    axes = ("batch", "kv_heads", None, None)[: len(shape)]
    return ArraySpec(shape, axes, dtype, init="zeros")


def layer_slots(window: int | None, capacity: int, chunk: int) -> int:
    """Slots of a layer: the capacity, or what a window needs for chunks of `chunk` and drafts of 16."""
    if window is None:
        return capacity
    return min(capacity, round_up(window - 1 + max(chunk, MAX_DRAFT + 1), SLOT_MULTIPLE))


def cache_specs(
    cfg: ModelConfig, batch: int, capacity: int, *, chunk: int = DEFAULT_CHUNK, dtype=jnp.float32,
    mesh: Mesh | None = None,
) -> DenseCache:  # fmt: skip
    """The cache as declared: a `DenseCache` whose leaves are `ArraySpec`s."""
    if batch < 1 or capacity < 1 or chunk < 1:
        raise ValueError(f"batch {batch}, capacity {capacity} and chunk {chunk} must be at least 1")
    capacity = round_up(capacity, SLOT_MULTIPLE)

    def layer(window):
        shape = (batch, cfg.num_kv_heads, layer_slots(window, capacity, chunk), cfg.head_dim)
        return LayerCache(_spec(shape, dtype), _spec(shape, dtype))

    count, layers = _spec((batch,), jnp.int32), tuple(layer(w) for w in cfg.windows)
    return DenseCache(layers, count, count, capacity, min(chunk, capacity), cfg.windows, mesh)


def init_cache(
    cfg: ModelConfig, batch: int, capacity: int, *, chunk: int = DEFAULT_CHUNK, dtype=jnp.float32,
    mesh: Mesh | None = None,
) -> DenseCache:  # fmt: skip
    """An empty cache for `batch` requests of up to `capacity` tokens (rounded up to a multiple of 128).

    `chunk` is the most tokens one prefill call may append: window layers are laid out for it.
    With a `mesh`, rows go over `data` and KV heads over `model`.
    """
    specs = cache_specs(cfg, batch, capacity, chunk=chunk, dtype=dtype, mesh=mesh)

    def zeros(spec: ArraySpec):
        return jnp.zeros(spec.shape, spec.dtype, device=spec.sharding(mesh) if mesh else None)

    return jax.tree.map(zeros, specs, is_leaf=is_spec)
