"""Ops without a derivative: the error that says what to use instead."""

from __future__ import annotations

from collections.abc import Callable

import jax

# The loop bounds of XLA's flash and decode attention are traced values: under jit they have no gradient either.
_DENSE = "use reference_attention, or pdx.forward without a cache"
_KERNELS = "the Pallas kernels have no derivative"
_REASONS = {
    "flash_attention": f"{_KERNELS}: {_DENSE}",
    "decode_attention": f"{_KERNELS}: {_DENSE}",
    "paged_attention": f"attention over pages has no derivative: {_DENSE}",
    "quantized_matmul": f"{_KERNELS}: use implementation='xla'",
}


def has_derivative(op: str, platforms: tuple[str, ...]) -> bool:
    """Whether an implementation for these platforms may have a derivative. TPU and GPU kernels have none."""
    return op not in _REASONS or ("any" in platforms and op != "paged_attention")


def raising_under_grad(function: Callable, op: str) -> Callable:
    """`function`, but its derivative raises NotImplementedError. Its arguments are pytrees of arrays."""
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def _(primals, tangents):
        raise NotImplementedError(f"{op}: {_REASONS[op]}")

    return wrapped
