"""The product with a quantized matrix in XLA: the reference, and the path of CPUs.

On a CPU, XLA computes a one-row product in int8, or one with a conversion inside, by a scalar loop; a widened copy of
the matrix costs more than it saves. So with one scale per output, a few rows of floats are split into sums of three
int8 rows, which are multiplied int8 by int8. Other calls widen the matrix one block of rows at a time.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hardware import capability, platform_of
from pallas_kernels.masking import precision_of
from pallas_kernels.quantized_matmul.call import Call

NAME = "xla"
PLATFORM = "any"
# Up to this many rows, a CPU is faster with int8 than with widened blocks: 2.5 against 4.9 ms for 1 row, 19.5 against
# 22.3 for 32, 103 against 58 for 128 (49152 x 576 on two Zen 3 cores). One split per group is slower.
SPLIT_ROWS = 32
# Bytes of a widened block: it should fit the second-level cache.
BLOCK_BYTES = 1 << 19
# From this many rows on, `auto` prefers XLA for W8A16 on Hopper. On an H200 it took 261 us against the Pallas kernel's
# 311 with 1024 rows, and both took 21 us with 8; nothing between was measured. XLA widens the matrix once and then
# multiplies at cuBLAS's rate, 728 TFLOP/s there, which leaves 96 us for widening; the kernel's time is proportional to
# the rows. These two lines cross near 700 rows.
PREFERRED_ROWS = 768
_ROWS = (((1,), (1,)), ((), ()))  # contract the last axes of both


def preferred(call: Call) -> str | None:
    """None, or why `auto` takes XLA before a kernel that could do the call."""
    narrow = call.dtype in ("bfloat16", "float16")
    if call.bits != 8 or call.groups > 1 or call.int8_activations or not narrow or call.rows < PREFERRED_ROWS:
        return None
    if capability() != (9, 0):
        return None
    return f"measured on an H200: XLA is faster for W8A16 from {PREFERRED_ROWS} rows on, 261 us against 311 with 1024"


def integers(x: Int[Array, "M in"], values: Int[Array, "out in"]) -> Int[Array, "M out"]:
    """The int8 by int8 product of W8A8, in int32."""
    return lax.dot_general(_two(x), values, _ROWS, preferred_element_type=jnp.int32)[: x.shape[0]]


def _two(x: Array) -> Array:
    """Pad a single row to two: XLA's CPU backend is slow with one."""
    return jnp.concatenate([x, jnp.zeros_like(x)]) if x.shape[0] == 1 else x


def run(arrays, call: Call, config=None, interpret=False) -> Float[Array, "M out"]:
    """See `api.quantized_matmul`. It takes every call, and has no tiles."""
    x, values, scales = (arrays[name] for name in ("x", "values", "scales"))
    if call.int8_activations:
        y = integers(x, values).astype(jnp.float32) * scales * arrays["row_scale"]
    elif platform_of() == "cpu":
        y = _cpu(x, values, scales, call)
    else:
        y = _grouped(x, values, scales, call)
    return y.astype(call.out_dtype)


def _grouped(x: Array, values: Array, scales: Array, call: Call) -> Float[Array, "M out"]:
    """One product per group, scaled and summed. On accelerators, widening fuses into the products."""
    settings = {"precision": precision_of(x.dtype), "preferred_element_type": jnp.float32}
    if call.groups == 1:
        return lax.dot_general(x, values.astype(x.dtype), _ROWS, **settings) * scales
    total = jnp.zeros((x.shape[0], call.out), jnp.float32)
    for g in range(call.groups):
        part = slice(g * call.group, (g + 1) * call.group)
        total += lax.dot_general(x[:, part], values[:, part].astype(x.dtype), _ROWS, **settings) * scales[g]
    return total


def _cpu(x: Array, values: Array, scales: Array, call: Call) -> Float[Array, "M out"]:
    x = x.astype(jnp.float32)
    if call.groups == 1 and call.rows <= SPLIT_ROWS:
        return _split(x, values) * scales
    rows, x = x.shape[0], _two(x)
    block = _block(call)
    blocks = values.reshape(call.out // block, block, call.columns)
    by_block = scales.reshape(call.groups, call.out // block, block).transpose(1, 0, 2)

    def one(part):
        wide, factors = part
        wide = wide.astype(jnp.float32).reshape(block, call.groups, call.group) * factors.T[..., None]
        return lax.dot_general(x, wide.reshape(block, call.columns), _ROWS, precision=lax.Precision.HIGHEST)

    y = lax.map(one, (blocks, by_block))
    return y.transpose(1, 0, 2).reshape(-1, call.out)[:rows]


def _split(x: Float[Array, "M in"], values: Int[Array, "out in"]) -> Float[Array, "M out"]:
    """The product by splitting floats into three int8: x = s (a + b / 254 + c / 254^2), to 2^-22 of a row's maximum."""
    step = jnp.abs(x).max(-1, keepdims=True) / 127
    step = jnp.where(step == 0, 1.0, step)
    parts, steps = [], []
    for _ in range(3):
        part = jnp.clip(jnp.round(x / step), -127, 127)
        parts.append(part.astype(jnp.int8))
        steps.append(step)
        x, step = x - part * step, step / 254
    y = integers(jnp.concatenate(parts), values.astype(jnp.int8)).reshape(3, x.shape[0], -1)
    return (y.astype(jnp.float32) * jnp.stack(steps)).sum(0)


def _block(call: Call) -> int:
    """Rows of the matrix that are widened together: a divisor of their number."""
    most = max(1, BLOCK_BYTES // (4 * call.columns))
    return next(n for n in range(min(most, call.out), 0, -1) if call.out % n == 0)
