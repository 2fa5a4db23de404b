"""The product of activations with a quantized matrix."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.implementation import FromFunction
from pallas_kernels.masking import precision_of
from pallas_kernels.quant_array import QuantArray, quantize_rows
from pallas_kernels.quantized_matmul.call import make_call

OP = Op("quantized_matmul")
explain = OP.explain


def quantized_matmul(
    x: Float[Array, "*b in"],
    w: QuantArray,
    *,
    out_dtype=None,
    implementation: Implementation = "auto",
    config=None,
    interpret=False,
) -> Float[Array, "*b out"]:
    """x @ w.T for a quantized matrix, accumulated in f32 (W8A8: int32).

    Args:
      x: activations, f32 or bf16. With `w.activations` int8 each row is quantized first, half to even, outside of the
        kernel.
      w: int8 or int4 [out, in], see `QuantArray`.
      out_dtype: of the result; None: that of x.
      implementation, interpret: see `pallas_kernels.dispatch`.
      config: tiles of a Pallas implementation; None: tuned, else its heuristic.

    Raises:
      ValueError: shapes or types that do not fit.
      NotImplementedError: a named implementation that cannot take this call.
    """
    out = jnp.dtype(out_dtype or x.dtype)
    call = make_call(x, w, out if w.offsets is None else jnp.dtype(jnp.float32))
    own = OP.implementation(implementation)
    if isinstance(own, FromFunction):  # it takes activations and matrix as they came
        return OP.run(own, {"x": x, "w": w}, replace(call, out_dtype=str(out)), config, interpret)
    rows = x.reshape(call.rows, call.columns)
    given, row_scale = quantize_rows(rows) if call.int8_activations else (rows, None)
    arrays = {"x": given, "values": w.values, "scales": w.scales, "row_scale": row_scale}
    y = OP.run(own, arrays, call, config, interpret)
    if w.offsets is not None:
        # The offset of a group is multiplied by the sum of its activations: a small product of its own.
        sums = rows.astype(jnp.float32).reshape(call.rows, call.groups, call.group).sum(-1)
        y = (y + jnp.dot(sums, w.offsets, precision=precision_of(jnp.float32))).astype(out)
    return y.reshape(*x.shape[:-1], call.out)
