"""The Pallas kernels have no derivative, and say so."""

from __future__ import annotations

from collections.abc import Callable

import jax


def raising_under_grad(function: Callable, op: str) -> Callable:
    """`function`, with NotImplementedError in place of a derivative. Its arguments are arrays or None."""
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def _(primals, tangents):
        raise NotImplementedError(f"{op}: the Pallas kernels have no derivative: use implementation='xla'")

    return wrapped
