"""Cases of attention over a dense cache, and random data for them.

Each op lists its cases in `cases.py`; tests, the tuner, AOT compilation and benchmarks share them.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import SUBLANES, Layout, cache_shape, round_up, to_layout


@dataclass(frozen=True)
class Case:
    """Rows that hold `held` tokens and get `new` more, at most T. A row with `new` 0 is inactive."""

    name: str
    held: tuple[int, ...]
    new: tuple[int, ...]
    queries: int  # T
    slots: int  # S
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    value_dim: int | None = None  # None: head_dim
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    tree: bool = False
    scale: float | None = None
    dtype: str = "float32"
    kv_dtype: str | None = None  # None: dtype
    full: bool = False  # every row holds S tokens, and the op gets no lengths
    smoke: bool = False  # part of the short list for AOT compilation

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def quantized(self) -> bool:
        return self.kv_dtype == "int8"

    @property
    def lengths(self) -> np.ndarray:
        """The op's `lengths`: tokens held, the new ones included; 0 for an inactive row."""
        return np.array([h + n if n else 0 for h, n in zip(self.held, self.new, strict=True)], np.int32)

    @property
    def positions(self) -> np.ndarray:
        """[B, T]: positions of the queries."""
        return (np.array(self.held)[:, None] + np.arange(self.queries)).astype(np.int32)

    @property
    def real(self) -> np.ndarray:
        """[B, T]: true for queries that are not padding."""
        return np.arange(self.queries) < np.array(self.new)[:, None]

    def settings(self, layout: Layout = "heads_first") -> dict:
        """The static arguments of a call."""
        return {
            "scale": self.head_dim**-0.5 if self.scale is None else self.scale,
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "layout": layout,
            "kv_heads": self.kv_heads,
            "value_dim": self.value_dim or self.head_dim,
        }

    def abstract(self, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
        """The array arguments of a call as shapes, for compiling."""
        b, t, kv_dtype = len(self.held), self.queries, jnp.dtype(self.kv_dtype or self.dtype)
        shapes = {
            "q": ((b, t, self.heads, self.head_dim), jnp.dtype(self.dtype)),
            "k": (cache_shape(layout, b, self.slots, self.kv_heads, self.head_dim), kv_dtype),
            "v": (cache_shape(layout, b, self.slots, self.kv_heads, self.value_dim or self.head_dim), kv_dtype),
            "starts": ((b,), jnp.int32),
        }
        if not self.full:
            shapes["lengths"] = ((b,), jnp.int32)
        if self.sinks:
            shapes["sinks"] = ((self.heads,), jnp.float32)
        if self.tree:
            shapes["tree"] = ((b, t, t), jnp.bool_)
        if self.quantized:
            scale = (b, round_up(self.kv_heads, SUBLANES), self.slots)
            shapes |= {"k_scale": (scale, jnp.float32), "v_scale": (scale, jnp.float32)}
        return {name: jax.ShapeDtypeStruct(*x) for name, x in shapes.items()}


@dataclass(frozen=True)
class Drawn:
    """A case with data: the queries, and each row's keys and values, from which a cache is made."""

    case: Case
    q: np.ndarray  # [B, T, N, H] f32
    keys: np.ndarray  # [B, longest, K, H] f32 (int8: the integers)
    values: np.ndarray
    key_scales: np.ndarray | None  # [B, longest, K]
    value_scales: np.ndarray | None
    sinks: np.ndarray | None  # [N]
    tree: np.ndarray | None  # [B, T, T]
    unwritten: float  # content of slots that were never written

    def histories(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, dequantized where they are int8."""
        if not self.case.quantized:
            return self.keys, self.values
        return self.keys * self.key_scales[..., None], self.values * self.value_scales[..., None]

    def arguments(self, layout: Layout = "heads_first") -> dict:
        """The array arguments of a call, with K and V as a ring in `layout`."""
        case, kv_dtype = self.case, jnp.dtype(self.case.kv_dtype or self.case.dtype)
        stored = [h + n for h, n in zip(case.held, case.new, strict=True)]  # an inactive row still holds its tokens

        def cache(history):
            slots = write_ring(history, stored, case.slots, 0.0 if case.quantized else self.unwritten)
            return to_layout(jnp.asarray(slots, kv_dtype), layout)

        def scales(history):  # [B, S, K] -> [B, Kp, S]
            ring = write_ring(history, stored, case.slots, self.unwritten)
            extra = round_up(case.kv_heads, SUBLANES) - case.kv_heads
            padded = np.pad(ring, [(0, 0), (0, 0), (0, extra)], constant_values=self.unwritten)
            return jnp.asarray(padded.transpose(0, 2, 1))

        arrays = {
            "q": jnp.asarray(self.q, case.dtype),
            "k": cache(self.keys),
            "v": cache(self.values),
            "starts": jnp.asarray(case.held, jnp.int32),
            "lengths": None if case.full else jnp.asarray(case.lengths),
        }
        if case.sinks:
            arrays["sinks"] = jnp.asarray(self.sinks)
        if case.tree:
            arrays["tree"] = jnp.asarray(self.tree)
        if case.quantized:
            arrays |= {"k_scale": scales(self.key_scales), "v_scale": scales(self.value_scales)}
        return arrays


def write_ring(history: np.ndarray, lengths, slots: int, unwritten: float) -> np.ndarray:
    """A cache [B, S, ...] after each row's tokens were written in turn; slots never written hold `unwritten`."""
    cache = np.full((history.shape[0], slots, *history.shape[2:]), unwritten, np.float32)
    for row, length in enumerate(lengths):
        for position in range(max(0, length - slots), length):
            cache[row, position % slots] = history[row, position]
    return cache


def draw(case: Case, seed: int = 0, unwritten: float = float("nan")) -> Drawn:
    """Fill a case with standard normal numbers, rounded to their types.

    Queries are three times as large: the softmax gets uneven weights, and the soft cap has an effect.
    """
    rng = np.random.default_rng(seed)
    batch, longest = len(case.held), max(*(h + n for h, n in zip(case.held, case.new, strict=True)), 1)
    kv_dtype = jnp.dtype(case.kv_dtype or case.dtype)

    def normal(shape, dtype, size=1.0):
        return (rng.standard_normal(shape) * size).astype(dtype).astype(np.float32)

    def history(dim):
        shape = (batch, longest, case.kv_heads, dim)
        if not case.quantized:
            return normal(shape, kv_dtype), None
        whole = rng.integers(-127, 128, shape).astype(np.float32)
        return whole, rng.uniform(0.2, 1.8, shape[:3]).astype(np.float32) / 73  # about 1 in size

    q = normal((batch, case.queries, case.heads, case.head_dim), jnp.dtype(case.dtype), 3.0)
    (keys, key_scales), (values, value_scales) = history(case.head_dim), history(case.value_dim or case.head_dim)
    sinks = normal((case.heads,), np.float32, 2.0) if case.sinks else None
    tree = None
    if case.tree:
        tree = np.tril(rng.random((batch, case.queries, case.queries)) < 0.5) | np.eye(case.queries, dtype=bool)
    return Drawn(case, q, keys, values, key_scales, value_scales, sinks, tree, unwritten)
