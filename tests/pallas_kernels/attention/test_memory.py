"""What attention reads: blocks for the row that needs the most, and nothing of what a slot's last user left."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, flash_attention, reference_attention
from pallas_kernels.attention import blocked
from pallas_kernels.attention.cases import Case
from tests.support.attention_problems import make

pytestmark = pytest.mark.thin(6)

OPS = {"reference": reference_attention, "flash": flash_attention, "decode": decode_attention}
GARBAGE = {"nan": np.nan, "infinity": np.inf, "large": 1e30}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "case",
    [
        Case("full", (60, 0, 200, 9), (2, 1, 1, 0), 2, 256),
        Case("ring", (300, 0, 100, 9), (2, 1, 1, 0), 2, 128, window=50),
    ],
    ids=lambda c: c.name,
)
def test_slots_that_hold_nothing_may_hold_anything(op, case, garbage):
    clean, dirty = make(case, unwritten=0.0), make(case, unwritten=GARBAGE[garbage])
    assert not np.array_equal(clean.arrays["v"], dirty.arrays["v"])
    # An idle row may even hold nothing but garbage: its length says 0.
    k, v = (x.at[3].set(GARBAGE[garbage]) for x in (dirty.arrays["k"], dirty.arrays["v"]))
    np.testing.assert_array_equal(np.asarray(dirty.run(OPS[op], k=k, v=v)), np.asarray(clean.run(OPS[op])))


@pytest.mark.parametrize("op", OPS)
def test_the_garbage_would_be_seen(op):
    """The test above can fail: one slot further is enough."""
    case = Case("full", (60, 0, 200, 9), (2, 1, 1, 0), 2, 256)
    lengths = jnp.asarray(case.lengths).at[0].add(1)
    out = np.asarray(make(case).run(OPS[op], lengths=lengths, starts=jnp.asarray(case.held) + 1))
    assert np.isnan(out[0]).any()
    assert np.isfinite(out[2]).all()


@pytest.mark.parametrize("op", ["flash", "decode"])
def test_a_row_does_not_see_its_neighbours_garbage(op):
    case = Case("three rows", (60, 20, 100), (2, 2, 2), 2, 128)
    problem = make(case, unwritten=0.0)
    k, v = (problem.arrays[name].at[1].set(jnp.nan) for name in "kv")
    out, clean = np.asarray(problem.run(OPS[op], k=k, v=v)), np.asarray(problem.run(OPS[op]))
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(out[[0, 2]], clean[[0, 2]])


def trips(monkeypatch, op, case: Case) -> int:
    """Blocks of keys that one block of queries reads, as the loop was asked for them."""
    ranges = []

    def loop(first, end, body, start):
        ranges.append(range(int(first), int(end)))
        return jax.lax.fori_loop(first, end, body, start)

    proxy = SimpleNamespace(fori_loop=loop, dynamic_slice_in_dim=jax.lax.dynamic_slice_in_dim, map=jax.lax.map)
    with monkeypatch.context() as patch:
        patch.setattr(blocked, "lax", proxy)
        problem = make(case)
        problem.check(op(**problem.arguments()))
    (blocks,) = ranges
    return len(blocks)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (Case("a long cache costs nothing", (100, 3), (1, 1), 1, 8192, kv_heads=1), 1),
        (Case("one token past a block", (128, 3), (1, 1), 1, 1024, kv_heads=1), 2),
        (Case("the longest row counts", (600, 3), (1, 1), 1, 1024, kv_heads=1), 5),
        (Case("an idle long row does not", (600, 3), (0, 1), 1, 1024, kv_heads=1), 1),
        (Case("nobody", (600, 3), (0, 0), 1, 1024, kv_heads=1), 0),
        (Case("only the window", (600,), (1,), 1, 1024, kv_heads=1, window=20), 1),
        (Case("a window over an edge", (645,), (1,), 1, 1024, kv_heads=1, window=20), 2),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_decode_reads_what_the_context_needs(monkeypatch, case, blocks):
    assert trips(monkeypatch, decode_attention, case) == blocks


@pytest.mark.parametrize("queries", [1, 4, 128])
def test_a_window_costs_no_more_where_one_row_is_far_ahead(monkeypatch, queries):
    """The turns are all that differs: both calls run the same program. It once read what lies between the rows too."""
    held = (6000,) + (600,) * 7
    settings = {"kv_heads": 1, "head_dim": 4, "window": 512}
    op = flash_attention if queries > 16 else decode_attention
    ragged, equal = (
        trips(monkeypatch, op, Case("rows", rows, (queries,) * 8, queries, 1024, **settings))
        for rows in (held, (600,) * 8)
    )
    assert 0 < ragged <= 1.5 * equal
    assert ragged <= -(-(512 + queries) // 128) + 1


def test_prefill_reads_what_the_context_needs(monkeypatch):
    case = Case("a chunk", (300, 0), (40, 3), 40, 4096, kv_heads=1)
    assert trips(monkeypatch, flash_attention, case) == 3  # 340 positions in blocks of 128
