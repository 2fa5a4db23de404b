"""Measured rates of a device, and how long a step takes at them.

A roofline has two figures of a chip. A real chip multiplies few rows less efficiently than many, and small matrices
less efficiently than large ones, and loses time in between. `Rates` holds what `pdx calibrate` measured: single
products, attention, and the rest of a layer. The time of a step of any model is their sum.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain


@dataclass(frozen=True)
class Surface:
    """A rate measured at the points of a grid: `values[i][j]` at `first[i]`, `second[j]`, both ascending.

    Between the points it is interpolated in logarithms; outside the grid it is the nearest edge's.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        rows = len(self.values)
        if not rows or {len(row) for row in self.values} != {len(self.second)} or rows != len(self.first):
            raise ValueError(f"{rows} rows of rates for {len(self.first)} x {len(self.second)} points")
        if any(list(axis) != sorted(set(axis)) for axis in (self.first, self.second)):
            raise ValueError("the points of a grid of rates must ascend")
        if any(not v > 0 or math.isinf(v) for v in chain(self.first, self.second, *self.values)):
            raise ValueError("rates, and the points where they were measured, must be positive numbers")

    def __call__(self, x: float, y: float) -> float:
        (i, u), (j, v) = _place(self.first, x), _place(self.second, y)
        corners = ((i, j, (1 - u) * (1 - v)), (i + 1, j, u * (1 - v)), (i, j + 1, (1 - u) * v), (i + 1, j + 1, u * v))
        return math.exp(sum(w * math.log(self.values[a][b]) for a, b, w in corners if w))


def _place(axis: tuple[float, ...], x: float) -> tuple[int, float]:
    """The interval of `axis` that contains x, and the position in it (0 to 1, in logarithms); clipped to the axis."""
    if x <= axis[0]:
        return 0, 0.0
    if x >= axis[-1]:
        return len(axis) - 1, 0.0
    i = bisect_right(axis, x) - 1
    return i, math.log(x / axis[i]) / math.log(axis[i + 1] / axis[i])


@dataclass(frozen=True)
class Products:
    """`count` products of `rows` rows with a matrix of `weights` values."""

    stored: str  # float32, bfloat16, int8, w8a8, int4
    rows: int
    weights: int
    count: int


@dataclass(frozen=True)
class Attention:
    """Attention of `layers` layers: `rows` rows of `new` queries each, the last of which sees `seen` keys."""

    kv_dtype: str
    layers: int
    rows: int
    new: int
    seen: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """A step, split into the parts that are measured separately."""

    products: tuple[Products, ...]
    attention: tuple[Attention, ...]
    layers: int
    tokens: int
    width: int  # values per token that a layer's element-wise operations process


@dataclass(frozen=True)
class Rates:
    """Measured rates of one device. The roofline predicts parts without a measured rate.

    Attributes:
      products: weights per second, by rows and by the matrix's number of weights; a surface per storage type.
      prefill_attention: FLOP/s over visible pairs, by new tokens and by the ratio of tokens seen to new ones; a surface
        per cache type.
      decode_attention: bytes of keys and values per second, by rows and by tokens seen; a surface per cache type.
      rest: the rest of a layer: values per second, by tokens and by values per token.
      made: how and when they were measured, in words.
    """

    products: Mapping[str, Surface] = field(default_factory=dict)
    prefill_attention: Mapping[str, Surface] = field(default_factory=dict)
    decode_attention: Mapping[str, Surface] = field(default_factory=dict)
    rest: Surface | None = None
    made: str = ""

    def parts(self, work: Work) -> dict[str, float | None]:
        """Seconds of each part of a step; None for a part without a measured rate."""
        products, attention, rest = [], [], None
        for p in work.products:
            surface = self.products.get(p.stored)
            products.append(surface and p.count * p.weights / surface(p.rows, p.weights))
        for a in work.attention:
            few = a.new <= MAX_DECODE_QUERIES
            surface = (self.decode_attention if few else self.prefill_attention).get(a.kv_dtype)
            amount, at = (a.bytes, (a.rows, a.seen)) if few else (a.flops, (a.new, a.seen / a.new))
            attention.append(surface and amount / surface(*at))
        if self.rest is not None:
            rest = work.layers * work.tokens * work.width / self.rest(work.tokens, work.width)
        return {"products": _total(products), "attention": _total(attention), "rest": rest}


# Attention with up to this many queries per row is decode attention (`pallas_kernels.decode_attention`).
MAX_DECODE_QUERIES = 16


def _total(parts: list[float | None]) -> float | None:
    return None if any(p is None for p in parts) else sum(parts)
