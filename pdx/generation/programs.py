"""Programs that are compiled once, before they first run, and the time of a run without their compilation."""

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
    """Seconds of a run since its begin, and those of them that were spent on compiling."""

    begin: float = field(default_factory=time.perf_counter)
    compile_s: float = 0.0

    def now(self) -> float:
        """Seconds since the begin, compilation left out."""
        return time.perf_counter() - self.begin - self.compile_s


class Programs:
    """Compiled programs by key. Each is compiled once, from the arguments that it is first wanted for, whichever thread
    wants it. Arguments of another shape raise TypeError: nothing is compiled by the way.

        programs, double = Programs(), jax.jit(lambda x: 2 * x)
        y = programs.call("double", double, x=np.ones(3))  # compiles, then runs
        y = programs.call("double", double, x=np.ones(3))  # runs
    """

    def __init__(self):
        self.compile_s = 0.0  # seconds of compilation so far
        self._known: dict[Hashable, Callable] = {}
        weakref.finalize(self, _release, self._known).atexit = False
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._known)

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
          clock: told of the seconds that passed until the program was there.
        """
        program, seconds = self._get(key, function, arguments, static or {})
        if clock is not None:
            clock.compile_s += seconds
        return program(**arguments)

    def _get(
        self, key: Hashable, function: Callable, arguments: Mapping[str, Any], static: Mapping[str, Any]
    ) -> tuple[Callable, float]:
        """The program of `key`, to be called with `arguments`, and the seconds that were spent until it was there."""
        if key in self._known:
            return self._known[key], 0.0
        start = time.perf_counter()
        with self._lock:
            if key not in self._known:
                self._known[key] = _compiled(function, static, arguments)
                self.compile_s += time.perf_counter() - start
        return self._known[key], time.perf_counter() - start


def _compiled(function: Callable, static: Mapping[str, Any], arguments: Mapping[str, Any]) -> Callable:
    """The program of a jitted function for these arguments.

    JAX keeps what it compiled as long as the function lives, and a step lives as long as the process. So each program
    is compiled as a function of its own, and goes with it.
    """

    def own(**arguments):
        return function(**arguments, **static)

    own.__name__ = function.__name__  # what profiles and compilers call it
    infos = function.trace(**arguments, **static).args_info[1]
    donated = [name for name, info in infos.items() if any(x.donated for x in jax.tree.leaves(info))]
    own = jax.jit(own, donate_argnames=donated)
    program = own.lower(**arguments).compile()
    _return_free_memory()
    # Such arrays only the jitted function takes; it finds the program that was just compiled.
    return own if any(map(_refused, jax.tree.leaves(arguments))) else program


def _release(programs: dict[Hashable, Callable]) -> None:
    """What becomes of programs that nobody can call any more."""
    programs.clear()
    _return_free_memory()


def _return_free_memory() -> None:
    """Hand free memory back to the system. glibc keeps some 100 MB of a compilation; others have no such call."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _refused(x: Any) -> bool:
    """Whether JAX 0.10 hands no compiled program this array: int4 that is committed to devices, as on a mesh."""
    return isinstance(x, jax.Array) and x.dtype == jnp.int4 and x.committed
