"""Checks of arguments that the ops share: types and shapes in every call, numbers where there are any to see.

Numbers can be seen only in arrays that hold values. Under a trace nothing is checked: the ops then read nothing outside
of their arrays, and say in their docstrings what they give for such numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_array(op: str, name: str, x: Any, *kinds: str) -> None:
    """Raise ValueError unless `x` is an array, or stands for one, of one of these kinds of jax.numpy's types."""
    wanted = f"{op}: {name} must be an array of {' or '.join(kinds)} type, got"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{wanted} {type(x).__name__}" + (": give jnp.asarray of it" if isinstance(x, list) else ""))
    if not any(jnp.issubdtype(x.dtype, getattr(jnp, kind)) for kind in kinds):
        raise ValueError(f"{wanted} {x.dtype}")


def check_whole(op: str, name: str, x: Any) -> None:
    """Raise ValueError unless a static argument is an int: a float would fail inside of a loop."""
    if not isinstance(x, int | np.integer) or isinstance(x, bool):
        raise ValueError(f"{op}: {name} must be a whole number, got {x!r}")


def seen(*arrays: Any) -> list[np.ndarray] | None:
    """The arrays' numbers; None if one of them has none here: it is traced, only a shape, or on other hosts too."""
    for x in arrays:
        held = isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
        if not held or not getattr(x, "is_fully_addressable", True):
            return None
    return [np.asarray(x).astype(np.int64) for x in arrays]


def refuse_row(wrong: np.ndarray, message: Callable[[int], str]) -> None:
    """Raise ValueError with the message of the first row that is wrong."""
    rows = np.flatnonzero(wrong)
    if rows.size:
        raise ValueError(message(int(rows[0])))
