"""Attention problems with their right answers, and the check that an answer has to pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.cases import Case, Drawn, draw
from pallas_kernels.layouts import Layout
from tests.support import dense_attention

# Largest difference to float64 in units of the values, which are standard normal. bf16 keeps 8 bits: inputs are
# rounded to it before both are computed, so what is left is the rounding of the weights and of the result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 1e-5}
STATIC = (
    "scale",
    "causal",
    "window",
    "softcap",
    "layout",
    "kv_heads",
    "value_dim",
    "return_lse",
    "implementation",
    "interpret",
    "config",
)


@cache
def jitted(op):
    return jax.jit(op, static_argnames=[name for name in signature(op).parameters if name in STATIC])


@dataclass(frozen=True)
class Problem:
    """A case with numbers in it, laid out as a cache, and what attention over it is."""

    drawn: Drawn
    layout: Layout
    arrays: dict[str, jnp.ndarray]
    answer: np.ndarray | None
    answer_lse: np.ndarray | None

    @property
    def case(self) -> Case:
        return self.drawn.case

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE[self.case.dtype], TOLERANCE[self.case.kv_dtype or self.case.dtype])

    def arguments(self, **changes) -> dict:
        """Of a call; `changes` replace them."""
        return self.arrays | self.case.settings(self.layout) | changes

    def run(self, op, **changes):
        """The op on this problem, compiled; `changes` replace arguments."""
        return jitted(op)(**self.arguments(**changes))

    def float64(self, **changes) -> tuple[np.ndarray, np.ndarray]:
        """The answer and its log-sum-exp by `dense_attention.attend`; `changes` replace arguments, for a wrong one."""
        case, drawn = self.case, self.drawn
        keys, values = drawn.histories()
        arguments = {
            "q": drawn.q,
            "keys": keys,
            "values": values,
            "positions": case.positions,
            "lengths": case.lengths,
            "scale": case.settings()["scale"],
            "window": case.window,
            "softcap": case.softcap,
            "sinks": drawn.sinks,
            "tree": drawn.tree,
            "causal": case.causal,
        }
        return dense_attention.attend(**arguments | changes)

    def check(self, out, lse=None) -> None:
        """AssertionError unless `out` is right for every real query and finite for padding, and so `lse`, if given."""
        case, out = self.case, np.asarray(out, np.float64)
        assert out.shape == self.answer.shape, f"{case.name}: shape {out.shape}, expected {self.answer.shape}"
        assert np.isfinite(out).all(), f"{case.name}: {np.count_nonzero(~np.isfinite(out))} values are not finite"
        pairs = [("out", out, self.answer)]
        if lse is not None:
            pairs.append(("lse", np.asarray(lse, np.float64), self.answer_lse))
        for name, x, right in pairs:
            assert x.shape == right.shape, f"{case.name}: {name} {x.shape}, expected {right.shape}"
            off = np.abs(x[case.real] - right[case.real])
            worst = off.max(initial=0.0)
            assert worst <= self.tolerance, f"{case.name}: {name} differs by {worst:.3g} from float64"


def make(case: Case, seed: int = 0, unwritten: float = float("nan"), layout: Layout = "heads_first") -> Problem:
    """Fill a case with numbers; slots that were never written have `unwritten` in them."""
    drawn = draw(case, seed, unwritten)
    problem = Problem(drawn, layout, drawn.arguments(layout), None, None)
    answer, lse = problem.float64()
    return replace(problem, answer=answer, answer_lse=lse)
