"""Idle caches, kept for the next run of the same shape, up to a limit in bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pdx.cache.dense import DenseCache

# For all idle caches of a model together. The one used last is kept even if it is larger.
IDLE_BYTES = 512 << 20


@dataclass
class Held:
    """A run's cache; None while a step has it (donated), so a run that ends inside a step returns none."""

    cache: DenseCache | None


class IdleCaches:
    """Lends caches to runs: a run takes an idle one of its shape or makes one, so runs never share a cache.

    When idle caches exceed `limit` bytes, the least recently used are dropped. Thread-safe.
    """

    def __init__(self, limit: int = IDLE_BYTES):
        self.limit = limit
        self._idle: list[tuple[Hashable, int, DenseCache]] = []  # most recently used last
        self._lock = threading.Lock()
        # An abandoned run ends when Python collects it: in any thread and inside any call, even those below, which hold
        # the lock. A `SimpleQueue` can be filled even then.
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
                if self._lock.acquire(blocking=False):  # else the lock's holder, or the next caller, enforces the limit
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
        """Collect returned caches, then drop old ones until the limit leaves room for `wanted` bytes."""
        while not self._returned.empty():
            self._idle.append(self._returned.get_nowait())
        spare = 0 if wanted else 1  # the most recently used cache stays, unless its memory is needed
        while len(self._idle) > spare and wanted + sum(size for _, size, _ in self._idle) > self.limit:
            del self._idle[0]
