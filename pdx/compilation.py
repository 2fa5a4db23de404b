"""Compiling: programs that are compiled once, and the persistent cache, on by default in pdx's own folder."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import platformdirs

OFF = ("0", "off", "no", "false")


def home() -> Path:
    """Where pdx keeps models and compiled programs: `PDX_HOME`, else the platform's cache folder."""
    return Path(os.environ.get("PDX_HOME") or platformdirs.user_cache_dir("pdx", appauthor=False))


def enable_cache() -> Path | None:
    """Switch JAX's persistent compilation cache on, unless the user has set one up or switched it off.

    `PDX_COMPILATION_CACHE` is a folder, or `off`; a cache that JAX was told of already
    (`JAX_COMPILATION_CACHE_DIR`) is left alone. Returns the folder in use, None if there is none.
    """
    import jax

    wanted = os.environ.get("PDX_COMPILATION_CACHE", "")
    if wanted.lower() in OFF and wanted:
        return None
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = Path(wanted) if wanted else home() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs count too: a step is made of a few of them, and each costs a second start-up time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


class Programs:
    """Compiled programs by key. Each is compiled once, from the arguments that it is first wanted for, whichever thread
    wants it.

    A compiled program is called as such: arguments of other shapes raise, nothing is compiled by the way.
    """

    def __init__(self):
        self.compile_s = 0.0  # seconds of compilation so far
        self._compiled: dict[Hashable, Callable] = {}
        self._lock = threading.RLock()

    def get(
        self, key: Hashable, function, arguments: Mapping[str, Any], static: Mapping[str, Any]
    ) -> tuple[Callable, float]:
        """The program of `key`, to be called with `arguments`, and the seconds that were spent until it was there."""
        if key in self._compiled:
            return self._compiled[key], 0.0
        start = time.perf_counter()
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = function.lower(**arguments, **static).compile()
                self.compile_s += time.perf_counter() - start
        return self._compiled[key], time.perf_counter() - start
