"""Decode problems for the Pallas kernels, and their answers: plain numpy in float64, one query after another.

The answers know nothing of slots, blocks or masks: a row is its history, and a query is told which positions of it
to look at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

# Largest difference to float64; values are standard normal, and inputs are rounded before both are computed.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Case:
    """Rows that hold `lengths` tokens, of which the last `queries` (or `new`, where less) are this step's."""

    name: str
    lengths: tuple[int, ...]
    slots: int
    queries: int = 1
    new: tuple[int, ...] | None = None
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int | None = None
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    tree: bool = False
    full: bool = False  # lengths are not told
    blocks: tuple[int, ...] = ()  # fields of the kernel's Config, in order; (): its heuristic


def histories(case: Case, seed: int = 0):
    """Arrays of a case as a history of tokens: what a model would have produced."""
    rng = np.random.default_rng(seed)
    b, longest, dv = len(case.lengths), max(*case.lengths, 1), case.value_dim or case.head_dim
    dtype, kv_dtype = jnp.dtype(case.dtype), jnp.dtype(case.kv_dtype or case.dtype)
    new = np.array(case.new or [min(case.queries, n) for n in case.lengths])
    h = {
        "starts": np.array(case.lengths) - new,
        "lengths": np.where(new > 0, case.lengths, 0),
        "q": (rng.standard_normal((b, case.queries, case.heads, case.head_dim)) * 2).astype(dtype),
        "sinks": rng.standard_normal(case.heads).astype(np.float32) * 3 if case.sinks else None,
        "tree": np.tril(rng.random((b, case.queries, case.queries)) < 0.5) | np.eye(case.queries, dtype=bool)
        if case.tree else None,
    }  # fmt: skip
    for name, dim in (("k", case.head_dim), ("v", dv)):
        shape = (b, longest, case.kv_heads, dim)
        if kv_dtype == jnp.int8:
            h[name] = rng.integers(-127, 128, shape).astype(np.int8)
            h[f"{name}_scale"] = (rng.uniform(0.5, 2, shape[:3]) / 64).astype(np.float32)
        else:
            h[name], h[f"{name}_scale"] = rng.standard_normal(shape).astype(kv_dtype), None
    return h


def dense(case: Case, h, **wrong):
    """(out [B, T, N, Hv], lse [B, T, N]) in float64; NaN for queries outside of their row. `wrong` spoils a setting."""
    case = replace(case, **wrong)
    b, t, n, d = h["q"].shape
    k, v = (np.asarray(h[x], np.float64) for x in "kv")
    if h["k_scale"] is not None:
        k, v = k * h["k_scale"][..., None], v * h["v_scale"][..., None]
    out, lse = np.full((b, t, n, v.shape[-1]), np.nan), np.full((b, t, n), np.nan)
    for row, i, head in np.ndindex(b, t, n):
        own, length = h["starts"][row] + i, h["lengths"][row]
        if own >= length:
            continue
        positions = np.arange(max(0, length - case.slots), length)
        if case.causal:
            positions = positions[positions <= own]
        if case.window:
            positions = positions[positions > own - case.window]
        if case.tree:
            among = positions - h["starts"][row]
            chosen = h["tree"][row, i][np.clip(among, 0, t - 1)]
            positions = positions[(among < 0) | (among >= t) | chosen]
        kv = head // (n // case.kv_heads)
        logits = k[row, positions, kv] @ np.asarray(h["q"][row, i, head], np.float64) * d**-0.5
        if case.softcap:
            logits = case.softcap * np.tanh(logits / case.softcap)
        extra = [h["sinks"][head]] if case.sinks else []
        top = max([*logits, *extra])
        weights = np.exp(logits - top)
        total = weights.sum() + sum(np.exp(x - top) for x in extra)
        out[row, i, head] = weights @ v[row, positions, kv] / total
        lse[row, i, head] = top + np.log(total)
    return out, lse


def _ring(case: Case, history, unwritten):
    """[B, S, ...] after each row's tokens were written one by one."""
    cache = np.full((history.shape[0], case.slots, *history.shape[2:]), unwritten, history.dtype)
    for row, length in enumerate(case.lengths):
        for position in range(length):
            cache[row, position % case.slots] = history[row, position]
    return cache


def _lanes(x, multiple: int, unwritten):
    """[B, S, K, H] with the heads side by side; the lanes of padding hold garbage, like slots that hold nothing."""
    flat = x.reshape(*x.shape[:2], -1)
    padding = -flat.shape[-1] % multiple
    return np.pad(flat, ((0, 0), (0, 0), (0, padding)), constant_values=unwritten)


def run(case: Case, h, attention, config, *, layout: str, interpret=True, return_lse=True, **changes):
    """The kernel on a case: (out, lse), with garbage in every slot and lane that holds nothing."""
    int8 = h["k"].dtype == np.int8
    garbage = 77 if int8 else np.nan
    arrays = {}
    for name in ("k", "v"):
        x = _ring(case, h[name], garbage)
        arrays[name] = jnp.asarray(_lanes(x, 128, garbage) if layout == "folded" else x)
        if int8:
            scale = _ring(case, h[f"{name}_scale"], np.nan).swapaxes(1, 2)
            arrays[f"{name}_scale"] = jnp.asarray(
                np.pad(scale, ((0, 0), (0, -case.kv_heads % 8), (0, 0)), constant_values=np.nan))
    tree = None if h["tree"] is None else jnp.asarray(h["tree"])
    sinks = None if h["sinks"] is None else jnp.asarray(h["sinks"])
    arguments = {
        "starts": jnp.asarray(h["starts"], jnp.int32), "tree": tree, "sinks": sinks,
        "lengths": None if case.full else jnp.asarray(h["lengths"], jnp.int32),
        "k_scale": None, "v_scale": None,
    } | arrays  # fmt: skip
    settings = {
        "scale": case.head_dim**-0.5, "causal": case.causal, "window": case.window, "softcap": case.softcap,
        "layout": layout, "kv_heads": case.kv_heads, "value_dim": case.value_dim, "return_lse": return_lse,
        "config": config, "interpret": interpret,
    }  # fmt: skip
    q = jnp.asarray(h["q"])
    return jax.jit(lambda q, a: attention(q, **a, **settings))(q, arguments | changes)


def check(case: Case, h, got, answer) -> None:
    """AssertionError unless out and lse are right for every real query and out is finite for the others."""
    out, lse = (np.asarray(x, np.float64) for x in got)
    real = np.isfinite(answer[1])
    assert out.shape == answer[0].shape
    assert np.isfinite(out).all(), f"{case.name}: {np.count_nonzero(~np.isfinite(out))} values are not finite"
    tolerance = TOLERANCE[case.dtype]
    for what, a, b in (("out", out, answer[0]), ("lse", lse, answer[1])):
        off = np.abs(a - b)[real].max(initial=0.0)
        assert off <= tolerance, f"{case.name}: {what} differs by {off:.3g} from float64"
    idle = np.asarray(h["lengths"]) == 0
    assert not out[idle].any(), f"{case.name}: a row that takes no part is not zero"


CASES = (
    Case("llama", (200, 1, 37, 256, 129), 256, heads=8, kv_heads=2, head_dim=128),
    Case("smollm2", (200, 1, 37, 0, 129), 256, heads=9, kv_heads=3),
    Case("gemma 3, ring", (700, 20, 511, 512, 256), 640, heads=4, kv_heads=1, head_dim=256, window=512),
    Case("f32", (300, 0, 0, 17), 384, heads=9, kv_heads=3, dtype="float32"),
    Case("one head", (300, 5), 384, heads=1, kv_heads=1, dtype="float32"),
    Case("heads of 80", (130, 5), 256, heads=6, kv_heads=3, head_dim=80, dtype="float32"),
    Case("heads of 96, four", (130, 5), 256, heads=8, kv_heads=4, head_dim=96),
    Case("192 keys, 128 values", (130, 5), 256, heads=6, kv_heads=3, head_dim=192, value_dim=128, dtype="float32"),
    Case("draft of five", (200, 5, 130, 3, 0), 256, queries=5, heads=9, kv_heads=3),
    Case("sixteen queries, padding", (200, 30, 130, 0), 256, queries=16, new=(16, 3, 1, 0), dtype="float32"),
    Case("narrow window", (700, 20, 129, 0, 131), 256, queries=3, window=20, dtype="float32"),
    Case("window of one", (700, 20), 256, queries=2, window=1, dtype="float32"),
    Case("wrapped ring", (900, 383, 385, 2), 384, queries=2, window=300, blocks=(128, 128), dtype="float32"),
    Case("soft cap, sinks", (200, 20, 0), 256, queries=2, softcap=5.0, sinks=True, dtype="float32"),
    Case("sinks, odd heads, window", (200, 20, 0), 256, heads=9, kv_heads=3, sinks=True, window=64),
    Case("int8", (200, 1, 37, 0, 256), 256, heads=9, kv_heads=3, kv_dtype="int8"),
    Case("int8, f32 queries, window", (700, 40), 256, queries=3, window=100, kv_dtype="int8", dtype="float32"),
    Case("int8, sinks, soft cap, tree", (250, 40), 256, queries=4, kv_dtype="int8", sinks=True, softcap=9.0, tree=True),
    Case("tree", (200, 7, 130), 256, queries=7, tree=True, dtype="float32"),
    Case("tree, ring", (300, 130), 256, queries=6, tree=True, window=90, dtype="float32"),
    Case("not causal", (200, 30), 256, queries=4, causal=False, dtype="float32"),
    Case("bf16 cache, f32 queries", (200, 30), 256, dtype="float32", kv_dtype="bfloat16"),
    Case("full", (256, 256), 256, queries=2, full=True, dtype="float32"),
    Case("full, window", (256, 256), 256, queries=2, window=50, full=True, dtype="float32"),
    Case("several blocks", (600, 513, 100), 640, queries=2, heads=3, kv_heads=1, blocks=(256, 128), dtype="float32"),
)
