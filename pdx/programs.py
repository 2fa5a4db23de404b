"""Programs that are compiled once, before they first run, with the compile time kept apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


class Programs:
    """Compiled programs by key. `compile_s` counts the seconds spent on compiling.

        programs, double = Programs(), jax.jit(lambda x: 2 * x)
        y = programs.call("double", double, x=np.ones(3))  # compiles, then runs
        y = programs.call("double", double, x=np.ones(3))  # runs
    """

    def __init__(self):
        self.compile_s = 0.0
        self._known: dict[Hashable, Callable] = {}

    def __len__(self) -> int:
        return len(self._known)

    def call(
        self, key: Hashable, function: Callable, *, static: Mapping[str, object] | None = None, **arguments: Any
    ) -> Any:
        """Run the program of `key`. The first call compiles `function`, a jitted one, for these arguments.

        `static` are the function's static arguments. Arguments of another shape raise TypeError; with int4 on a mesh
        they compile anew.
        """
        if key not in self._known:
            self._known[key] = self._compiled(function, static or {}, arguments)
        return self._known[key](**arguments)

    def _compiled(self, function: Callable, static: Mapping[str, object], arguments: Mapping[str, Any]) -> Callable:
        start = time.perf_counter()
        program = function.lower(**arguments, **static).compile()
        self.compile_s += time.perf_counter() - start
        if not any(map(_refused, jax.tree.leaves(arguments))):
            return program
        # The jitted function takes such arrays, and finds the program that was just compiled.
        return lambda **arguments: function(**arguments, **static)


def _refused(x: Any) -> bool:
    """Whether JAX 0.10 hands no compiled program this array: int4 that is committed to devices, as on a mesh."""
    return isinstance(x, jax.Array) and x.dtype == jnp.int4 and x.committed
