"""Checks of arguments that the ops share: types and shapes in every call, values where the arrays are concrete.

Values of traced arrays cannot be checked. The ops then read nothing outside of their arrays, and their docstrings say
what wrong values give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_array(op: str, name: str, x: Any, *kinds: str) -> None:
    """Raise ValueError unless `x` is an array (or has its shape and dtype) of one of these kinds of jax.numpy types."""
    wanted = f"{op}: {name} must be an array of {' or '.join(kinds)} type, got"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{wanted} {type(x).__name__}" + (": give jnp.asarray of it" if isinstance(x, list) else ""))
    if not any(jnp.issubdtype(x.dtype, getattr(jnp, kind)) for kind in kinds):
        raise ValueError(f"{wanted} {x.dtype}")


def check_whole(op: str, name: str, x: Any) -> None:
    """Raise ValueError unless a static argument is an int. A float would fail later, inside a loop."""
    if not isinstance(x, int | np.integer) or isinstance(x, bool):
        raise ValueError(f"{op}: {name} must be a whole number, got {x!r}")


def seen(*arrays: Any) -> list[np.ndarray] | None:
    """The arrays' values; None if one has none here: it is traced, only a shape, or partly on other hosts."""
    for x in arrays:
        held = isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
        if not held or not getattr(x, "is_fully_addressable", True):
            return None
    return [np.asarray(x).astype(np.int64) for x in arrays]


def refuse_row(wrong: np.ndarray, message: Callable[[int], str]) -> None:
    """Raise ValueError with the message for the first wrong row, if any is wrong."""
    rows = np.flatnonzero(wrong)
    if rows.size:
        raise ValueError(message(int(rows[0])))
