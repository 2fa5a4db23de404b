"""Device time of a call, without the host's launch.

Calls run one after another in a loop inside one program. Each uses a value of the previous result
(`pallas_kernels.analysis.timing_loop`), so that none can be hoisted, skipped or overlapped; the whole result is part of
the loop's state, so that all of it is computed.

The number of turns is an argument of the program. The time of a turn is the difference of a long and a short loop,
divided by the difference of their turns, which removes the launch. A loop without turns measures the launch.

On a GPU, the host checks before each turn of such a loop whether it ends, which takes tens of microseconds that the
difference does not remove. A loop of constant length has no such check. So short calls are repeated there in blocks of
constant length.
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

LONG_LOOP_S = 0.1  # a long loop takes at least this many seconds
MOST_TURNS = 1 << 14
SHORT_TURNS = 1  # turns of the short loop
BLOCK, BLOCK_BELOW_S = 64, 1e-3  # on a GPU, calls shorter than this are repeated in blocks of 64


@dataclass
class Loop:
    """A compiled loop that times a call.

    Attributes:
      turn: (state, held) -> state, the body of the loop. Its result must depend on its state.
      state: a tuple, the first turn's state. It is donated, so that a cache in it is updated in place.
      fresh: values for the first element of the state, used in turn, so that no run repeats the previous one.
      held: arrays that every turn reads: weights, keys and values.
      compile_seconds: of the loop.
      turns: of the long loop; 0 before `calibrate`.
      dispatch: seconds of launches without work.
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
        """The text of the optimized program, which shows what really runs."""
        return self._program.as_text()

    def run(self, turns: int) -> float:
        """Seconds of a loop of `turns` turns, as the host measures them. Its result becomes the next state."""
        fresh = jnp.copy(self.fresh[self._runs % len(self.fresh)])  # a copy, since the program donates it
        self._runs += 1
        count, state = jax.block_until_ready((jnp.int32(turns), (fresh, *self.state[1:])))
        started = time.perf_counter()
        self.state = self._program(count, state, self.held)
        jax.block_until_ready(self.state)
        return time.perf_counter() - started

    def calibrate(self) -> None:
        """Choose the number of turns of the long loop."""
        self.run(SHORT_TURNS)
        turns = 1
        while (taken := self.run(turns)) < LONG_LOOP_S and turns < MOST_TURNS:
            turns *= 2
        if self.block == 1 and taken / turns < BLOCK_BELOW_S and platform_of() == "gpu":
            self.block, self._program = BLOCK, self._compile(BLOCK)
            return self.calibrate()
        self.turns = SHORT_TURNS + turns

    def __call__(self) -> Timing:
        """Seconds of one call on the device, from a short and a long loop; see `timing.interleaved`."""
        if not self.turns:
            self.calibrate()
        self.dispatch += Timing((self.run(0),))
        short, long = self.run(SHORT_TURNS), self.run(self.turns)
        return Timing(((long - short) / (self.turns - SHORT_TURNS) / self.block,))
