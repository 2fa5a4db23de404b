"""Numbers from callers: Python's, numpy's, or zero-dimensional arrays. They are checked once and made plain."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

from pdx.errors import RequestError


def plain(value: Any) -> Any:
    """A zero-dimensional array (numpy's or jax's) as a Python number; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def number(name: str, value: Any, low: float, high: float, hint: str = "", *, open_below: bool = False) -> float:
    """`value` as a float in [low, high] (in (low, high] with `open_below`), always finite. Raises RequestError."""
    value = plain(value)
    # Compared first: a whole number may be too large for a float.
    good = _is_number(value) and abs(value) <= sys.float_info.max
    if not good or value > high or value < low or (open_below and value == low):
        above = f"{'above' if open_below else 'at least'} {low:g}"
        span = f"{above} and finite" if high == math.inf else f"{above} and at most {high:g}"
        raise RequestError(f"{name} is {value!r}: it must be a number {span}{hint}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def integer(name: str, value: Any, low: int | None = None, high: int | None = None, hint: str = "") -> int:
    """`value` as an int from `low` to `high` (None: no limit). Raises RequestError, also for a bool."""
    value = plain(value)
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or (low is not None and value < low) or (high is not None and value > high):
        span = "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
        raise RequestError(f"{name} is {value!r}: it must be a whole number{span}{hint}")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """`value` as a bool. Raises RequestError for anything but true and false."""
    value = plain(value)
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}: it must be true or false")
    return value
