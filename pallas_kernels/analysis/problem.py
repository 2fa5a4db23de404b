"""One call of an op by one implementation, in the form that is compiled, counted, tuned and timed."""

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

# Ops that are compiled between projections; the queries of decode are small.
PROJECTED = ("flash_attention", "paged_attention")


@dataclass(frozen=True)
class Problem:
    """One call of an op by one implementation: shapes, the scalars that decide what is read, and what it needs."""

    op: str
    name: str
    smoke: bool
    implementation: Any  # its name, or a user's own
    arrays: Mapping[str, jax.ShapeDtypeStruct]
    scalars: Mapping[str, np.ndarray]  # values of some of the arrays: lengths, tables
    full: Mapping[str, np.ndarray]  # the same for full rows, which a CostEstimate speaks of
    call: Any  # the op's static facts
    run: Callable[..., Any]  # run(arrays, config, interpret)
    bytes_needed: int  # the rows' own K, V, Q, O and scales, once
    flops_needed: int
    cache: tuple[str, ...] = ()  # arrays that must not be copied: a cache, or weights
    donated: tuple[str, ...] = field(default=())
    bytes_stored: int = 0  # what is needed as it lies in memory, padding included; 0: the same
    case: Any = None  # of the op's cases.py

    @property
    def module(self) -> Any:
        """The implementation itself, see `pallas_kernels.implementation`."""
        return implementation(self.op, self.implementation)

    @property
    def reference(self) -> str | None:
        """How another process names the implementation; None if it cannot."""
        return self.implementation if isinstance(self.implementation, str) else reference_of(self.implementation)

    @property
    def unsupported(self) -> str | None:
        """Why the implementation refuses this call, None if it does not."""
        return refusal(self.module, self.call)

    @property
    def cache_bytes(self) -> int:
        return sum(nbytes(self.arrays[n]) for n in self.cache)

    @property
    def multiplied(self) -> str:
        """The type that the matrix units multiply."""
        return "int8" if getattr(self.call, "int8_activations", False) else self.call.dtype

    def mxu_share(self, mxu: int) -> float:
        """How much of matrix units of `mxu` rows and columns the op can use: a head narrower than that leaves the
        rest of the rows (Q K^T) or columns (P V) idle."""
        if not hasattr(self.call, "head_dim"):
            return 1.0
        sizes = self.call.head_dim, self.call.value_dim
        return sum(sizes) / sum(round_up(n, mxu) for n in sizes) if mxu else 1.0

    def fn(self, config: Any = None, interpret: Any = False) -> Callable:
        """A function of the arrays' values, in their order."""
        return lambda *values: self.run(dict(zip(self.arrays, values, strict=True)), config, interpret)

    def as_projected(self) -> Problem:
        """The problem as a compiler should see it: queries as a projection makes them and results as one takes them,
        the heads of [..., N, H] side by side.

        [..., N, H] is then a view on every chip. As an argument of a whole program it is not: a TPU lays the last two
        axes out in tiles, and XLA re-lays queries and results around the kernel.
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
        """The arrays: shapes, and values where they are known."""
        known = self.full if full else self.scalars
        return [known.get(name, x) for name, x in self.arrays.items()]

    @property
    def donate_argnums(self) -> tuple[int, ...]:
        return tuple(i for i, name in enumerate(self.arrays) if name in self.donated)


def nbytes(x: jax.ShapeDtypeStruct) -> int:
    """Of an array in memory, int4 two to a byte."""
    count = prod(x.shape)
    return count // 2 if x.dtype == jnp.int4 else count * x.dtype.itemsize


def op_of(op: str) -> Op:
    """The op with its implementations."""
    return import_module(f"pallas_kernels.{op}.api").OP


def implementations(op: str) -> tuple[str, ...]:
    """What the op has, `xla` first."""
    return tuple(op_of(op).implementations)


def implementation(op: str, given: Any) -> Any:
    """An implementation by name, or a user's module or function as one."""
    return op_of(op).implementations[given] if isinstance(given, str) else op_of(op).implementation(given)
