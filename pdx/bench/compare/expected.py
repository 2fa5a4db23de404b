"""Random arrays for a case of an op, and the op's right result for them: in f32, by the reference, in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.analysis.problem import Problem
from pallas_kernels.flash_attention.reference import attention
from pallas_kernels.layouts import Layout, to_layout
from pallas_kernels.quant_array import LEVELS, QuantArray, dequantize

CACHES = ("k", "v", "k_pages", "v_pages")
# Random values per array. A larger array repeats them; the period is odd, so that no two rows are equal.
DRAWN = (1 << 22) + 1
PIECE_BYTES = 1 << 28  # the most bytes of attention scores, or of matrix rows in f32, at a time

Arrays = dict[str, jax.Array]


def draw(problem: Problem, seed: int = 0) -> Arrays:
    """The arrays of a problem: lengths and tables are the case's, all others random."""
    rng, found = np.random.default_rng(seed), {}
    for name, x in problem.arrays.items():
        if name in problem.scalars:
            found[name] = jnp.asarray(problem.scalars[name])
        elif name == "tree":
            drawn = np.tril(rng.random(x.shape) < 0.5) | np.eye(x.shape[-1], dtype=bool)
            found[name] = jnp.asarray(drawn)
        else:
            found[name] = jnp.resize(_values(rng, name, x, problem), x.shape)
    return found


def _values(rng: np.random.Generator, name: str, x: jax.ShapeDtypeStruct, problem: Problem) -> jax.Array:
    count = min(prod(x.shape), DRAWN)
    bits = {jnp.dtype(jnp.int8): 8, jnp.dtype(jnp.int4): 4}.get(jnp.dtype(x.dtype))
    if bits:
        return jnp.asarray(rng.integers(-LEVELS[bits], LEVELS[bits] + 1, count), jnp.int8).astype(x.dtype)
    if name in ("k_scale", "v_scale"):
        return jnp.asarray(rng.uniform(0.2, 1.8, count) / 73, x.dtype)  # dequantized values are about 1
    normal = rng.standard_normal(count, np.float32)
    if name == "scales":  # results are about 1
        levels = LEVELS[problem.case.bits]
        return jnp.asarray((1 + 0.2 * normal) * problem.case.columns**-0.5 / levels, x.dtype)
    if name == "offsets":
        return jnp.asarray(0.1 * normal * problem.case.columns**-0.5, x.dtype)
    # Larger queries, so that the softmax is not nearly uniform.
    return jnp.asarray(normal * (3.0 if name == "q" else 1.0), x.dtype)


def in_layout(arrays: Arrays, layout: Layout) -> Arrays:
    """The same arrays with their caches, which are `heads_last`, converted to `layout`."""
    return {name: to_layout(x, layout) if name in CACHES else x for name, x in arrays.items()}


def answer(problem: Problem, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """(the right result in f32, [rows] of bool: which rows are compared). Caches are `heads_last`."""
    make = {"paged_attention": _paged, "quantized_matmul": _matmul}.get(problem.op, _dense)
    return make(problem.case, arrays)


def errors(result: jax.Array, right: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """The largest difference in the compared rows, and its ratio to the largest right value; inf for NaN."""
    off = np.abs(np.asarray(result.astype(jnp.float32)) - right)[real]
    worst = float(off.max(initial=0.0)) if np.isfinite(off).all() else float("inf")
    return worst, worst / max(float(np.abs(right[real]).max(initial=0.0)), 1e-30)


def _piece(size: int, each: int) -> int:
    """How many of `size` items, of `each` f32 values, fit into `PIECE_BYTES`."""
    return max(1, min(size, PIECE_BYTES // (4 * each)))


def _dense(case, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    rows, t = len(case.held), case.queries
    settings = case.settings("heads_last")
    block = t if case.tree else _piece(t, case.heads * case.slots)
    by_row = [n for n in arrays if n not in ("q", "sinks")]

    @jax.jit
    def part(arrays, row, q, start):
        own = {n: jax.lax.dynamic_slice_in_dim(arrays[n], row, 1) for n in by_row}
        own = {"lengths": None} | own | {"starts": own["starts"] + start}
        return attention(q.astype(jnp.float32), **own, **settings, **({"sinks": arrays["sinks"]} if case.sinks else {}))

    out = np.zeros((rows, t, case.heads, case.value_dim or case.head_dim), np.float32)
    for row in np.flatnonzero(case.new):
        for start in range(0, case.new[row], block):
            q = arrays["q"][row : row + 1, start : start + block]
            out[row, start : start + block] = part(arrays, row, q, start)[0]
    return out, case.real


def _paged(case, arrays: Mapping[str, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    """Each row by itself, with its pages concatenated to a dense cache."""
    out = np.zeros((case.packed, case.kv_heads * case.group, case.value_size), np.float32)
    settings = {
        "scale": case.logit_scale,
        "window": case.window,
        "softcap": case.softcap,
        "sinks": arrays.get("sinks"),
        "layout": "heads_last",
    }
    at = 0
    run = jax.jit(
        lambda q, k, v, starts, lengths, scales: attention(
            q.astype(jnp.float32), k, v, starts=starts, lengths=lengths, **scales, **settings
        )
    )
    for row, (length, n) in enumerate(zip(case.lengths, case.queries, strict=True)):
        if n:
            pages = arrays["block_tables"][row, : -(-length // case.page)]
            k, v = (arrays[x][pages].reshape(1, -1, *arrays[x].shape[2:]) for x in ("k_pages", "v_pages"))
            scales = {
                x: jnp.concatenate(list(arrays[x][pages]), -1)[None] for x in ("k_scale", "v_scale") if x in arrays
            }
            lengths = jnp.array([length], jnp.int32)
            out[at : at + n] = run(arrays["q"][None, at : at + n], k, v, lengths - n, lengths, scales)[0]
            at += n
    return out, np.arange(case.packed) < at


def _matmul(case, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    x = arrays["x"].astype(jnp.float32)
    step, pieces = _piece(case.out, case.columns), []
    for at in range(0, case.out, step):
        part = slice(at, at + step)
        offsets = arrays["offsets"][:, part] if "offsets" in arrays else None
        w = QuantArray(arrays["values"][part], arrays["scales"][:, part], offsets, stands_for="float32")
        pieces.append(np.asarray(jnp.dot(x, dequantize(w).T, precision=jax.lax.Precision.HIGHEST)))
    return np.concatenate(pieces, 1), np.ones(case.rows, bool)
