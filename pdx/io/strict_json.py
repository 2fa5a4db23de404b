"""Strict JSON: NaN and infinity, which the standard lacks, become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, **settings) -> str:
    """`value` as JSON that any parser accepts. A float that is not finite becomes null. `settings`: see `json.dumps`.

    >>> dumps({"mean": float("nan"), "count": 0})
    '{"mean": null, "count": 0}'
    """
    try:
        return json.dumps(value, allow_nan=False, **settings)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **settings)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
