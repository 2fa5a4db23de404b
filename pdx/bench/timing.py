"""Wall time of device work: after a warm-up, waited for, repeated, with its spread.

A "timed function" is a function without arguments that does some work and returns its `Timing`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.seconds + other.seconds)

    def per(self, n: int) -> Timing:
        """The seconds divided by n."""
        return Timing(tuple(s / n for s in self.seconds))


def once(work: Callable[[], Any]) -> Timing:
    """The seconds of one call, including the wait for its result on the device."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return Timing((time.perf_counter() - start,))


def interleaved(
    contestants: dict[str, Callable[[], Timing]], rounds: int, *, warm_up: bool = True
) -> dict[str, Timing]:
    """Run all timed functions in turn, `rounds` times, so that a disturbance affects all alike.

    `warm_up=False`: skip the first, uncounted run of each.
    """
    for work in contestants.values() if warm_up else ():
        work()
    times = {name: Timing(()) for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            times[name] += work()
    return times


def read_bandwidth(megabytes: int = 512) -> Callable[[], Timing]:
    """A timed function that sums an array too large for any cache; `bytes_read` is the array's size.

    Its bandwidth is the ceiling of a decode step.
    """
    array = jax.random.normal(jax.random.key(0), (megabytes, 1 << 18), "float32")
    total = jax.jit(lambda x: x.sum())

    def work() -> Timing:
        return once(lambda: total(array))

    work.bytes_read = array.nbytes
    return work


def matmul_rate(size: int = 2048) -> Callable[[], Timing]:
    """A timed function that multiplies two square f32 matrices; `flops` is its FLOPs.

    Its rate is the ceiling of a prefill.
    """
    a, b = (jax.random.normal(jax.random.key(i), (size, size), "float32") for i in range(2))
    multiply = jax.jit(lambda a, b: jax.numpy.dot(a, b, precision="highest"))

    def work() -> Timing:
        return once(lambda: multiply(a, b))

    work.flops = 2 * size**3
    return work
