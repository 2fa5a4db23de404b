"""The body of the TPU kernel of quantized products: one block of outputs, and the rows that it multiplies.

`arrange` lays the activations out before the kernel. A matrix unit of a TPU is loaded with weights, and rows pass
through it. With few rows, loading is most of its work: more rows are cheap if they save loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.layouts import LANES, SUBLANES, round_up
from pallas_kernels.masking import precision_of
from pallas_kernels.quantized_matmul.call import Call

RADIX = 128  # of the digits of an activation
MOST = 64  # a digit lies in [-64, 64], so that sums of three digits in groups of int4 fit int32
_ROWS = (((1,), (1,)), ((), ()))  # contract the last axes of both


@dataclass(frozen=True)
class Plan:
    """One block of a call, as the tiles say.

    Attributes:
      block_rows, block_out, block_in: see `tpu.Config`, as are spread, digits and scaled.
      steps: blocks of the contraction.
      whole: whole rows of activations lie in VMEM; a step takes its columns.
    """

    call: Call
    block_rows: int
    block_out: int
    block_in: int
    steps: int
    whole: bool
    spread: int = 1
    digits: int = 0
    scaled: bool = False

    @property
    def arranged(self) -> bool:
        return self.spread > 1 or self.digits > 0

    @cached_property
    def rows(self) -> int:
        """Rows of results of one product: those of a group, in whole registers if several groups are multiplied."""
        return round_up(self.block_rows, SUBLANES) if self.arranged else self.block_rows

    @property
    def given_rows(self) -> int:
        """Rows that the kernel is given for a block of rows."""
        return self.rows * self.spread * max(1, self.digits)

    @property
    def integers(self) -> bool:
        return self.call.int8_activations or self.digits > 0

    @property
    def fits_int32(self) -> bool:
        """Whether the sum of a group fits int32 after its digits are added. Fewer conversions, fewer bundles."""
        most = sum(MOST * RADIX**d for d in range(self.digits))
        return most * self.call.group << self.call.bits - 1 < 1 << 31

    @property
    def given_bytes(self) -> int:
        """Bytes of a number of those rows."""
        return 1 if self.integers else jnp.dtype(self.call.dtype).itemsize


def arrange(x: Float[Array, "M in"], plan: Plan) -> tuple[Array, Float[Array, "M 1"] | None]:
    """The rows that the kernel multiplies, and the factor of each row of results.

    Spread: `spread` copies of the rows, each with the columns of every `spread`-th group and zero elsewhere. One
    product of the columns of `spread` groups then gives the sums of each group apart.
    Digits: x = s (a + b / 128 + c / 128^2), to 2^-21 of a row's maximum with three. They are further rows, in int8.

    Returns:
      Rows ordered by digit, then group, then row: [digits * spread * rows, in]. The factor is None without digits.
    """
    if not plan.arranged:
        return x, None
    factor, parts = None, [x]
    if plan.digits:
        wide = x.astype(jnp.float32)
        most = jnp.abs(wide).max(-1, keepdims=True)
        step = jnp.where(most == 0, 1.0, most / MOST)
        factor, parts, wide = step / RADIX ** (plan.digits - 1), [], wide / step
        for _ in range(plan.digits):
            part = jnp.round(wide)
            parts.append(part.astype(jnp.int8))
            wide = (wide - part) * RADIX
    rows = jnp.pad(jnp.stack(parts), ((0, 0), (0, plan.rows - x.shape[0]), (0, 0)))
    group = jnp.arange(plan.call.columns) // plan.call.group % plan.spread
    own = jnp.arange(plan.spread)[:, None, None] == group
    spread = jnp.where(own, rows[:, None], jnp.zeros((), rows.dtype))
    return spread.reshape(plan.given_rows, plan.call.columns), factor


def body(plan: Plan, x, w, scales, *rest) -> None:
    """One grid step: add the product of a block of columns to the sum; the last step of a contraction writes it."""
    row_scale, out, *scratch = rest if plan.integers else (None, *rest)
    step = pl.program_id(2)
    cut = plan.whole and plan.steps > 1
    x = x[:, pl.ds(pl.multiple_of(step * plan.block_in, LANES), plan.block_in)] if cut else x[...]
    part = _product(plan, x, w, scales)

    def write(y):
        y = y.astype(jnp.float32)
        if plan.call.groups == 1:
            y = y * scales[...]
        if row_scale is not None:
            y = y * row_scale[...]
        out[...] = y.astype(out.dtype)

    if plan.steps == 1:
        write(part)
        return
    (total,) = scratch

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    total[...] += part

    @pl.when(step == plan.steps - 1)
    def _():
        write(total[...])


def _product(plan: Plan, x, w, scales):
    """The product of a block of columns; with groups it is scaled."""
    if plan.scaled:
        return _scaled(plan, x, w, scales)
    if plan.call.groups > 1:
        return _grouped(plan, x, w, scales)
    return _number(plan, _dot(plan, x, w[...]))[: plan.block_rows]


def _dot(plan: Plan, x, w):
    if plan.integers:
        return lax.dot_general(x, w.astype(jnp.int8), _ROWS, preferred_element_type=jnp.int32)
    precision = precision_of(x.dtype)
    return lax.dot_general(x, w.astype(x.dtype), _ROWS, precision=precision, preferred_element_type=jnp.float32)


def _number(plan: Plan, y):
    """The sums of the rows from those of their digits."""
    if not plan.digits:
        return y
    size = y.shape[0] // plan.digits
    parts = [y[d * size : (d + 1) * size] for d in range(plan.digits)]
    if not plan.fits_int32:
        parts = [part.astype(jnp.float32) for part in parts]
    number = parts[0]
    for part in parts[1:]:
        number = number * RADIX + part
    return number.astype(jnp.float32)


def _grouped(plan: Plan, x, w, scales):
    """The sum of the groups' products, each scaled; `spread` groups take one product."""
    group, total, scales = plan.call.group, 0.0, scales[...]
    for first in range(0, plan.block_in // group, plan.spread):
        at = slice(first * group, (first + plan.spread) * group)
        y = _number(plan, _dot(plan, x[:, at], w[:, at]))
        for g in range(plan.spread):
            total += y[g * plan.rows : (g + 1) * plan.rows] * scales[first + g : first + g + 1]
    return total[: plan.block_rows]


def _scaled(plan: Plan, x, w, scales):
    """One product with weights that were scaled in f32 and rounded to bf16 once: by at most 2^-9 of each.

    Groups are written out, not looped over: then scaling runs beside the product. A loop took 491,549 bundles for
    Llama's gate and 1024 rows on v6e, this 284,265.
    """
    factors, group = scales[...].T, plan.call.group
    wide = []
    for g in range(plan.block_in // group):
        part = w[:, g * group : (g + 1) * group].astype(jnp.float32)
        wide.append((part * factors[:, g : g + 1]).astype(x.dtype))
    return lax.dot_general(x, jnp.concatenate(wide, 1), _ROWS, preferred_element_type=jnp.float32)
