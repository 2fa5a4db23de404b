"""The memory layouts of a cache's keys and values: the order of batch, slots, KV heads and head size.

The device decides: each layout is the one that a device's kernels read without a copy. `folded` puts the heads side by
side, so that only K*H is rounded up to 128 lanes and not each head below 128.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

Layout = Literal["heads_first", "folded", "heads_last"]
LAYOUTS = get_args(Layout)
LANES = 128  # the last axis of a TPU array comes in whole registers of this many
SUBLANES = 8
TILE_ROWS = {4: 8, 2: 16, 1: 32}  # bytes of an element: rows of a tile in a TPU's memory
# Bytes of scalars that a TPU kernel may fetch ahead: three quarters of a core's scalar memory.
SCALAR_BYTES = 3 << 18


def as_int32(x):
    """Positions, lengths and indices in int32; numbers that int32 cannot hold are clipped to its range.

    In a smaller or unsigned type the difference of two positions would wrap. None stays None.
    """
    if x is None or x.dtype == jnp.int32:
        return None if x is None else jnp.asarray(x)
    mine, theirs = jnp.iinfo(jnp.int32), jnp.iinfo(x.dtype)
    xp = np if isinstance(x, np.ndarray) else jnp  # jax.numpy would truncate an int64 first
    if theirs.max > mine.max:
        x = xp.minimum(x, mine.max)
    if theirs.min < mine.min:
        x = xp.maximum(x, mine.min)
    return jnp.asarray(x.astype(jnp.int32))


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def folded_width(heads: int, dim: int) -> int:
    """Length of a folded array's last axis: heads * dim, rounded up to a multiple of 128."""
    return round_up(heads * dim, LANES)


def in_lanes(x: Float[Array, "rows lanes"], width: int) -> Float[Array, "rows width"]:
    """A number per row, equal in all lanes, for `width` lanes."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (-(-width // LANES)), axis=1)[:, :width]


def sums_by_lane(x: Float[Array, "rows n"]) -> Float[Array, "rows lanes"]:
    """The sum of each row, spread over the lanes: each holds a part, and they are added up once, at the end."""
    if x.shape[1] % LANES:
        return jnp.broadcast_to(x.sum(1, keepdims=True) / LANES, (x.shape[0], LANES))
    return sum(x[:, at : at + LANES] for at in range(0, x.shape[1], LANES))


def cache_shape(layout: Layout, batch: int, slots: int, heads: int, dim: int) -> tuple[int, ...]:
    """Shape of K or V: [B, K, S, H], [B, S, C] or [B, S, K, H]. Of pages: P in place of B, p in place of S."""
    if layout == "heads_first":
        return (batch, heads, slots, dim)
    if layout == "heads_last":
        return (batch, slots, heads, dim)
    if layout == "folded":
        return (batch, slots, folded_width(heads, dim))
    raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")


def slot_axis(layout: Layout) -> int:
    return 2 if layout == "heads_first" else 1


def fold(x: Float[Array, "*n K H"]) -> Float[Array, "*n C"]:
    """Put the heads side by side in one axis, padded with zeros to a multiple of 128."""
    *n, heads, dim = x.shape
    x = x.reshape(*n, heads * dim)
    padding = folded_width(heads, dim) - heads * dim
    return jnp.pad(x, [(0, 0)] * len(n) + [(0, padding)]) if padding else x


def unfold(x: Float[Array, "*n C"], heads: int, dim: int) -> Float[Array, "*n K H"]:
    """The heads of a folded array, without its padding."""
    return x[..., : heads * dim].reshape(*x.shape[:-1], heads, dim)


def to_layout(x: Float[Array, "B S K H"], layout: Layout) -> Array:
    """Convert from `heads_last` to `layout`. It copies: for tests and small arrays."""
    if layout == "heads_first":
        return x.transpose(0, 2, 1, 3)
    return fold(x) if layout == "folded" else x


def from_layout(x: Array, layout: Layout, heads: int, dim: int) -> Float[Array, "B S K H"]:
    """The inverse of `to_layout`."""
    if layout == "heads_first":
        return x.transpose(0, 2, 1, 3)
    return unfold(x, heads, dim) if layout == "folded" else x


def run_of_slots(x: Array, start: Int[Array, ""] | Int[Array, " B"], size: int, axis: int) -> Array:
    """`size` slots of `axis` from `start` on, one place for all rows or one a row. Rows are the first axis."""
    if start.ndim == 0:
        return lax.dynamic_slice_in_dim(x, start, size, axis=axis)
    return jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, size, axis=axis - 1))(x, start)


def slot_block(
    x: Array, layout: Layout, start: Int[Array, ""] | Int[Array, " B"], size: int, heads: int, dim: int
) -> Array:
    """`size` slots from `start` on: [B, K, size, H] for `heads_first`, else [B, size, K, H]. See `run_of_slots`."""
    block = run_of_slots(x, start, size, slot_axis(layout))
    return unfold(block, heads, dim) if layout == "folded" else block


def head_axes(layout: Layout) -> str:
    """The einsum letters of the array that `slot_block` returns."""
    return "bksh" if layout == "heads_first" else "bskh"
