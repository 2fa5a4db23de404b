"""Quantized matrices: int8 and int4 weights with their scales, and how they are made.

    w[o, i] = values[o, i] * scales[i // g, o] + offsets[i // g, o]

`values` are `[out, in]` like the matrix, so that a row is contiguous. Scales and offsets are `[in/g, out]` for two
reasons: a product's results `[M, out]` are multiplied by rows of scales without a transpose, and a TPU would pad a
last axis of few groups to 128.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.quantize_kv import quantize_kv

Activations = Literal["float", "int8"]
GROUPS = (32, 64, 128)
# Symmetric: int4 does not use -8, int8 not -128.
LEVELS = {8: 127, 4: 7}
DTYPES = {8: jnp.int8, 4: jnp.int4}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantArray:
    """A quantized matrix: integers with scales, a pytree. `quantize` makes one.

    Attributes:
      values: int8 or int4 [out, in]; JAX keeps int4 two to a byte in memory.
      scales: f32 [in/g, out]; g = in is one scale per output channel.
      offsets: f32 [in/g, out] of an affine matrix; None: symmetric.
      activations: how a product treats its activations: `float` leaves them (W8A16, W4A16), `int8` quantizes each row
        (W8A8); static.
      stands_for: name of the matrix's dtype before it was quantized, the default of `dequantize`; static.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import QuantArray
      >>> w = QuantArray(values=jnp.ones((4, 64), jnp.int4), scales=jnp.ones((2, 4)))
      >>> w.shape, w.bits, w.group, w.nbytes  # 4 * 64 / 2 bytes of int4 and 2 * 4 scales in f32
      ((4, 64), 4, 32, 160)
    """

    values: Int[Array, "out in"]
    scales: Float[Array, "groups out"]
    offsets: Float[Array, "groups out"] | None = None
    activations: Activations = field(default="float", metadata={"static": True})
    stands_for: str = field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the matrix."""
        return cast(tuple[int, int], tuple(self.values.shape))

    @property
    def dtype(self):
        """Of the matrix before it was quantized."""
        return jnp.dtype(self.stands_for)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def groups(self) -> int:
        """Groups along `in`."""
        return self.scales.shape[0]

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return self.values.shape[1] // self.scales.shape[0]

    @property
    def bits(self) -> int:
        return 4 if jnp.dtype(self.values.dtype) == jnp.int4 else 8

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales and offsets included."""
        rest = sum(prod(x.shape) * 4 for x in (self.scales, self.offsets) if x is not None)
        return prod(self.values.shape) * self.bits // 8 + rest


def check(w: QuantArray) -> QuantArray:
    """Return `w` if its parts fit together.

    Raises:
      ValueError: a part is missing, of the wrong type, or of a shape that does not fit.
    """
    if w.scales is None:
        raise ValueError("a QuantArray needs scales [in/g, out]; there are none")
    if jnp.dtype(w.values.dtype) not in map(jnp.dtype, DTYPES.values()):
        raise ValueError(f"a QuantArray holds int8 or int4, not {w.values.dtype}")
    if w.values.ndim != 2 or w.scales.ndim != 2 or w.scales.shape[1] != w.values.shape[0]:
        raise ValueError(
            f"a QuantArray has values [out, in] and scales [in/g, out], got {w.values.shape} and {w.scales.shape}"
        )
    if w.values.shape[1] % w.scales.shape[0]:
        raise ValueError(f"{w.scales.shape[0]} groups do not divide the {w.values.shape[1]} columns")
    if w.offsets is not None and w.offsets.shape != w.scales.shape:
        raise ValueError(f"offsets {w.offsets.shape} and scales {w.scales.shape} must be of one shape")
    if w.activations not in ("float", "int8"):
        raise ValueError(f"activations {w.activations!r} is not one of float, int8")
    if w.activations == "int8" and (w.bits != 8 or w.groups != 1 or w.offsets is not None):
        raise ValueError("int8 activations (W8A8) take int8 weights, symmetric, with one scale per output channel")
    return w


def group_of(columns: int, group: int | None) -> int:
    """The size of a group; None means the whole row. Raises ValueError if it does not divide the columns."""
    if group is None:
        return columns
    if group < 1 or columns % group:
        fits = [g for g in GROUPS if columns % g == 0]
        raise ValueError(
            f"groups of {group} do not divide rows of {columns}; "
            f"{' or '.join(map(str, fits)) or 'none of 32, 64 and 128'} would, and so would a whole row"
        )
    return group


def quantize(
    w: Float[Array, "out in"],
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
    activations: Activations = "float",
) -> QuantArray:
    """Quantize a matrix group by group, rounding half to even.

    Symmetric: a group's largest magnitude becomes 127 (int8) or 7 (int4). Affine (int4 only): 16 levels from the
    group's smallest value to its largest.

    Args:
      bits: 8 or 4.
      group: values along `in` that share a scale; None: a whole row.
      activations: see `QuantArray`.

    Raises:
      ValueError: bits other than 8 and 4, a group that does not divide a row, affine int8.
    """
    if bits not in DTYPES:
        raise ValueError(f"weights are quantized to 8 or 4 bits, not {bits}")
    if not symmetric and bits == 8:
        raise ValueError("affine weights are int4; int8 is symmetric")
    if w.ndim != 2:
        raise ValueError(f"a matrix [out, in] is quantized, not an array of shape {w.shape}")
    rows, columns = w.shape
    size = group_of(columns, group)
    grouped = jnp.asarray(w, jnp.float32).reshape(rows, columns // size, size)
    offsets = None
    if symmetric:
        scales = jnp.abs(grouped).max(-1) / LEVELS[bits]
        steps = jnp.round(grouped / jnp.where(scales > 0, scales, 1.0)[..., None])
        limit = LEVELS[bits]
        steps = jnp.clip(steps, -limit, limit)
    else:
        low, high = grouped.min(-1), grouped.max(-1)
        scales = (high - low) / 15
        steps = jnp.clip(jnp.round((grouped - low[..., None]) / jnp.where(scales > 0, scales, 1.0)[..., None]), 0, 15)
        steps, offsets = steps - 8, (low + 8 * scales).T
    values = steps.reshape(rows, columns).astype(jnp.int8).astype(DTYPES[bits])
    return check(QuantArray(values, scales.T, offsets, activations, str(w.dtype)))


def dequantize(w: QuantArray, dtype=None) -> Float[Array, "out in"]:
    """The float matrix, in `dtype`; None: in the dtype that it had."""
    rows, columns = w.shape
    grouped = w.values.astype(jnp.float32).reshape(rows, w.groups, w.group) * w.scales.T[..., None]
    if w.offsets is not None:
        grouped = grouped + w.offsets.T[..., None]
    return grouped.reshape(rows, columns).astype(dtype or w.dtype)


def take_rows(w: QuantArray, rows: Int[Array, ...], dtype=None) -> Float[Array, "... in"]:
    """Rows of the matrix, dequantized: an embedding lookup. Row numbers past its end are clipped."""
    if rows.size == 1:
        # XLA turns the gather of one row into a slice, and on a TPU re-lays the whole table for it. A gather of two
        # rows reads the table in place.
        twice = lax.optimization_barrier(jnp.repeat(rows.reshape(1), 2))
        return take_rows(w, twice, dtype)[:1].reshape(*rows.shape, w.shape[1])
    values = jnp.take(w.values, rows, axis=0, mode="clip")
    spread = lambda x: jnp.repeat(jnp.moveaxis(jnp.take(x, rows, axis=1, mode="clip"), 0, -1), w.group, -1)  # noqa: E731
    found = values.astype(jnp.float32) * spread(w.scales)
    return (found if w.offsets is None else found + spread(w.offsets)).astype(dtype or w.dtype)


def from_blocks(
    values: Int[np.ndarray, "out in"],
    scales: Float[np.ndarray, "out groups"],
    offsets: Float[np.ndarray, "out groups"] | None = None,
    bits: int = 8,
    dtype: str = "float32",
) -> QuantArray:
    """A QuantArray from blocks as files store them, on the host: one scale (and offset) per row and group.

    Raises:
      ValueError: values outside the range of `bits`, or shapes that do not fit.
    """
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    if values.size and not low <= values.min() <= values.max() <= high:
        raise ValueError(f"values from {values.min()} to {values.max()} are not int{bits}")

    def turned(x: Any) -> Any:
        return None if x is None else np.ascontiguousarray(np.asarray(x, np.float32).T)

    stored: Any = values.astype(DTYPES[bits])
    return check(QuantArray(stored, turned(scales), turned(offsets), stands_for=str(dtype)))


def quantize_rows(x: Float[Array, "M in"]) -> tuple[Int[Array, "M in"], Float[Array, "M 1"]]:
    """Quantize activations for W8A8: int8, rounded half to even, one scale per row; x ~ values * scales."""
    values, scales = quantize_kv(x)
    return values, scales[:, None]
