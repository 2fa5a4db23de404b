"""Rounding a matrix with regard to its activations: searched scales, and GPTQ."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import QuantArray
from pallas_kernels.quant_array import DTYPES
from pdx.quant import Kind

SHRINKS = tuple(1 - i / 40 for i in range(21))  # factors of a group's largest magnitude
DAMPING = 0.01  # share of the mean diagonal that is added to the diagonal
LIMITS = {8: (-127, 127), 4: (-8, 7)}
HIGHEST = lax.Precision.HIGHEST


@partial(jax.jit, static_argnames=("kind", "dtype"))
def searched(w: Float[Array, "out in"], squares: Float[Array, " in"], kind: Kind, dtype: str) -> QuantArray:
    """Round a matrix to nearest with the scales that `grid` finds."""
    rows, columns = w.shape
    w = w.astype(jnp.float32)
    scales, offsets = grid(w, squares, kind)
    steps, _ = _rounding(w.reshape(rows, scales.shape[1], -1), scales[..., None], offsets[..., None], kind)
    return _packed(steps.reshape(rows, columns), scales, offsets, kind, dtype)


def _packed(steps, scales, offsets, kind: Kind, dtype: str) -> QuantArray:
    values = steps.astype(jnp.int8).astype(DTYPES[kind.bits])
    return QuantArray(values, scales.T, None if kind.symmetric else offsets.T, kind.activations, dtype)


def _rounding(w, scale, offset, kind: Kind):
    """The integer values, and the floats that they represent."""
    steps = jnp.clip(jnp.round((w - offset) / jnp.where(scale == 0, 1.0, scale)), *LIMITS[kind.bits])
    return steps, steps * scale + offset


def grid(w: Float[Array, "out in"], squares: Float[Array, " in"], kind: Kind):
    """Scales and offsets [out, groups] of least error, each column weighted by its activations' mean square.

    It tries the full range and smaller ones, which clip the largest values. A symmetric int4 group may use its
    sixteenth level, -8, on the side of its largest value: the scale's sign says on which side.
    """
    rows, columns = w.shape
    size = kind.group_for(columns) or columns
    w = w.reshape(rows, columns // size, size)
    weight = squares.reshape(1, columns // size, size)
    low, high = w.min(-1), w.max(-1)
    extent = jnp.where(high > -low, high, low)  # the value of largest magnitude, with its sign

    def tried(shrink):
        if not kind.symmetric:
            middle, width = (low + high) / 2, (high - low) * shrink
            return width / 15, middle + width / 30  # levels -8 to 7 lie around offset - scale/2
        if kind.bits == 8:
            return jnp.abs(extent) * shrink / 127, jnp.zeros_like(low)
        return -extent * shrink / 8, jnp.zeros_like(low)

    def step(carry, shrink):
        error, scale, offset = carry
        new_scale, new_offset = tried(shrink)
        _, back = _rounding(w, new_scale[..., None], new_offset[..., None], kind)
        new = (jnp.square(back - w) * weight).sum(-1)
        better = new < error
        pick = lambda a, b: jnp.where(better, a, b)  # noqa: E731
        return (pick(new, error), pick(new_scale, scale), pick(new_offset, offset)), None

    first = (jnp.full(low.shape, jnp.inf), *tried(1.0))
    # A factor above 1 gives the step of 15 levels, where the largest value is 7 steps.
    shrinks = jnp.asarray((*SHRINKS, 8 / 7) if kind.bits == 4 else SHRINKS, jnp.float32)
    (_, scale, offset), _ = lax.scan(step, first, shrinks)
    return scale, offset


@partial(jax.jit, static_argnames=("kind", "dtype"))
def gptq(w: Float[Array, "out in"], gram: Float[Array, "in in"], kind: Kind, dtype: str) -> QuantArray:
    """Round the columns in the order of their activations' size, and correct the remaining ones after each.

    Args:
      gram: mean of x x^T over the activations. The scales of all groups are fixed first (static groups).
    """
    rows, columns = w.shape
    w = w.astype(jnp.float32)
    squares = jnp.diag(gram)
    scales, offsets = grid(w, squares, kind)
    order = jnp.argsort(-squares)
    dead = jnp.where(squares > 0, 0.0, 1.0)  # a column that is never used
    damped = gram + jnp.diag(dead + DAMPING * squares.mean())
    factor = jnp.linalg.cholesky(damped[order][:, order])
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(columns))
    upper = jnp.linalg.cholesky(inverse).T  # the inverse is upper^T upper
    size = columns // scales.shape[1]
    scale, offset = (jnp.repeat(s.T, size, axis=0)[order] for s in (scales, offsets))  # [in, out]
    block = max(n for n in range(1, min(columns, 128) + 1) if columns % n == 0)

    def one_block(b, carry):
        left, steps = carry
        at = b * block
        cut = lambda a: lax.dynamic_slice_in_dim(a, at, block, 0)  # noqa: E731
        part, own_scale, own_offset = cut(left), cut(scale), cut(offset)
        lines = cut(upper)
        square = lax.dynamic_slice_in_dim(lines, at, block, 1)

        def one_column(j, carry):
            part, done, errors = carry
            found, back = _rounding(part[j], own_scale[j], own_offset[j], kind)
            error = (part[j] - back) / square[j, j]
            return part - square[j][:, None] * error, done.at[j].set(found), errors.at[j].set(error)

        _, done, errors = lax.fori_loop(0, block, one_column, (part, jnp.zeros_like(part), jnp.zeros_like(part)))
        behind = jnp.where(jnp.arange(columns) >= at + block, lines, 0)
        left = left - jnp.dot(behind.T, errors, precision=HIGHEST)
        return left, lax.dynamic_update_slice_in_dim(steps, done, at, 0)

    _, steps = lax.fori_loop(0, columns // block, one_block, (w.T[order], jnp.zeros((columns, rows))))
    return _packed(jnp.zeros((columns, rows)).at[order].set(steps).T, scales, offsets, kind, dtype)
