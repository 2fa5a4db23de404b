"""The body of the product with a quantized matrix on GPU (Triton): one block of results, or a part of its sum.

Weights are read in place and widened in registers. int4 is read as bytes: the low halves are multiplied by the even
columns of the activations, the high halves by the odd ones, so that no value changes its lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.masking import precision_of
from pallas_kernels.quantized_matmul.call import Call

# These bits, with an int4 plus eight in the lowest four, are a 16-bit float: 2^7 plus that number in bf16, 2^10 plus it
# in f16. So a mask and one subtraction widen two values at once. As compiled, a decode loop takes 6.1 instructions per
# weight on an A100 and 5.5 on an H100; with integer conversions 6.8 and 6.9.
_INT4 = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}


@dataclass(frozen=True)
class Plan:
    """The static inputs of the kernel: the call and its tiles."""

    call: Call
    config: Any  # tiles: `gpu.Config`

    @property
    def width(self) -> int:
        """Columns of one product: those of a step, or those of the step that share a group."""
        return self.config.block_in if self.call.groups == 1 else min(self.config.block_in, self.call.group)

    @property
    def chunks(self) -> int:
        """Steps of the whole contraction."""
        return -(-self.call.columns // self.config.block_in)

    @property
    def steps(self) -> int:
        """Steps of one part of the contraction."""
        return -(-self.chunks // self.config.splits)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of rows vary fastest, so that programs that run together share weights in L2."""
        return (
            -(-self.call.rows // self.config.block_rows),
            -(-self.call.out // self.config.block_out),
            self.config.splits,
        )

    @property
    def turned(self) -> bool:
        """Whether the block is computed as [outputs, rows], with the weights on the left of the product.

        As compiled for an A100 with tiles of 128 x 128 x 64: W4A16's loop has 589 instructions if turned, else 1328;
        W8A16's has 507, else 382. f32 with 16 rows takes 56 registers, else 168. With 16 rows and 64 outputs, W8A8
        gets Hopper's wide instructions only if turned.
        """
        return self.call.bits == 4 or self.call.int8_activations or self.call.dtype == "float32"


def body(plan: Plan, x, w, scales, row_scale, out) -> None:
    """Grid (blocks of rows, blocks of outputs, parts of the contraction)."""
    call, tiles, part = plan.call, plan.config, pl.program_id(2)
    rows = pl.program_id(0) * tiles.block_rows + jnp.arange(tiles.block_rows, dtype=jnp.int32)
    outs = pl.program_id(1) * tiles.block_out + jnp.arange(tiles.block_out, dtype=jnp.int32)
    # None if all rows are real: a mask costs instructions.
    real_rows = rows < call.rows if call.rows % tiles.block_rows else None
    real_outs = outs < call.out if call.out % tiles.block_out else None
    kind = jnp.int32 if call.int8_activations else jnp.float32

    def multiply(given, wide):
        a, b = (wide, given) if plan.turned else (given, wide)
        return lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), precision=precision_of(a.dtype), preferred_element_type=kind
        )

    def across(outputs, of_rows):
        """The vectors of outputs and of rows, in the order of the block's axes."""
        return (outputs, of_rows) if plan.turned else (of_rows, outputs)

    def product(c):
        given = load(x, rows, real_rows, *lanes(plan, c, 1))
        if call.bits == 8:
            return multiply(given, load(w, outs, real_outs, *lanes(plan, c, 1)).astype(given.dtype))
        even, odd = jnp.unstack(given.reshape(tiles.block_rows, plan.width // 2, 2), axis=-1)
        low, high = unpacked(load(w, outs, real_outs, *lanes(plan, c, 2)), given.dtype)
        return multiply(even, low) + multiply(odd, high)

    def step(c, total):
        if call.groups == 1:
            return total + product(c)
        parts = tiles.block_in // plan.width  # small groups: several per step, so that loads overlap
        for i in range(parts):
            group = (c * parts + i) * plan.width // call.group
            scale = line(scales.at[group, outs], real_outs)
            total += product(c * parts + i) * jnp.expand_dims(scale, 1 if plan.turned else 0)
        return total

    first = part * plan.steps
    last = jnp.minimum(first + plan.steps, plan.chunks)
    shape = across(tiles.block_out, tiles.block_rows)
    y = lax.fori_loop(*((0, plan.chunks) if tiles.splits == 1 else (first, last)), step, jnp.zeros(shape, kind))
    if tiles.splits == 1:
        y = y.astype(jnp.float32)
        if call.groups == 1:
            y = y * jnp.expand_dims(line(scales.at[0, outs], real_outs), 1 if plan.turned else 0)
        if row_scale is not None:
            y = y * jnp.expand_dims(line(row_scale.at[rows, 0], real_rows), 0 if plan.turned else 1)
    outs, rows = (outs[:, None], rows[None, :]) if plan.turned else (outs[None, :], rows[:, None])
    plgpu.store(out.at[part, rows, outs], y.astype(out.dtype), mask=both(*across(real_outs, real_rows), shape))


def lanes(plan: Plan, c, of_lane: int):
    """The places of product c along a row with `of_lane` columns per place, and the mask of those that exist."""
    size, end = plan.width // of_lane, plan.call.columns // of_lane
    places = c * size + jnp.arange(size, dtype=jnp.int32)
    return places, places < end if end % size else None


def unpacked(packed, dtype):
    """Widen int4: two blocks of the floating type, from the bytes' low and high halves."""
    if str(dtype) not in _INT4:
        wide = packed.astype(jnp.int32)
        return tuple((((h & 15) ^ 8) - 8).astype(dtype) for h in (wide, wide >> 4))
    bits, offset = _INT4[str(dtype)]
    wide = packed.astype(jnp.int16)
    halves = ((h & 15) ^ (bits | 8) for h in (wide, wide >> 4))
    return tuple(lax.bitcast_convert_type(h, dtype) - jnp.asarray(offset + 8, dtype) for h in halves)


def load(ref, rows, real_rows, columns, real_columns):
    """A block of a matrix; zero outside of the matrix."""
    block = ref.at[rows[:, None], columns[None, :]]
    mask = both(real_rows, real_columns, (rows.shape[0], columns.shape[0]))
    return plgpu.load(block) if mask is None else plgpu.load(block, mask=mask, other=0)


def line(ref, mask):
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0.0)


def both(first, second, shape):
    """The mask of a block from those of its two axes; None if all of it exists."""
    if first is None and second is None:
        return None
    parts = [m.reshape(s) for m, s in ((first, (-1, 1)), (second, (1, -1))) if m is not None]
    return jnp.broadcast_to(parts[0] if len(parts) == 1 else parts[0] & parts[1], shape)
