"""Seconds that a call takes on the device, without those that the host takes to ask for it.

Calls run one behind the other in a loop inside one program, each fed with the result before, so that none can be
hoisted, left out or overlapped. The number of turns is an argument: a long loop less a short one, over the
difference, is the time of a turn, and what a launch costs cancels. A loop of no turns is that cost by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pdx.bench.timing import Timing

# Of the result, added to what the next call is given: enough to change it, too little to let values grow.
FEEDBACK = 1e-3
SECONDS = 0.1  # a long loop should take at least
MOST_TURNS = 1 << 14
FEW = 1  # turns of the short loop

Turn = Callable[[Any, Any, Any], Any]  # (state, fresh, held) -> state


def chained(fn: Callable[..., Any]) -> Turn:
    """A turn that calls `fn(x, *held)`, x being `fresh` and a little of the result before, which is the state."""

    def turn(result, fresh, held):
        # Behind the barrier weights and caches hang on the result too: what a call makes of them (widened, laid out
        # anew) is made in every turn, as in every call.
        result, held = lax.optimization_barrier((result, held))
        return fn(fed(fresh, result), *held)

    return turn


def fed(x: jax.Array, result: Any) -> jax.Array:
    """x, and a little of every value of a result: cut or repeated until it fits."""
    flat = jax.tree.leaves(result)[0].ravel().astype(jnp.float32)
    return (x + FEEDBACK * jnp.resize(flat, x.shape)).astype(x.dtype)


def empty_result(fn: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in the shape of what `fn` returns: nothing is fed into the first call."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *arguments))


@dataclass
class Loop:
    """A compiled loop of turns.

    Attributes:
      turn: what is repeated; what it returns must depend on its state.
      state: what the first turn is given. It is donated: a cache in it is written in place.
      fresh: inputs that take turns from run to run, so that no run repeats another.
      held: what every run reads: weights, keys and values.
    """

    turn: Turn
    state: Any
    fresh: Sequence[Any]
    held: Any
    compile_seconds: float = field(init=False)
    turns: int = field(init=False, default=0)
    dispatch: Timing = field(init=False, default=Timing(()))

    def __post_init__(self):
        def many(turns, state, fresh, held):
            return lax.fori_loop(0, turns, lambda _, state: self.turn(state, fresh, held), state)

        started = time.perf_counter()
        lowered = jax.jit(many, donate_argnums=1).lower(jnp.int32(0), self.state, self.fresh[0], self.held)
        self._program = lowered.compile()
        self.compile_seconds = time.perf_counter() - started
        self._runs = 0

    @property
    def text(self) -> str:
        """The optimized program, to read what really runs."""
        return self._program.as_text()

    def run(self, turns: int) -> float:
        """Seconds of a loop of so many turns, as the host sees them; its result is the next state."""
        fresh = self.fresh[self._runs % len(self.fresh)]
        self._runs += 1
        count = jax.block_until_ready(jnp.int32(turns))
        started = time.perf_counter()
        self.state = self._program(count, self.state, fresh, self.held)
        jax.block_until_ready(self.state)
        return time.perf_counter() - started

    def calibrate(self) -> None:
        """Choose how many turns make a loop long enough to be read."""
        self.run(FEW)
        turns = 1
        while self.run(turns) < SECONDS and turns < MOST_TURNS:
            turns *= 2
        self.turns = FEW + turns

    def __call__(self) -> Timing:
        """Seconds of one turn on the device, from one pair of loops; a contestant of `timing.interleaved`."""
        if not self.turns:
            self.calibrate()
        self.dispatch += Timing((self.run(0),))
        few, many = self.run(FEW), self.run(self.turns)
        return Timing(((many - few) / (self.turns - FEW),))
