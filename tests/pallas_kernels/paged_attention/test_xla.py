"""Paged attention against float64 numpy: the reference and the XLA path, on every case; and the check itself."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import reference, xla
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.cases import CASES, Case
from tests.support.paged_attention import make

pytestmark = pytest.mark.thin(16)

LAYOUTS = ("folded", "heads_last", "heads_first")
STATIC = (
    "scale",
    "window",
    "softcap",
    "layout",
    "kv_heads",
    "value_dim",
    "decode_rows",
    "decode_queries",
    "max_queries",
    "return_lse",
    "implementation",
    "interpret",
    "config",
)
make_once = cache(make)


@cache
def jitted(op):
    return jax.jit(op, static_argnames=[s for s in STATIC if op is paged_attention or s in STATIC[:6] + STATIC[9:10]])


def run(problem, layout, **changes):
    hints = {name: getattr(problem.case, name) for name in ("decode_rows", "decode_queries", "max_queries")}
    return jitted(paged_attention)(**problem.arguments(layout) | hints | {"implementation": "xla"} | changes)


def ids(case):
    return case.name


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_reference(case):
    problem = make_once(case)
    out, lse = jitted(reference.attention)(**problem.arguments("folded"), return_lse=True)
    problem.check(out, lse)
    problem.check(jitted(reference.attention)(**problem.arguments("heads_first")))


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_xla(case):
    problem = make_once(case)
    for layout in LAYOUTS:
        problem.check(*run(problem, layout, return_lse=True))
    # The hints change how it is computed, not what.
    problem.check(run(problem, "heads_last", decode_rows=0, max_queries=None))
    out = np.asarray(run(problem, "heads_last"), np.float64)
    assert (out[~problem.real] == 0).all()


# --- the check itself


def zeros(problem):
    return np.zeros_like(problem.answer)


def swapped(problem):
    return problem.wrong(keys=problem.values, values=problem.keys)


def own_key_hidden(problem):
    shorter = [max(n - 1, 0) for n in problem.case.lengths]
    return problem.wrong(lengths=[max(n, q) for n, q in zip(shorter, problem.case.queries, strict=True)])


def no_window(problem):
    return problem.wrong(window=None)


def wide_window(problem):
    return problem.wrong(window=problem.case.window + 1)


def narrow_window(problem):
    return problem.wrong(window=problem.case.window - 1)


def no_softcap(problem):
    return problem.wrong(softcap=None)


def no_sinks(problem):
    return problem.wrong(sinks=None)


def no_scale(problem):
    return problem.wrong(scale=1.0)


def shifted_heads(problem):
    return problem.wrong(keys=[np.roll(k, 1, axis=1) for k in problem.keys])


F32 = [c for c in CASES if c.dtype == "float32" and c.stored == "float32" and any(c.queries)]
WINDOWS = [c for c in F32 if c.window]
WRONG = [
    (zeros, [c for c in CASES if any(c.queries)]),
    (swapped, [c for c in CASES if any(c.queries) and c.value_size == c.head_dim]),
    (own_key_hidden, F32),
    (no_window, WINDOWS),
    (wide_window, WINDOWS),
    (narrow_window, [c for c in WINDOWS if c.window > 1]),
    (no_softcap, [c for c in F32 if c.softcap]),
    (no_sinks, [c for c in F32 if c.sinks]),
    (no_scale, [c for c in F32 if c.window != 1]),
    (shifted_heads, [c for c in F32 if c.kv_heads > 1 and c.window != 1]),
]


@pytest.mark.parametrize(("wrong", "cases"), WRONG, ids=[wrong.__name__ for wrong, _ in WRONG])
def test_a_wrong_answer_fails(wrong, cases):
    assert len(cases) >= 2
    for case in cases:
        problem = make_once(case)
        problem.check(problem.answer, problem.lse)
        with pytest.raises(AssertionError, match="differs by"):
            problem.check(wrong(problem))


def test_ignored_scales_fail():
    for case in (c for c in CASES if c.stored == "int8"):
        problem = make_once(case)
        for name in ("k_scale", "v_scale"):
            ones = jnp.full_like(problem.arguments("folded")[name], 1 / 60)
            with pytest.raises(AssertionError, match="differs by"):
                problem.check(run(problem, "heads_last", **{name: ones}))


def test_an_unheld_key_would_be_seen():
    problem = make_once(CASES[0])
    lengths = jnp.asarray(problem.case.lengths, jnp.int32).at[3].add(1)
    assert np.isnan(np.asarray(run(problem, "heads_last", lengths=lengths))[3]).any()


# --- pages and rows


def test_shared_pages_and_their_order_do_not_matter():
    case = Case("shared", (40, 55, 33), (1, 9, 2))
    problem = make(case, shared=2)
    assert len({int(t[0]) for t in problem.tables}) == 1
    out = np.asarray(run(problem, "folded"))
    problem.check(out)
    order = np.random.default_rng(1).permutation(len(problem.pools["k_pages"]))
    changed = problem.arguments("folded")
    where = np.argsort(order)
    tables = np.where(problem.tables >= 0, where[np.clip(problem.tables, 0, len(order) - 1)], -1)
    pools = {name: changed[name][order] for name in ("k_pages", "v_pages")}
    np.testing.assert_array_equal(np.asarray(run(problem, "folded", block_tables=jnp.asarray(tables), **pools)), out)


@pytest.mark.parametrize("decode_rows", [0, 3])
def test_a_row_ignores_its_neighbours(decode_rows):
    case = Case("three rows", (40, 20, 33), (1, 1, 1), page=16)
    problem = make(case)
    clean = np.asarray(run(problem, "heads_last", decode_rows=decode_rows))
    given_ = problem.arguments("heads_last")
    own = jnp.asarray(problem.tables[1, :2])
    spoiled = {name: given_[name].at[own].set(jnp.nan) for name in ("k_pages", "v_pages")}
    out = np.asarray(run(problem, "heads_last", decode_rows=decode_rows, **spoiled))
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("queries", [1, 4])
def test_a_window_costs_no_more_where_one_row_is_far_ahead(monkeypatch, queries):
    """Counted in turns of the loop: both calls run the same program."""

    def turns(longest):
        lengths = (longest,) + (600,) * 7
        shape = {"kv_heads": 1, "head_dim": 8, "width": 400, "window": 512}
        problem = make(Case("far", lengths, (queries,) * 8, **shape, decode_rows=8, decode_queries=queries))
        ranges = []

        def loop(first, end, body, start):
            ranges.append(int(end) - int(first))
            return jax.lax.fori_loop(first, end, body, start)

        with monkeypatch.context() as patch:
            patch.setattr(xla, "lax", SimpleNamespace(fori_loop=loop))
            hints = {"decode_rows": 8, "decode_queries": queries, "max_queries": queries}
            problem.check(paged_attention(**problem.arguments("heads_first"), **hints, implementation="xla"))
        return sum(ranges)

    assert 0 < turns(6000) <= 1.5 * turns(600)


@pytest.mark.parametrize("queries", [1, 4])
def test_a_row_has_the_same_bits_alone(queries):
    """However many rows are still being read beside it; of eight rows of SmolLM2's shape the sums once differed."""
    lengths = (300, 9, 140, 20, 260, 31, 12, 129)
    case = Case("ragged", lengths, (queries,) * 8, kv_heads=3, group=3, decode_rows=8, decode_queries=queries)
    problem = make(case)
    together = np.asarray(run(problem, "heads_first", max_queries=8)).reshape(8, queries, 9, -1)
    for row in range(8):
        alone = np.where(np.arange(8) == row, lengths, 0)
        out = np.asarray(run(problem, "heads_first", max_queries=8, lengths=jnp.asarray(alone, jnp.int32)))
        np.testing.assert_array_equal(out.reshape(together.shape)[row], together[row])


def test_a_query_has_the_same_bits_behind_others_and_alone():
    """Also where a window begins in another block of keys for the query before."""
    case = Case("drafts", (211,), (4,), page=8, window=200, decode_rows=1, decode_queries=4)
    problem = make(case)
    drafted = np.asarray(run(problem, "heads_first", max_queries=4))
    for i in range(4):
        q = jnp.asarray(problem.arguments("heads_first")["q"])[i : i + 1]
        one = {"q": jnp.pad(q, ((0, 3), (0, 0), (0, 0))), "lengths": jnp.array([208 + i], jnp.int32)}
        out = run(problem, "heads_first", max_queries=4, query_starts=jnp.array([0, 1], jnp.int32), **one)
        np.testing.assert_array_equal(np.asarray(out)[0], drafted[i])


def test_chunks_equal_the_whole():
    """The same queries in one chunk, or as three rows that share all pages."""
    whole = make(Case("whole", (60,), (30,)))
    tables = np.repeat(whole.tables, 3, axis=0)
    parts = whole.arguments("folded") | {
        "block_tables": jnp.asarray(tables),
        "lengths": jnp.asarray([40, 41, 60], jnp.int32),
        "query_starts": jnp.asarray([0, 10, 11, 30], jnp.int32),
    }
    whole.check(jitted(paged_attention)(**parts, implementation="xla"))


@st.composite
def drawn(draw):
    """A few compiled shapes; lengths, pages and their sharing are values."""
    shape = draw(
        st.sampled_from(
            [
                {"page": 8, "group": 3, "kv_heads": 1, "head_dim": 8, "window": None},
                {"page": 16, "group": 1, "kv_heads": 2, "head_dim": 8, "window": 19, "softcap": 3.0},
                {"page": 4, "group": 2, "kv_heads": 2, "head_dim": 8, "window": None, "sinks": True},
            ]
        )
    )
    rows = draw(st.tuples(*[st.tuples(st.integers(0, 50), st.integers(0, 9))] * 4))
    lengths = tuple(n for n, _ in rows)
    queries = tuple(min(n, q) for n, q in rows)
    tables_width = -(-50 // shape["page"])
    case = Case("drawn", lengths, queries, tokens=40, width=tables_width, **shape)
    needed = sum(-(-n // case.page) for n in lengths)
    case = Case(**{**case.__dict__, "spare": 4 * tables_width + 1 - needed})
    return make(case, seed=draw(st.integers(0, 1000)), shared=draw(st.integers(0, 2)))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn())
def test_any_rows_agree_with_float64(problem):
    problem.check(*run(problem, "heads_last", return_lse=True))


# --- arguments


def arguments(**changes):
    pages = jnp.zeros((4, 16, 128))
    return {
        "q": jnp.zeros((3, 4, 64)),
        "k_pages": pages,
        "v_pages": pages,
        "block_tables": jnp.zeros((2, 2), jnp.int32),
        "lengths": jnp.ones(2, jnp.int32),
        "query_starts": jnp.arange(3, dtype=jnp.int32),
        "scale": 1.0,
        "layout": "folded",
        "kv_heads": 2,
    } | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"q": jnp.zeros((3, 64))}, r"q must be \[T, N, H\]"),
        ({"layout": "flat"}, "'flat' is not one of heads_first, folded, heads_last"),
        ({"layout": "heads_last"}, r"pages must be \[P, p, K, H\] in layout 'heads_last'"),
        ({"kv_heads": None}, "give kv_heads"),
        ({"kv_heads": 3}, "no multiple of 3"),
        ({"kv_heads": 4}, r"k_pages must be \[P, p, C\] = \(4, 16, 256\)"),
        ({"value_dim": 96}, "v_pages must be .* for 2 heads of 96"),
        ({"v_pages": jnp.zeros((4, 8, 128))}, "v_pages must be"),
        ({"k_scale": jnp.zeros((4, 8, 16))}, "go together"),
        ({"k_scale": jnp.zeros((4, 8, 16)), "v_scale": jnp.zeros((4, 8, 16))}, "int8 pages need"),
        ({"query_starts": jnp.zeros(2, jnp.int32)}, "must agree"),
        ({"decode_rows": 3}, "decode_rows must be 0 to R = 2"),
        ({"max_queries": 0}, "max_queries must be at least 1"),
        ({"sinks": jnp.zeros(3)}, r"sinks must be \[N\]"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"softcap": float("inf")}, "softcap must be positive and finite, or None for no cap; got inf"),
        ({"q": jnp.zeros((3, 4, 64), jnp.int32)}, "q must be an array of floating type, got int32"),
        ({"k_pages": jnp.zeros((4, 16, 128), jnp.int32)}, "k_pages must be an array of floating or int8 type"),
        ({"lengths": [1, 1]}, "lengths must be an array of integer type, got list: give jnp.asarray of it"),
        ({"lengths": jnp.ones(2)}, "lengths must be an array of integer type, got float32"),
        ({"block_tables": jnp.zeros((2, 2))}, "block_tables must be an array of integer type, got float32"),
        ({"query_starts": jnp.arange(3.0)}, "query_starts must be an array of integer type, got float32"),
        ({"sinks": jnp.zeros(4, jnp.int32)}, "sinks must be an array of floating type, got int32"),
        ({"window": 2.5}, "window must be a whole number, got 2.5"),
        ({"max_queries": 1.0}, "max_queries must be a whole number, got 1.0"),
        ({"decode_rows": None}, "decode_rows must be a whole number, got None"),
        ({"value_dim": 0}, "v_pages must be .* for 2 heads of 0"),
        ({"scale": None}, "scale must be a finite number, such as head_dim .* got None"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"q": jnp.zeros((0, 4, 64))}, r"no axis may be empty, got q \(0, 4, 64\)"),
        ({"block_tables": jnp.zeros((2, 0), jnp.int32)}, r"no axis may be empty.*block_tables \(2, 0\)"),
        ({"block_tables": jnp.zeros((0, 2), jnp.int32)}, r"no axis may be empty.*block_tables \(0, 2\)"),
        ({"kv_heads": 0}, "no multiple of 0"),
        (
            {x: jnp.zeros((4, 16, 0, 64)) for x in ("k_pages", "v_pages")} | {"layout": "heads_last", "kv_heads": None},
            r"no axis may be empty.*k_pages \(4, 16, 0, 64\)",
        ),
        ({"implementation": "cuda"}, "'cuda' is not one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        paged_attention(**arguments(**changes))


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("hints", [{}, {"max_queries": 1}], ids=["chunks", "decode rows"])
def test_a_derivative_is_refused(wrap, hints):
    slope = jax.grad(lambda q: paged_attention(**arguments(q=q, implementation="xla", **hints)).sum())
    with pytest.raises(NotImplementedError, match=r"over pages has no derivative: .* pdx\.forward without a cache"):
        wrap(slope)(arguments()["q"])


def test_the_result_has_the_values_size():
    shape = jax.eval_shape(
        partial(paged_attention, scale=1.0, layout="heads_last"),
        *[jnp.zeros(s) for s in ((3, 4, 64), (4, 16, 2, 64), (4, 16, 2, 32))],
        **{k: arguments()[k] for k in ("block_tables", "lengths", "query_starts")},
    )
    assert shape.shape == (3, 4, 32)
