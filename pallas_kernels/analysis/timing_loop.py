"""Calls one behind the other in one program, each fed a value of the result before: what benchmarks and tuner time.

What is fed back is one value, written in place: a call that waits for one value of a result waits for its kernel, and
a pass over the whole result would be charged to the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LARGEST = 100.0  # of a value that is fed back: they must not grow from call to call

Turn = Callable[[Any, Any], Any]  # (state, held) -> state; the first of a state is what was given


def chained(fn: Callable[..., Any]) -> Turn:
    """A turn that calls `fn(x, *held)`; the state is x and the result before, of which x takes a value."""

    def turn(state, held):
        # Behind the barrier weights and caches hang on the result too: what a call makes of them (widened, laid out
        # anew) is made in every turn, as in every call.
        (x, result), held = lax.optimization_barrier((state, held))
        x = fed(x, result)
        return x, fn(x, *held)

    return turn


def fed(x: jax.Array, result: jax.Array) -> jax.Array:
    """x with the first value of a result in the place of its own."""
    value = jnp.clip(result[(0,) * result.ndim].astype(jnp.float32), -LARGEST, LARGEST)
    return x.at[(0,) * x.ndim].set(value.astype(x.dtype))


def start(fn: Callable[..., jax.Array], x: jax.Array, *held: Any) -> tuple[jax.Array, jax.Array]:
    """The state before the first turn, of which that turn takes x as it is."""
    shape = jax.eval_shape(fn, x, *held)
    return x, fed(jnp.zeros(shape.shape, shape.dtype), x)
