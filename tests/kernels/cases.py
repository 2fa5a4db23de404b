"""One list of attention problems for every op and every implementation of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels import dense

# Largest difference to float64 in units of the values, which are standard normal. bf16 keeps 8 bits: inputs are
# rounded to it before both are computed, so what is left is the rounding of the weights and of the result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Case:
    """Rows that hold `held` tokens and are given `new` more, at most T; a row with `new` 0 takes no part."""

    name: str
    held: tuple[int, ...]
    new: tuple[int, ...]
    queries: int  # T
    slots: int  # S
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    dtype: str = "float32"
    kv_dtype: str | None = None  # None: dtype

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE[self.dtype], TOLERANCE[self.kv_dtype or self.dtype])

    @property
    def lengths(self) -> np.ndarray:
        """What the op is told: tokens held, the new ones included; 0 for a row that takes no part."""
        return np.array([h + n if n else 0 for h, n in zip(self.held, self.new, strict=True)], np.int32)

    @property
    def positions(self) -> np.ndarray:
        return (np.array(self.held)[:, None] + np.arange(self.queries)).astype(np.int32)

    @property
    def real(self) -> np.ndarray:
        """[B, T]: which queries are not padding."""
        return np.arange(self.queries) < np.array(self.new)[:, None]

    def settings(self) -> dict:
        return {
            "query_positions": jnp.asarray(self.positions),
            "lengths": jnp.asarray(self.lengths),
            "scale": self.head_dim**-0.5 if self.scale is None else self.scale,
            "window": self.window,
            "softcap": self.softcap,
        }


@cache
def jitted(op):
    return jax.jit(op, static_argnames=("scale", "window", "softcap"))


@dataclass(frozen=True)
class Problem:
    """A case with numbers in it: the cache as arrays, and what attention over it is."""

    case: Case
    q: jnp.ndarray
    k: jnp.ndarray
    v: jnp.ndarray
    keys: np.ndarray  # the histories [B, length, K, H] behind k and v
    values: np.ndarray
    answer: np.ndarray | None

    def run(self, op, **changes):
        """The op on this problem, compiled; `changes` replace arguments."""
        return jitted(op)(**{"q": self.q, "k": self.k, "v": self.v} | self.case.settings() | changes)

    def float64(self, **changes) -> np.ndarray:
        """The answer by `dense.attend`; `changes` replace arguments, to make it a wrong one."""
        case = self.case
        arguments = {
            "q": self.q, "keys": self.keys, "values": self.values, "positions": case.positions,
            "lengths": case.lengths, "scale": case.settings()["scale"], "window": case.window,
            "softcap": case.softcap,
        }  # fmt: skip
        return dense.attend(**arguments | changes)

    def check(self, out) -> None:
        """AssertionError unless `out` is right for every real query and finite for padding."""
        case, out = self.case, np.asarray(out, np.float64)
        assert out.shape == self.answer.shape, f"{case.name}: shape {out.shape}, expected {self.answer.shape}"
        assert np.isfinite(out).all(), f"{case.name}: {np.count_nonzero(~np.isfinite(out))} values are not finite"
        off = np.abs(out - self.answer)[case.real]
        worst = off.max(initial=0.0)
        assert worst <= case.tolerance, f"{case.name}: differs by {worst:.3g} from float64"


def make(case: Case, seed: int = 0, unwritten: float = float("nan")) -> Problem:
    """Fill a case with standard normal numbers; slots that were never written have `unwritten` in them.

    Queries are three times as large, so that a softmax has something to choose and a cap something to bend.
    """
    rng = np.random.default_rng(seed)
    batch, longest = len(case.held), max(*(h + n for h, n in zip(case.held, case.new, strict=True)), 1)

    kv_dtype = jnp.dtype(case.kv_dtype or case.dtype)

    def draw(shape, dtype, size=1.0):
        return (rng.standard_normal(shape) * size).astype(dtype).astype(np.float32)

    q = draw((batch, case.queries, case.kv_heads * case.group, case.head_dim), jnp.dtype(case.dtype), 3.0)
    keys, values = (draw((batch, longest, case.kv_heads, case.head_dim), kv_dtype) for _ in "kv")
    stored = [h + n for h, n in zip(case.held, case.new, strict=True)]  # a row that takes no part still holds
    k, v = (jnp.asarray(dense.ring(x, stored, case.slots, unwritten), kv_dtype) for x in (keys, values))
    problem = Problem(case, jnp.asarray(q, case.dtype), k, v, keys, values, None)
    return replace(problem, answer=problem.float64())


# Up to 16 queries a row: every op takes these.
FEW = (
    Case("one token, ragged", (0, 5, 127, 40), (1, 1, 1, 1), 1, 128, group=3, kv_heads=1, head_dim=64),
    Case("one query head a KV head", (7, 100), (1, 1), 1, 128, group=1, kv_heads=4),
    Case("eight query heads a KV head", (130, 3), (1, 1), 1, 256, group=8, kv_heads=1, head_dim=64),
    Case("rows that take no part", (9, 0, 20, 0), (1, 0, 0, 1), 1, 128, group=3),
    Case("nobody takes part", (9, 0), (0, 0), 2, 128),
    Case("draft of four, ragged", (60, 2, 127), (5, 1, 3), 5, 256, group=3),
    Case("a prime number of slots", (70, 112), (1, 1), 1, 113),
    Case("slots that are not whole blocks, a scale", (350, 20), (2, 2), 2, 384, scale=0.05),
    Case("window of one", (60, 2), (3, 3), 3, 128, window=1),
    Case("window smaller than a block", (200, 2, 90), (4, 4, 4), 4, 256, window=20, group=3),
    Case("window of exactly a block", (300, 127), (2, 2), 2, 384, window=128),
    Case("window larger than a block", (330, 10), (2, 2), 2, 384, window=300),
    Case("ring that wrapped, rows far apart", (1000, 5, 131, 127, 700), (1, 1, 1, 1, 0), 1, 128, window=100, group=3),
    Case("ring of several blocks, rows far apart", (900, 40, 385), (5, 5, 2), 5, 384, window=364),
    Case("soft cap and window", (200, 2), (3, 3), 3, 256, softcap=2.0, window=50, head_dim=64),
    Case("bf16", (60, 200), (1, 1), 1, 256, dtype="bfloat16", head_dim=64, group=3),
    Case("bf16 cache, f32 queries", (60, 200), (3, 2), 3, 256, kv_dtype="bfloat16"),
    Case("bf16, window, soft cap", (300, 20), (4, 2), 4, 256, dtype="bfloat16", window=99, softcap=5.0),
)

# A chunk of a prompt. The XLA path's blocks are 256 queries by at most 256 keys.
CHUNKS = (
    Case("whole prompts, ragged", (0, 0, 0, 0), (40, 1, 0, 17), 40, 128, group=3),
    Case("chunk behind a context", (100, 0, 7), (28, 28, 3), 28, 128),
    Case("exactly one query block", (10,), (256,), 256, 384, kv_heads=1),
    Case("one query more than a block, ragged", (0, 30), (257, 90), 257, 384, kv_heads=1, group=1),
    Case("slots not a multiple of 128", (60, 0), (33, 20), 33, 100),
    Case("chunk longer than the window", (0, 50), (60, 40), 60, 128, window=7),
    Case("query blocks that see different keys", (100,), (280,), 280, 512, window=60, kv_heads=1),
    Case("ring that wrapped, rows far apart", (1000, 0, 129), (30, 30, 11), 30, 128, window=99, group=3),
    Case("ring that wraps inside the chunk", (110, 250), (40, 40), 40, 128, window=60),
    Case("soft cap", (20, 0), (40, 30), 40, 128, softcap=2.0, head_dim=64),
    Case("bf16, ring, soft cap", (500, 0), (40, 30), 40, 128, dtype="bfloat16", window=70, softcap=5.0),
)
