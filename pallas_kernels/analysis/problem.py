"""A problem: one call of an op by one implementation, in the form that is compiled, counted, tuned and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Op
from pallas_kernels.implementation import reference_of, refusal
from pallas_kernels.layouts import round_up

# Ops that are compiled with folded queries and results. (Decode's queries are small: not worth it.)
PROJECTED = ("flash_attention", "paged_attention")


@dataclass(frozen=True)
class Problem:
    """One call of an op by one implementation: shapes, the scalars that decide what is read, needed bytes and FLOPs."""

    op: str
    name: str
    smoke: bool
    implementation: Any  # its name, or a user's own
    arrays: Mapping[str, jax.ShapeDtypeStruct]
    scalars: Mapping[str, np.ndarray]  # values of some of the arrays: lengths, tables
    full: Mapping[str, np.ndarray]  # the same for full rows, as a CostEstimate assumes
    call: Any  # the op's static facts
    run: Callable[..., Any]  # run(arrays, config, interpret)
    bytes_needed: int  # the rows' own K, V, Q, O and scales, once
    flops_needed: int
    cache: tuple[str, ...] = ()  # arrays that must not be copied: a cache, or weights
    donated: tuple[str, ...] = field(default=())
    bytes_stored: int = 0  # `bytes_needed` in memory, padding included; 0: the same
    case: Any = None  # from the op's cases.py

    @property
    def module(self) -> Any:
        """The implementation itself, see `pallas_kernels.implementation`."""
        return op_of(self.op).find(self.implementation)

    @property
    def reference(self) -> str | None:
        """The name by which another process finds the implementation; None if it cannot."""
        return reference_of(self.implementation)

    @property
    def unsupported(self) -> str | None:
        """None, or why the implementation cannot do this call."""
        return refusal(self.module, self.call)

    @property
    def cache_bytes(self) -> int:
        return sum(nbytes(self.arrays[n]) for n in self.cache)

    @property
    def multiplied(self) -> str:
        """The type that the matrix units multiply."""
        return "int8" if getattr(self.call, "int8_activations", False) else self.call.dtype

    def mxu_share(self, mxu: int) -> float:
        """The share of a matrix unit of `mxu` rows and columns that the op can use. A narrower head leaves rows (Q K^T)
        or columns (P V) idle."""
        if not hasattr(self.call, "head_dim"):
            return 1.0
        sizes = self.call.head_dim, self.call.value_dim
        return sum(sizes) / sum(round_up(n, mxu) for n in sizes) if mxu else 1.0

    def fn(self, config: Any = None, interpret: Any = False) -> Callable:
        """A function of the arrays, in their order."""
        return lambda *values: self.run(dict(zip(self.arrays, values, strict=True)), config, interpret)

    def as_projected(self) -> Problem:
        """The problem in the form to compile: queries and results as projections make and take them, [..., N*H].

        The kernel's [..., N, H] is then a view. As an argument of a whole program it would not be one on a TPU, which
        tiles the last two axes: XLA would re-lay queries and results around the kernel.
        """
        if self.op not in PROJECTED:
            return self
        q = self.arrays["q"]

        def run(values, config, interpret=False):
            out = self.run(values | {"q": values["q"].reshape(q.shape)}, config, interpret)
            return out.reshape(*q.shape[:-2], -1)

        flat = jax.ShapeDtypeStruct((*q.shape[:-2], q.shape[-2] * q.shape[-1]), q.dtype)
        return replace(self, arrays={**self.arrays, "q": flat}, run=run)

    def arguments(self, full: bool = False) -> list:
        """The arrays: values where they are known, else shapes."""
        known = self.full if full else self.scalars
        return [known.get(name, x) for name, x in self.arrays.items()]

    @property
    def donate_argnums(self) -> tuple[int, ...]:
        return tuple(i for i, name in enumerate(self.arrays) if name in self.donated)


def nbytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array in memory; int4 takes half a byte."""
    count = prod(x.shape)
    return count // 2 if x.dtype == jnp.int4 else count * x.dtype.itemsize


def op_of(op: str) -> Op:
    """The `Op` of that name."""
    return import_module(f"pallas_kernels.{op}.api").OP


def implementations(op: str) -> tuple[str, ...]:
    """Names of the op's implementations, `xla` first."""
    return tuple(op_of(op).implementations)
