"""Random attention calls and their float64 answers, written apart from every implementation and from the other cases.

A row is a list of tokens, each with a key and a value a head. A cache or a pool of pages is made from the list, with
NaN wherever no token of the row lies. The answer looks at the list alone.

    python -m tests.support.random_calls --seed 7 --seconds 600

runs calls of the seeds from 7 on, and prints those that fail, with the seed that makes them again.
"""

from __future__ import annotations

import argparse
import time
import traceback
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import decode_attention, flash_attention, paged_attention, reference_attention
from pallas_kernels.attention.call import check_rows, make_call
from pallas_kernels.decode_attention import gpu as decode_gpu
from pallas_kernels.decode_attention import tpu as decode_tpu
from pallas_kernels.flash_attention import gpu as flash_gpu
from pallas_kernels.flash_attention import tpu as flash_tpu
from pallas_kernels.layouts import LAYOUTS
from pallas_kernels.paged_attention.call import check_packed
from pallas_kernels.paged_attention.call import make_call as make_paged_call
from pallas_kernels.paged_attention.reference import attention as paged_reference

LAYOUT = {"tpu": "folded", "gpu": "heads_last"}
DENSE = {"flash": flash_attention, "decode": decode_attention, "reference": reference_attention}
# Differences to float64 that rounding makes: of results beside standard normal values, and of log-sum-exps.
TOLERANCE = {"float32": (3e-5, 1e-4), "bfloat16": (5e-2, 2e-2)}


@dataclass
class Row:
    """Tokens of one row and its queries: `asked` of them stand at the end, `start` is the first one's position."""

    keys: np.ndarray  # [L, K, H], as attention should see them
    values: np.ndarray  # [L, K, Hv]
    stored: dict[str, np.ndarray]  # what is written for each token: k, v, and k_scale, v_scale of int8
    start: int

    @property
    def length(self) -> int:
        return len(self.keys)


@dataclass
class Attempt:
    """One call, ready to be run, and its answer."""

    name: str
    run: partial  # () -> (out, lse)
    answer: np.ndarray
    lse: np.ndarray
    real: np.ndarray  # which queries count; of the others only that they are finite
    dtype: str

    def check(self) -> None:
        """AssertionError unless the call gives its answer."""
        out, lse = (np.asarray(x, np.float64) for x in self.run())
        tolerance, lse_tolerance = TOLERANCE[self.dtype]
        assert out.shape == self.answer.shape, f"{self.name}: shape {out.shape}, expected {self.answer.shape}"
        assert np.isfinite(out[~self.real]).all(), f"{self.name}: padding is not finite"
        assert not np.isnan(lse[~self.real]).any(), f"{self.name}: the log-sum-exp of padding is NaN"
        off = np.abs(out - self.answer)[self.real]
        assert np.isfinite(off).all(), f"{self.name}: {np.count_nonzero(~np.isfinite(off))} values are not finite"
        assert off.max(initial=0.0) <= tolerance, f"{self.name}: differs by {off.max():.3g} from float64"
        found, right = lse[self.real], self.lse[self.real]
        with np.errstate(invalid="ignore"):  # -inf is -inf
            close = (found == right) | (np.abs(found - right) <= lse_tolerance * np.maximum(1, np.abs(right)))
        assert close.all(), f"{self.name}: log-sum-exp {found[~close][:3]}, expected {right[~close][:3]}"


def softmax_of(row: Row, q: np.ndarray, seen: np.ndarray, call: dict) -> tuple[np.ndarray, np.ndarray]:
    """One query [N, H] over the tokens `seen`: its result [N, Hv] and log-sum-exp [N], a head at a time."""
    heads, kv_heads = q.shape[0], row.keys.shape[1]
    out, lse = np.zeros((heads, row.values.shape[2])), np.full(heads, -np.inf)
    for n in range(heads):
        kv = n * kv_heads // heads
        logits = row.keys[seen, kv] @ q[n] * call["scale"]
        if call["softcap"]:
            logits = call["softcap"] * np.tanh(logits / call["softcap"])
        sink = -np.inf if call["sinks"] is None else float(call["sinks"][n])
        largest = logits.max(initial=sink)
        if largest == -np.inf:
            continue
        weights = np.exp(logits - largest)
        total = weights.sum() + np.exp(sink - largest)
        out[n] = weights @ row.values[seen, kv] / total
        lse[n] = largest + np.log(total)
    return out, lse


def seen_by(row: Row, t: int, call: dict, oldest: int = 0, tree=None) -> np.ndarray:
    """Tokens that the row's query t looks at: of those from `oldest` on, which are still there."""
    at = row.start + t
    tokens = np.arange(oldest, row.length)
    if call["causal"]:
        tokens = tokens[tokens <= at]
    if tree is None:
        return tokens if not call["window"] else tokens[at - tokens < call["window"]]
    before, own = tokens[tokens < row.start], tokens[tokens >= row.start]
    if call["window"]:  # it counts from where the query would stand if its ancestors alone came before it
        at = row.start + np.count_nonzero(tree[t, :t])
        before = before[at - before < call["window"]]
    return np.concatenate([before, own[tree[t, own - row.start]]])


# --- drawing


def pick(rng, *choices):
    return choices[rng.integers(len(choices))]


def draw_row(rng, length: int, start: int, heads: int, sizes: tuple[int, int], kv_dtype: str) -> Row:
    """A row of random tokens, rounded to the type that holds them."""
    stored, seen = {}, []
    for name, size in zip("kv", sizes, strict=True):
        if kv_dtype == "int8":
            stored[name] = rng.integers(-127, 128, (length, heads, size)).astype(np.float32)
            stored[f"{name}_scale"] = rng.uniform(0.2, 1.8, (length, heads)).astype(np.float32) / 73
            seen.append(stored[name].astype(np.float64) * stored[f"{name}_scale"][..., None])
        else:
            values = rng.standard_normal((length, heads, size)).astype(jnp.dtype(kv_dtype)).astype(np.float32)
            stored[name] = values
            seen.append(values.astype(np.float64))
    return Row(*seen, stored, start)


def features(rng, causal: bool, most_window: int, heads: int) -> dict:
    """Settings of a call that any op takes."""
    sinks = None
    if rng.random() < 0.35:
        sinks = (rng.standard_normal(heads) * 3).astype(np.float32)
        sinks[rng.random(heads) < 0.3] = -np.inf
    window = int(rng.integers(1, most_window + 1)) if causal and most_window > 0 and rng.random() < 0.4 else None
    return {
        "scale": float(pick(rng, 0.05, 0.2, 0.35)),
        "softcap": pick(rng, None, None, 2.0, 30.0),
        "sinks": sinks,
        "causal": causal,
        "window": window,
    }


def laid_out(x: np.ndarray, layout: str, dtype: str) -> jnp.ndarray:
    """[B, S, K, H] as a cache lies; lanes behind the last head hold NaN, or a number no one should see."""
    if layout == "heads_first":
        x = x.transpose(0, 2, 1, 3)
    elif layout == "folded":
        x = x.reshape(*x.shape[:2], -1)
        x = np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 128)), constant_values=99 if dtype == "int8" else np.nan)
    return jnp.asarray(x, dtype)


def memory(rows: list[Row], shape: tuple[int, int], place, layout: str, kv_dtype: str) -> dict[str, jnp.ndarray]:
    """K and V [*shape, K, H] and scales: token j of row r at `place(r, j)`, None: nowhere; NaN everywhere else."""
    arrays = {}
    for name, one in rows[0].stored.items():
        nothing = 77.0 if kv_dtype == "int8" and "scale" not in name else np.nan
        x = np.full((*shape, *one.shape[1:]), nothing, np.float32)
        for r, row in enumerate(rows):
            for j in range(row.length):
                if (at := place(r, j)) is not None:
                    x[at] = row.stored[name][j]
        if "scale" in name:  # [*, K, slots], the heads rounded up
            x = np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 8)), constant_values=np.nan)
            arrays[name] = jnp.asarray(x.transpose(0, 2, 1))
        else:
            arrays[name] = laid_out(x, layout, kv_dtype)
    return arrays


def dense_call(rng, op: str, implementation: str) -> Attempt:
    """A call over a dense cache: rows of all lengths in rings that may have wrapped."""
    layout = LAYOUT.get(implementation) or pick(rng, *LAYOUTS)
    slots = int(pick(rng, 1, 7, 16, 40, 96, 128, 150, 257))
    if implementation == "tpu":
        slots = 128 * int(rng.integers(1, 6))
    t = int(rng.integers(1, 17 if op == "decode" else 45))
    kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    sizes = int(pick(rng, 8, 32, 64, 80)), int(pick(rng, 8, 32, 64, 96))
    dtype = str(pick(rng, "float32", "float32", "bfloat16"))
    kv_dtype = str(pick(rng, dtype, dtype, "int8"))
    causal = bool(rng.random() < 0.7)
    call = features(rng, causal, slots + 3, kv_heads * group)
    no_lengths = bool(rng.random() < 0.2)
    rows = []
    for _ in range(int(rng.integers(1, 4))):
        length = int(pick(rng, 0, 1, slots, slots + 1, 2 * slots + 3, *rng.integers(0, slots + 1, 4)))
        length = slots if no_lengths else min(length, 700)
        start = max(length - int(rng.integers(1, t + 1)), 0)
        rows.append(draw_row(rng, length, start, kv_heads, sizes, kv_dtype))
    tree = None
    if causal and rng.random() < 0.25:
        tree = np.tril(rng.random((len(rows), t, t)) < 0.5)
    q = np.asarray(jnp.asarray(rng.standard_normal((len(rows), t, kv_heads * group, sizes[0])) * 3, dtype), np.float64)
    answer, lse = np.zeros((*q.shape[:3], sizes[1])), np.full(q.shape[:3], -np.inf)
    real = np.zeros(q.shape[:2], bool)
    for b, row in enumerate(rows):
        for i in range(t):
            real[b, i] = row.length > 0 and (not causal or row.start + i < row.length)
            if real[b, i]:
                seen = seen_by(row, i, call, max(row.length - slots, 0), None if tree is None else tree[b])
                answer[b, i], lse[b, i] = softmax_of(row, q[b, i], seen, call)

    def place(r, j):
        return (r, j % slots) if j >= rows[r].length - slots else None

    arrays = memory(rows, (len(rows), slots), place, layout, kv_dtype) | {
        "q": jnp.asarray(q, dtype),
        "starts": jnp.asarray([row.start for row in rows], jnp.int32),
        "lengths": None if no_lengths else jnp.asarray([row.length for row in rows], jnp.int32),
        "sinks": None if call["sinks"] is None else jnp.asarray(call["sinks"]),
        "tree": None if tree is None else jnp.asarray(tree),
    }
    static = {
        "scale": call["scale"],
        "softcap": call["softcap"],
        "causal": causal,
        "window": call["window"],
        "layout": layout,
        "kv_heads": kv_heads,
        "value_dim": sizes[1],
        "return_lse": True,
    }
    check_rows(op, arrays["starts"], arrays["lengths"])
    config = dense_tiles(rng, op, implementation, arrays, static)
    if op != "reference":
        static |= {"implementation": implementation, "interpret": implementation != "xla", "config": config}
    name = (
        f"{op} {implementation} {config or ''} S={slots} T={t} K={kv_heads} G={group} sizes={sizes} {dtype} "
        f"{kv_dtype} lengths={[r.length for r in rows]} starts={[r.start for r in rows]} {call} "
        f"tree={tree is not None} lengths given={not no_lengths}"
    )
    run = jax.jit(lambda arrays: DENSE[op](**arrays, **static))
    return Attempt(name, partial(run, arrays), answer, lse, real, dtype)


def dense_tiles(rng, op: str, implementation: str, arrays: dict, static: dict):
    """Tiles that the kernel may be given; None: its heuristic's."""
    if implementation not in LAYOUT or rng.random() < 0.3:
        return None
    if (op, implementation) == ("flash", "gpu"):
        return flash_gpu.Config(int(pick(rng, 16, 32)), int(pick(rng, 16, 32, 64)))
    if (op, implementation) == ("decode", "gpu"):
        return decode_gpu.Config(int(pick(rng, 16, 32)), int(rng.integers(1, 4)), int(pick(rng, 16, 32)))
    call = make_call(f"{op}_attention", arrays, **static)
    if op == "flash":
        block = int(pick(rng, *(n for n in (128, 256, 384) if call.slots % n == 0)))
        return flash_tpu.Config(int(pick(rng, 16, 32)), block, 128, ones=bool(rng.random() < 0.5))
    blocks = [n for n in (128, 256, 384) if n <= call.slots and (call.window is None or call.slots % n == 0)]
    return decode_tpu.Config(int(pick(rng, *blocks)), 128, int(rng.integers(1, 3)))


def paged_call(rng, implementation: str) -> Attempt:
    """A call over pages: decode rows and chunks, pages that rows share, tables with rubbish where nobody looks."""
    layout = LAYOUT.get(implementation) or pick(rng, *LAYOUTS)
    kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    sizes = int(pick(rng, 8, 32, 64, 80)), int(pick(rng, 8, 32, 64, 96))
    dtype = str(pick(rng, "float32", "float32", "bfloat16"))
    kv_dtype = str(pick(rng, dtype, dtype, "int8"))
    page = int(pick(rng, 1, 3, 16, 20))
    if implementation == "tpu":
        page = 128 if kv_dtype == "int8" else int(pick(rng, 16, 32))
    count, width = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    lengths = [int(pick(rng, 0, 1, width * page, *rng.integers(0, width * page + 1, 3))) for _ in range(count)]
    decode_rows = int(rng.integers(0, count + 1))
    decode_queries = int(pick(rng, 1, 1, 4))
    asked = [int(rng.integers(0, min(n, decode_queries if r < decode_rows else 30) + 1)) for r, n in enumerate(lengths)]
    tokens = sum(asked) + int(pick(rng, 0, 0, 5)) or 1
    call = features(rng, True, width * page + 3, kv_heads * group)
    rows = [draw_row(rng, n, n - new, kv_heads, sizes, kv_dtype) for n, new in zip(lengths, asked, strict=True)]
    pages = sum(-(-n // page) for n in lengths) + 2
    free = list(rng.permutation(pages))
    tables = rng.choice([-1, -(10**6), 0, pages, 2**31 - 1], (count, width)).astype(np.int64)
    for r, n in enumerate(lengths):
        tables[r, : -(-n // page)] = [free.pop() for _ in range(-(-n // page))]

    def place(r, j):
        oldest = 0 if call["window"] is None else rows[r].start - call["window"] + 1
        return (tables[r, j // page], j % page) if asked[r] and j >= oldest else None

    q = np.asarray(jnp.asarray(rng.standard_normal((tokens, kv_heads * group, sizes[0])) * 3, dtype), np.float64)
    answer, lse = np.zeros((*q.shape[:2], sizes[1])), np.full(q.shape[:2], -np.inf)
    starts = np.concatenate([[0], np.cumsum(asked)])
    for r, row in enumerate(rows):
        for i in range(asked[r]):
            at = starts[r] + i
            answer[at], lse[at] = softmax_of(row, q[at], seen_by(row, i, call), call)
    arrays = memory(rows, (pages, page), place, layout, kv_dtype)
    arrays = {{"k": "k_pages", "v": "v_pages"}.get(name, name): x for name, x in arrays.items()} | {
        "q": jnp.asarray(q, dtype),
        "block_tables": jnp.asarray(tables, jnp.int32),
        "lengths": jnp.asarray(lengths, jnp.int32),
        "query_starts": jnp.asarray(starts, jnp.int32),
        "sinks": None if call["sinks"] is None else jnp.asarray(call["sinks"]),
    }
    static = {
        "scale": call["scale"],
        "softcap": call["softcap"],
        "window": call["window"],
        "layout": layout,
        "kv_heads": kv_heads,
        "value_dim": sizes[1],
        "return_lse": True,
    }
    name = (
        f"paged {implementation} page={page} width={width} K={kv_heads} G={group} sizes={sizes} {dtype} {kv_dtype} "
        f"lengths={lengths} asked={asked} tokens={tokens} "
        f"decode_rows={decode_rows} decode_queries={decode_queries} {call}"
    )
    op = paged_reference
    if implementation != "reference":
        hints = {
            "decode_rows": decode_rows,
            "decode_queries": decode_queries,
            "max_queries": pick(rng, None, max(*asked, 1)),
        }
        found = make_paged_call(arrays, **static, **hints)
        check_packed(found, *(arrays[x] for x in ("block_tables", "lengths", "query_starts")))
        op = partial(paged_attention, implementation=implementation, interpret=implementation != "xla", **hints)
    run = jax.jit(lambda arrays: op(**arrays, **static))
    return Attempt(name, partial(run, arrays), answer, lse, np.arange(tokens) < starts[-1], dtype)


KINDS = (
    [("flash", x) for x in ("xla", "tpu", "gpu")]
    + [("decode", x) for x in ("xla", "tpu", "gpu")]
    + [("paged", x) for x in ("reference", "xla", "tpu", "gpu")]
    + [("reference", "xla")]
)


def draw(seed: int) -> Attempt:
    """The call of a seed: kinds in turn, everything else by the seed's own generator."""
    rng = np.random.default_rng(seed)
    op, implementation = KINDS[seed % len(KINDS)]
    return paged_call(rng, implementation) if op == "paged" else dense_call(rng, op, implementation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True, help="the first seed")
    parser.add_argument("--seconds", type=float, default=600)
    given = parser.parse_args()
    seed, failed, began = given.seed, 0, time.process_time()
    while time.process_time() - began < given.seconds:
        try:
            draw(seed).check()
        except Exception as error:  # all of them are found in one run
            failed += 1
            kind = "" if isinstance(error, AssertionError) else "".join(traceback.format_exception(error)[-3:])[-600:]
            print(f"seed {seed}: {error} {kind}", flush=True)
        seed += 1
        if seed % 50 == 0:
            jax.clear_caches()
    print(f"seeds {given.seed} to {seed - 1}, {failed} failed, {time.process_time() - began:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
