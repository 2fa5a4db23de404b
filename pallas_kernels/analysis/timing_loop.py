"""The loop that benchmarks and the tuner time: calls in sequence in one program, each fed from the last result.

Only one element is fed back, written in place. That is enough to wait for the kernel, and a pass over the whole
result would be counted as the op's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LARGEST = 100.0  # magnitude of the element fed back, so that values do not grow from call to call

Turn = Callable[[Any, Any], Any]  # (state, held) -> state; state[0] is x


def chained(fn: Callable[..., Any]) -> Turn:
    """A turn: overwrites one element of x with one of the last result, then calls `fn(x, *held)` again.

    The state is (x, last result).
    """

    def turn(state, held):
        # The barrier makes weights and caches depend on the last result too. So XLA widens or re-lays them in every
        # turn, as in every call, and not once before the loop.
        (x, result), held = lax.optimization_barrier((state, held))
        x = fed(x, result)
        return x, fn(x, *held)

    return turn


def fed(x: jax.Array, result: jax.Array) -> jax.Array:
    """x with its first element replaced by that of `result`."""
    value = jnp.clip(result[(0,) * result.ndim].astype(jnp.float32), -LARGEST, LARGEST)
    return x.at[(0,) * x.ndim].set(value.astype(x.dtype))


def start(fn: Callable[..., jax.Array], x: jax.Array, *held: Any) -> tuple[jax.Array, jax.Array]:
    """The state before the first turn, which leaves x as it is."""
    shape = jax.eval_shape(fn, x, *held)
    return x, fed(jnp.zeros(shape.shape, shape.dtype), x)
