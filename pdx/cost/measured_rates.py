"""What a device was measured to do, and how long a step takes at these rates.

A roofline knows two figures of a chip. A real one multiplies a few rows more slowly than many, small matrices more
slowly than large ones, and loses time between them. `Rates` holds what `pdx calibrate` measured of single products,
of attention and of a layer's rest; a step of any model is their sum.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain


@dataclass(frozen=True)
class Surface:
    """A rate measured at the crossings of a grid: `values[i][j]` at `first[i]`, `second[j]`, both ascending.

    Between the crossings it is interpolated in logarithms; outside, it is that of the nearest edge.
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
    """Between which points x lies, and how far along, in logarithms; at the edges on the edge."""
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
    """A step in the pieces that are measured one by one."""

    products: tuple[Products, ...]
    attention: tuple[Attention, ...]
    layers: int
    tokens: int
    width: int  # values a token that the layer's element-wise operations pass over


@dataclass(frozen=True)
class Rates:
    """Measured rates of one device. What is not among them is predicted by the roofline.

    Attributes:
      products: by how weights are stored: weights a second, by rows and by weights of the matrix.
      prefill_attention: by the cache's type: FLOP/s of pairs that are seen, by new tokens and by how many times as many
        are seen.
      decode_attention: by the cache's type: bytes of keys and values a second, by rows and by tokens seen.
      rest: of a layer, beside these: values a second, by tokens and by values a token.
      made: with what and when, in words.
    """

    products: Mapping[str, Surface] = field(default_factory=dict)
    prefill_attention: Mapping[str, Surface] = field(default_factory=dict)
    decode_attention: Mapping[str, Surface] = field(default_factory=dict)
    rest: Surface | None = None
    made: str = ""

    def parts(self, work: Work) -> dict[str, float | None]:
        """Seconds of each part of a step; None for a part of which no rate is known."""
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


# Queries a row up to which attention takes the path of decoding (`pallas_kernels.decode_attention`).
MAX_DECODE_QUERIES = 16


def _total(parts: list[float | None]) -> float | None:
    return None if any(p is None for p in parts) else sum(parts)
