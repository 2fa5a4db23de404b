"""The product of activations with a quantized matrix: W8A16, W8A8 and W4A16.

The way of a call:
  arguments       `call.make_call` checks them and gathers the static facts in a `Call`; W8A8 quantizes the activations
  Call            `OP.run` (`dispatch`) chooses the implementation and its tiles
  implementation  `xla` multiplies block by block; `tpu` and `gpu` set up the grid
  kernel          in `tpu`, and `gpu_kernel`: one block of outputs; weights are widened in fast memory
  result          [..., out]; offsets of affine int4 are added by a small product of their own
"""

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

    Two forms of the TPU kernel round more in bf16. Up to 16 rows of int4 or of groups become three int8 digits where
    a chip multiplies int8: activations are kept to 2^-21 of their row's maximum. Prompts on v6e and 7x take weights of
    groups that were scaled and rounded to bf16. f32, and W8A16 with one scale per output, have neither.

    Args:
      x: activations, f32 or bf16. With `w.activations == "int8"` (W8A8) each row is quantized before the kernel,
        rounded half to even.
      w: int8 or int4 [out, in], see `QuantArray`.
      out_dtype: of the result; None: that of x.
      implementation, interpret: see `pallas_kernels.dispatch`.
      config: tiles of a Pallas kernel, its module's `Config`. None: those of the tuned table, else of the heuristic.

    Raises:
      ValueError: shapes or types that do not fit.
      NotImplementedError: a named implementation that cannot take this call, or the gradient of a kernel.

    Example: the matrix [[0.5, 1.0], [0.75, 1.0]] in int8, one scale per output.
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import QuantArray, quantized_matmul
      >>> w = QuantArray(jnp.array([[1, 2], [3, 4]], jnp.int8), scales=jnp.array([[0.5, 0.25]]))
      >>> jax.jit(quantized_matmul)(jnp.array([[2.0, 0.0]]), w).tolist()
      [[1.0, 1.5]]
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
        # Each group adds its offset times the sum of its activations: a small product of its own.
        sums = rows.astype(jnp.float32).reshape(call.rows, call.groups, call.group).sum(-1)
        y = (y + jnp.dot(sums, w.offsets, precision=precision_of(jnp.float32))).astype(out)
    return y.reshape(*x.shape[:-1], call.out)
