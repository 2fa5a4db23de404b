"""Paged problems with numbers in them, and their answer in float64 numpy, written apart from every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.cases import Case

# Largest difference to float64 in units of the values, which are standard normal.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def attend(q, keys, values, *, lengths, queries, scale, window=None, softcap=None, sinks=None):
    """Dense softmax in float64, one query and head at a time: (out [T, N, Hv], lse [T, N]); zeros for padding.

    keys, values: for each row, the history [length, K, H].
    """
    q = np.asarray(q, np.float64)
    t, n, _ = q.shape
    out = np.zeros((t, n, values[0].shape[-1]))
    lse = np.full((t, n), -np.inf)
    token = 0
    for row, (length, asked) in enumerate(zip(lengths, queries, strict=True)):
        group = n // keys[row].shape[1]
        for i in range(asked):
            position = length - asked + i
            seen = range(0 if window is None else max(0, position - window + 1), position + 1)
            for head in range(n):
                k, v = (np.asarray(x[row], np.float64)[list(seen), head // group] for x in (keys, values))
                logits = k @ q[token, head] * scale
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                sink = [] if sinks is None else [float(sinks[head])]
                top = max([*logits, *sink])
                weights = np.exp(logits - top)
                total = weights.sum() + sum(np.exp(s - top) for s in sink)
                out[token, head], lse[token, head] = weights @ v / total, top + np.log(total)
            token += 1
    return out, lse


@dataclass(frozen=True)
class Problem:
    case: Case
    q: jnp.ndarray
    keys: list  # per row [length, K, H], as the pages hold them (dequantized)
    values: list
    tables: np.ndarray
    pools: dict  # k_pages and v_pages [P, p, K, H(v)], k_scale and v_scale [P, K, p] or None: numpy
    sinks: np.ndarray | None
    answer: np.ndarray
    lse: np.ndarray

    @property
    def real(self) -> np.ndarray:
        return np.arange(self.case.packed) < sum(self.case.queries)

    def arguments(self, layout: str) -> dict:
        """Everything an op takes, pages in `layout`."""
        case = self.case
        k, v = (to_layout(self.pools[name], layout) for name in ("k_pages", "v_pages"))
        scales = {name: self.pools[name] for name in ("k_scale", "v_scale")}
        return {
            "q": self.q,
            "k_pages": jnp.asarray(k, case.stored),
            "v_pages": jnp.asarray(v, case.stored),
            "block_tables": jnp.asarray(self.tables),
            "lengths": jnp.asarray(case.lengths, jnp.int32),
            "query_starts": jnp.asarray(np.concatenate([[0], np.cumsum(case.queries)]), jnp.int32),
            "scale": case.logit_scale,
            "window": case.window,
            "softcap": case.softcap,
            "sinks": None if self.sinks is None else jnp.asarray(self.sinks),
            "layout": layout,
            "kv_heads": case.kv_heads,
            "value_dim": case.value_size,
        } | {name: None if x is None else jnp.asarray(pad_scale(x)) for name, x in scales.items()}

    def wrong(self, **changes) -> np.ndarray:
        """The answer to another question."""
        return attend(**self.question() | changes)[0]

    def question(self) -> dict:
        case = self.case
        return {
            "q": np.asarray(self.q, np.float64),
            "keys": self.keys,
            "values": self.values,
            "lengths": case.lengths,
            "queries": case.queries,
            "scale": case.logit_scale,
            "window": case.window,
            "softcap": case.softcap,
            "sinks": self.sinks,
        }

    @property
    def tolerance(self) -> float:
        # The probabilities of int8 values are rounded to the queries' type like those of others.
        return max(TOLERANCE.get(name, 0.0) for name in (self.case.dtype, self.case.stored))

    def check(self, out, lse=None) -> None:
        """AssertionError unless `out` is right for every real query and finite for padding."""
        out = np.asarray(out, np.float64)
        assert out.shape == self.answer.shape, f"shape {out.shape}, expected {self.answer.shape}"
        assert np.isfinite(out).all(), f"{np.count_nonzero(~np.isfinite(out))} values are not finite"
        worst = np.abs(out - self.answer)[self.real].max(initial=0.0)
        assert worst <= self.tolerance, f"differs by {worst:.3g} from float64"
        if lse is not None:
            off = np.abs(np.asarray(lse, np.float64)[self.real] - self.lse[self.real]).max(initial=0.0)
            assert off <= self.tolerance * 3, f"lse differs by {off:.3g} from float64"


def pad_scale(scale):
    """[P, K, p] with the heads rounded up to 8; the added ones hold NaN."""
    missing = -scale.shape[1] % 8
    return np.pad(scale, ((0, 0), (0, missing), (0, 0)), constant_values=np.nan)


def to_layout(pages, layout: str):
    """[P, p, K, H] in another layout; what folding pads holds NaN."""
    if layout == "heads_first":
        return pages.transpose(0, 2, 1, 3)
    if layout == "folded":
        folded = pages.reshape(*pages.shape[:2], -1)
        garbage = np.nan if np.issubdtype(pages.dtype, np.floating) else 77
        return np.pad(folded, ((0, 0), (0, 0), (0, -folded.shape[2] % 128)), constant_values=garbage)
    return pages


def draw_tables(rng, case: Case, shared: int = 0) -> tuple[np.ndarray, int]:
    """Permuted pages for each row; the first `shared` pages of every row are the same. Garbage in unused entries.

    Entries that no query may read are -1, a page of another row, or far out of range.
    """
    needed = [-(-n // case.page) for n in case.lengths]
    common = min(shared, *needed) if shared else 0
    total = sum(needed) - common * (len(needed) - 1) + case.spare
    free = list(rng.permutation(total))
    prefix = [free.pop() for _ in range(common)]
    tables = rng.choice([-1, -(10**6), 0, total - 1], (len(needed), case.table_width)).astype(np.int32)
    for row, n in enumerate(needed):
        tables[row, :n] = prefix + [free.pop() for _ in range(n - common)]
    return tables, total


def make(case: Case, seed: int = 0, shared: int = 0, tables: tuple[np.ndarray, int] | None = None) -> Problem:
    """Fill a case with standard normal numbers; what no row holds is NaN (in int8 pages: NaN scales).

    Queries are three times as large, so that a softmax has something to choose and a cap something to bend.
    """
    rng = np.random.default_rng(seed)
    tables, total = tables or draw_tables(rng, case, shared)
    tables = tables.copy()
    int8 = case.stored == "int8"
    pools, histories = {}, []
    for name, size in (("k", case.head_dim), ("v", case.value_size)):
        shape = (total, case.page, case.kv_heads, size)
        if int8:
            full = rng.integers(-127, 128, shape).astype(np.int8)
            scale = rng.uniform(0.2, 1.8, (total, case.kv_heads, case.page)).astype(np.float32) / 60
            plain = full * scale.transpose(0, 2, 1)[..., None].astype(np.float64)
        else:
            full = rng.standard_normal(shape).astype(jnp.dtype(case.stored)).astype(np.float32)
            scale, plain = None, full
        held = np.zeros((total, case.page), bool)
        history = []
        for row, length in enumerate(case.lengths):
            at = np.arange(length)
            pages, offsets = tables[row, at // case.page], at % case.page
            history.append(plain[pages, offsets])
            if case.queries[row]:
                # Keys before the oldest query's window may be gone.
                oldest = 0 if case.window is None else max(0, length - case.queries[row] - case.window + 1)
                seen = at >= oldest
                held[pages[seen], offsets[seen]] = True
        histories.append(history)
        if scale is None:
            pools[f"{name}_scale"] = None
            pools[f"{name}_pages"] = np.where(held[..., None, None], full, np.float32(np.nan))
        else:
            pools[f"{name}_scale"] = np.where(held[:, None], scale, np.float32(np.nan))
            pools[f"{name}_pages"] = full
    for row, length in enumerate(case.lengths):  # pages before a window are freed
        if case.window is not None:
            oldest = max(0, length - case.queries[row] - case.window + 1)
            gone = min(oldest, length) // case.page
            tables[row, :gone] = rng.choice([-1, total - 1, -(10**6)], gone)
    q = rng.standard_normal((case.packed, case.kv_heads * case.group, case.head_dim)) * 3
    q = jnp.asarray(q.astype(np.float32), case.dtype)
    sinks = rng.standard_normal(case.kv_heads * case.group).astype(np.float32) * 2 if case.sinks else None
    problem = Problem(case, q, *histories, tables, pools, sinks, None, None)
    out, lse = attend(**problem.question())
    return Problem(case, q, *histories, tables, pools, sinks, out, lse)
