"""Seconds that a call takes on the device, without those that the host takes to ask for it.

Calls run one behind the other in a loop inside one program, each fed with the result before, so that none can be
hoisted, left out or overlapped. The number of turns is an argument: a long loop less a short one, over the
difference, is the time of a turn, and what a launch costs cancels. A loop of no turns is that cost by itself.
A GPU's host asks the device before each turn of such a loop whether there is another, some tens of microseconds, which
no difference cancels; a loop of a known length it only asks to run. Short calls are therefore repeated there in blocks
of a known length.
What is fed back is one value (`pallas_kernels.analysis.timing_loop`); the whole result is the loop's own, so none of it
is left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.analysis.timing_loop import Turn
from pallas_kernels.hardware import platform_of
from pdx.bench.timing import Timing

SECONDS = 0.1  # a long loop should take at least
MOST_TURNS = 1 << 14
FEW = 1  # turns of the short loop
BLOCK, SHORT = 64, 1e-3  # turns in one of a GPU's loop, of calls shorter than so many seconds


@dataclass
class Loop:
    """A compiled loop of turns.

    Attributes:
      turn: what is repeated; what it returns must depend on its state.
      state: a tuple, what the first turn is given. It is donated: a cache in it is written in place.
      fresh: what stands first in the state of a run, in turn, so that no run repeats another.
      held: what every run reads: weights, keys and values.
    """

    turn: Turn
    state: Any
    fresh: Sequence[Any]
    held: Any
    compile_seconds: float = field(init=False)
    turns: int = field(init=False, default=0)
    block: int = field(init=False, default=1)  # calls in a turn
    dispatch: Timing = field(init=False, default=Timing(()))

    def __post_init__(self):
        started = time.perf_counter()
        self._program = self._compile(1)
        self.compile_seconds = time.perf_counter() - started
        self._runs = 0

    def _compile(self, block: int):
        def many(turns, state, held):
            def turn(_, state):
                if block == 1:
                    return self.turn(state, held)
                return lax.fori_loop(0, block, lambda _, state: self.turn(state, held), state)

            return lax.fori_loop(0, turns, turn, state)

        return jax.jit(many, donate_argnums=1).lower(jnp.int32(0), self.state, self.held).compile()

    @property
    def text(self) -> str:
        """The optimized program, to read what really runs."""
        return self._program.as_text()

    def run(self, turns: int) -> float:
        """Seconds of a loop of so many turns, as the host sees them; its result is the next state."""
        fresh = jnp.copy(self.fresh[self._runs % len(self.fresh)])  # the program takes it over
        self._runs += 1
        count, state = jax.block_until_ready((jnp.int32(turns), (fresh, *self.state[1:])))
        started = time.perf_counter()
        self.state = self._program(count, state, self.held)
        jax.block_until_ready(self.state)
        return time.perf_counter() - started

    def calibrate(self) -> None:
        """Choose how many turns make a loop long enough to be read."""
        self.run(FEW)
        turns = 1
        while (taken := self.run(turns)) < SECONDS and turns < MOST_TURNS:
            turns *= 2
        if self.block == 1 and taken / turns < SHORT and platform_of() == "gpu":
            self.block, self._program = BLOCK, self._compile(BLOCK)
            return self.calibrate()
        self.turns = FEW + turns

    def __call__(self) -> Timing:
        """Seconds of one call on the device, from one pair of loops; a contestant of `timing.interleaved`."""
        if not self.turns:
            self.calibrate()
        self.dispatch += Timing((self.run(0),))
        few, many = self.run(FEW), self.run(self.turns)
        return Timing(((many - few) / (self.turns - FEW) / self.block,))
