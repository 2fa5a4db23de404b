"""JAX's persistent compilation cache, which pdx keeps in its own folder."""

from __future__ import annotations

import os
from pathlib import Path

from pdx.installation.paths import home
from pdx.installation.versions import check

OFF = ("0", "off", "no", "false")
_OPTION = "jax_compilation_cache_dir"


def cache_folder() -> Path | None:
    """The folder of compiled programs, from the environment; None if the cache is off. Imports no jax."""
    wanted = os.environ.get("PDX_COMPILATION_CACHE", "")
    if wanted.lower() in OFF and wanted:
        return None
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or wanted or home() / "xla")


def folder_in_use() -> str | None:
    """The folder of JAX's compilation cache; None (or an empty text) if it has none."""
    import jax

    return getattr(jax.config, _OPTION)


def enable_cache() -> Path | None:
    """Switch JAX's persistent compilation cache on, unless the user has set one up or switched it off.

    `PDX_COMPILATION_CACHE` is a folder, or `off`. A cache that is already configured in JAX
    (`JAX_COMPILATION_CACHE_DIR`) is kept. Returns the folder in use; None if there is none.
    """
    check()
    import jax

    folder = cache_folder()
    if folder is None:
        return None
    if used := folder_in_use():
        return Path(used)
    jax.config.update(_OPTION, str(folder))
    # Small programs are cached too, since together they take seconds to compile at each start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
