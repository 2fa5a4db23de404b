"""Programs that are compiled once, before their first run; and a clock that leaves compilation out."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@dataclass
class Clock:
    """Measures a run in seconds. `compile_s`: seconds of the run that were spent on compiling."""

    begin: float = field(default_factory=time.perf_counter)
    compile_s: float = 0.0

    def now(self) -> float:
        """Seconds since `begin`, without those spent on compiling."""
        return time.perf_counter() - self.begin - self.compile_s


class Programs:
    """Compiled programs by key. A program is compiled once, for the arguments of the first call. Threads may share one.

    Arguments of another shape raise TypeError instead of compiling again.

        programs, double = Programs(), jax.jit(lambda x: 2 * x)
        y = programs.call("double", double, x=np.ones(3))  # compiles, then runs
        y = programs.call("double", double, x=np.ones(3))  # runs
    """

    def __init__(self):
        self.compile_s = 0.0  # seconds of compilation so far
        self._by_key: dict[Hashable, Callable] = {}
        weakref.finalize(self, _release, self._by_key).atexit = False
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._by_key)

    def call(
        self,
        key: Hashable,
        function: Callable,
        *,
        static: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        **arguments: Any,
    ) -> Any:
        """Run the program of `key`.

        Args:
          static: the function's static arguments.
          clock: the seconds spent on compiling, or on waiting for another thread that compiles, are added to it.
        """
        program, seconds = self._get(key, function, arguments, static or {})
        if clock is not None:
            clock.compile_s += seconds
        return program(**arguments)

    def _get(
        self, key: Hashable, function: Callable, arguments: Mapping[str, Any], static: Mapping[str, Any]
    ) -> tuple[Callable, float]:
        """The program of `key`, and the seconds spent on getting it (0 if it was compiled before)."""
        if key in self._by_key:
            return self._by_key[key], 0.0
        start = time.perf_counter()
        with self._lock:
            if key not in self._by_key:
                self._by_key[key] = _compiled(function, static, arguments)
                self.compile_s += time.perf_counter() - start
        return self._by_key[key], time.perf_counter() - start


def _compiled(function: Any, static: Mapping[str, Any], arguments: Mapping[str, Any]) -> Callable:
    """A jitted function, compiled for these arguments.

    JAX keeps a compiled program as long as its function lives, and a step lives as long as the process. So each program
    is compiled from a wrapper of its own; when that is freed, so is the program.
    """

    def wrapper(**arguments):
        return function(**arguments, **static)

    wrapper.__name__ = function.__name__  # the name in profiles and compiler output
    infos = function.trace(**arguments, **static).args_info[1]
    donated = [name for name, info in infos.items() if any(x.donated for x in jax.tree.leaves(info))]
    jitted = jax.jit(wrapper, donate_argnames=donated)
    program = jitted.lower(**arguments).compile()
    _return_free_memory()
    # The jitted function finds the program that was just compiled.
    return jitted if any(map(_needs_jit, jax.tree.leaves(arguments))) else program


def _release(programs: dict[Hashable, Callable]) -> None:
    """Free the programs of a `Programs` that is garbage-collected."""
    programs.clear()
    _return_free_memory()


def _return_free_memory() -> None:
    """Return free memory to the system. glibc keeps about 100 MB after a compilation; other libcs lack this call."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _needs_jit(x: Any) -> bool:
    """Whether a compiled program of JAX 0.10 refuses this array: int4, committed to devices (as on a mesh)."""
    return isinstance(x, jax.Array) and x.dtype == jnp.int4 and x.committed
