"""The static facts of a product with a quantized matrix."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.quant_array import QuantArray, check


@dataclass(frozen=True)
class Call:
    """The static facts of one product. `supported` and `heuristic` decide by them."""

    rows: int  # M
    out: int
    columns: int  # in
    groups: int
    bits: int
    affine: bool
    int8_activations: bool
    dtype: str  # of the activations before quantization
    out_dtype: str = "float32"  # of the results

    @property
    def group(self) -> int:
        return self.columns // self.groups

    @property
    def kv_dtype(self) -> str:  # the name that tables use for the stored type
        return f"int{self.bits}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrix, scales and offsets included."""
        return self.out * self.columns * self.bits // 8 + 4 * self.groups * self.out * (2 if self.affine else 1)


def make_call(x, w: QuantArray, out_dtype=None) -> Call:
    """Check the arguments of `api.quantized_matmul` and gather the static facts. Raises ValueError."""
    check(w)
    if x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"quantized_matmul: x {x.shape} must end in the matrix's {w.shape[1]} columns")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantized_matmul: x must be of a floating type, not {x.dtype}: rows are quantized here")
    rows = x.size // max(x.shape[-1], 1)
    return Call(
        rows=rows,
        out=w.shape[0],
        columns=w.shape[1],
        groups=w.groups,
        bits=w.bits,
        affine=w.offsets is not None,
        int8_activations=w.activations == "int8",
        dtype=str(x.dtype),
        out_dtype=str(jnp.dtype(out_dtype or x.dtype)),
    )
