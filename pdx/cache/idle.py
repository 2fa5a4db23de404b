"""Caches that no run uses at the moment, kept for the next run of their shape, up to a bound in bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pdx.cache.dense import DenseCache

# Of all idle caches of a model together; the one used last may be larger.
IDLE_BYTES = 512 << 20


@dataclass
class Held:
    """What a run holds. `cache` is None while a step has it: a run that ends there gives none back."""

    cache: DenseCache | None


class IdleCaches:
    """Lends caches to runs: a run takes an idle one of its shape, or makes one. So runs never share a cache.

    When the idle ones exceed `limit` bytes, those used least recently are dropped. Thread-safe.
    """

    def __init__(self, limit: int = IDLE_BYTES):
        self.limit = limit
        self._idle: list[tuple[Hashable, int, DenseCache]] = []  # used last: at the end
        self._lock = threading.Lock()
        # An abandoned run ends when Python collects it, which may be in any thread and inside any call, those below
        # included. A `SimpleQueue` may be filled even then.
        self._returned: queue.SimpleQueue = queue.SimpleQueue()

    @contextmanager
    def lend(self, key: Hashable, size: int, make: Callable[[], DenseCache]) -> Iterator[Held]:
        """A cache for the `with` block. `key`: its shape and kind; `size`: its bytes."""
        held = Held(self._take(key, size) or make())
        try:
            yield held
        finally:
            if held.cache is not None:
                self._returned.put((key, size, held.cache))
                if self._lock.acquire(blocking=False):  # whoever has it, or comes next, sees to the limit
                    try:
                        self._settle(0)
                    finally:
                        self._lock.release()

    @property
    def idle_bytes(self) -> int:
        with self._lock:
            self._settle(0)
            return sum(size for _, size, _ in self._idle)

    def _take(self, key: Hashable, size: int) -> DenseCache | None:
        with self._lock:
            self._settle(0)
            for at in reversed(range(len(self._idle))):
                if self._idle[at][0] == key:
                    return self._idle.pop(at)[2]
            self._settle(size)
            return None

    def _settle(self, wanted: int) -> None:
        """Take in what was returned and drop what is too much beside `wanted` bytes about to be allocated."""
        while not self._returned.empty():
            self._idle.append(self._returned.get_nowait())
        spare = 0 if wanted else 1  # what was used last stays, unless its place is needed
        while len(self._idle) > spare and wanted + sum(size for _, size, _ in self._idle) > self.limit:
            del self._idle[0]
