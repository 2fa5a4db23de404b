"""The product with a quantized matrix in XLA: the reference, and what a CPU runs.

On a CPU a product of one row in int8, or with a conversion inside, falls to a scalar loop: one row becomes two.
A few rows, where a scale is a whole row's, are multiplied and summed in one fused loop, which widens in registers;
others take the matrix a block of rows at a time, so that no widened copy of it is ever whole.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hardware import platform_of
from pallas_kernels.masking import precision_of
from pallas_kernels.quantized_matmul.call import Call

# Rows up to which the CPU's fused loop is faster than widening blocks: 3.9 against 7.1 ms at 2, 5.5 against 7.8 at 8,
# for 49152 x 576 on two Zen 3 cores.
FUSED_ROWS = 8
# Bytes of a widened block: it should stay in the second-level cache.
BLOCK_BYTES = 1 << 19
_ROWS = (((1,), (1,)), ((), ()))  # contract the last axes of both


def supported(call: Call) -> str | None:
    """Every call."""
    return None


def integers(x: Int[Array, "M in"], values: Int[Array, "out in"]) -> Int[Array, "M out"]:
    """The int32 part of W8A8."""
    return lax.dot_general(_two(x), values, _ROWS, preferred_element_type=jnp.int32)[: x.shape[0]]


def _two(x: Array) -> Array:
    """At least two rows."""
    return jnp.concatenate([x, jnp.zeros_like(x)]) if x.shape[0] == 1 else x


def matmul(
    x: Array, values: Array, scales: Array, row_scale: Array | None, extra: Array | None, *, call: Call, out_dtype
) -> Float[Array, "M out"]:
    """See `api.quantized_matmul`."""
    if call.int8_activations:
        y = integers(x, values).astype(jnp.float32) * scales * row_scale
    elif platform_of() == "cpu":
        y = _cpu(x, values, scales, call)
    else:
        y = _grouped(x, values, scales, call)
    return (y if extra is None else y + extra).astype(out_dtype)


def _grouped(x: Array, values: Array, scales: Array, call: Call) -> Float[Array, "M out"]:
    """One product a group, scaled and summed; widening fuses into the products of an accelerator."""
    settings = {"precision": precision_of(x.dtype), "preferred_element_type": jnp.float32}
    if call.groups == 1:
        return lax.dot_general(x, values.astype(x.dtype), _ROWS, **settings) * scales
    total = jnp.zeros((x.shape[0], call.out), jnp.float32)
    for g in range(call.groups):
        part = slice(g * call.group, (g + 1) * call.group)
        total += lax.dot_general(x[:, part], values[:, part].astype(x.dtype), _ROWS, **settings) * scales[g]
    return total


def _cpu(x: Array, values: Array, scales: Array, call: Call) -> Float[Array, "M out"]:
    rows, x = x.shape[0], _two(x.astype(jnp.float32))
    if rows <= FUSED_ROWS and call.groups == 1:
        return ((x[:, None] * values.astype(jnp.float32)[None]).sum(-1) * scales)[:rows]
    block = _block(call)
    blocks = values.reshape(call.out // block, block, call.columns)
    by_block = scales.reshape(call.groups, call.out // block, block).transpose(1, 0, 2)

    def one(part):
        wide, factors = part
        wide = wide.astype(jnp.float32).reshape(block, call.groups, call.group) * factors.T[..., None]
        return lax.dot_general(x, wide.reshape(block, call.columns), _ROWS, precision=lax.Precision.HIGHEST)

    y = lax.map(one, (blocks, by_block))
    return y.transpose(1, 0, 2).reshape(-1, call.out)[:rows]


def _block(call: Call) -> int:
    """Rows of the matrix that are widened together: a divisor of them all."""
    most = max(1, BLOCK_BYTES // (4 * call.columns))
    return next(n for n in range(min(most, call.out), 0, -1) if call.out % n == 0)

