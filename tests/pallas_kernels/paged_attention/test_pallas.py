"""The Pallas kernels of paged attention, interpreted: every case against float64, what they fetch, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # who keeps the races it found
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.analysis import problems, traffic
from pallas_kernels.analysis.targets import Target
from pallas_kernels.decode_attention import tpu as decode
from pallas_kernels.hardware import chip
from pallas_kernels.layouts import SUBLANES, folded_width, round_up
from pallas_kernels.paged_attention import gpu, tpu, tpu_kernel, tpu_tiles
from pallas_kernels.paged_attention.api import explain, paged_attention
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.cases import CASES, LARGE, Case
from pallas_kernels.paged_attention.pieces import full_rows
from tests.pallas_kernels.paged_attention.test_xla import ids, make_once, run
from tests.support.paged_attention import make

pytestmark = pytest.mark.thin(14)

LAYOUT = {"tpu": "folded", "gpu": "heads_last"}


def small_tiles(name, case):
    """Such that small cases have several blocks of queries, several steps and several fetches a step."""
    if name == "gpu":
        return gpu.Config(block_q=8, block_k=16)
    call = call_of(case)
    if tpu.decodes(call):
        return decode.Config(128, 128)
    heads = min(n for n in range(1, call.kv_heads + 1) if tpu_tiles._whole(call, n))
    tile = 8 if case.dtype == "float32" else 16
    if case.stored == "int8":
        return tpu.Config(4 * tile, tile, heads, 128, 128)
    return tpu.Config(4 * tile, tile, heads, 32, 8 if case.stored == "float32" else 16)


# An interpreted kernel takes seconds to compile, the TPU's most: of its cases every third runs by default, all with
# `slow`.
RUNS = [
    pytest.param(name, case, id=f"{name}-{case.name}", marks=pytest.mark.slow if name == "tpu" and i % 3 else [])
    for name in LAYOUT
    for i, case in enumerate(CASES)
]


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_agrees_with_float64(name, case):
    problem = make_once(case)
    settings = {"implementation": name, "interpret": True, "return_lse": True, "config": small_tiles(name, case)}
    out, lse = run(problem, LAYOUT[name], **settings)
    assert out.dtype == problem.q.dtype
    problem.check(out, lse)
    assert (np.asarray(out, np.float64)[~problem.real] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUT)
@pytest.mark.parametrize("case", [CASES[3], CASES[20], CASES[22]], ids=ids)
def test_the_tiles_of_the_heuristic(name, case):
    problem = make_once(case)
    problem.check(run(problem, LAYOUT[name], implementation=name, interpret=True))


def test_gpu_parts_of_a_context_are_merged(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_KEYS", 16)
    case = Case("parts", (1, 0, 33, 130, 95), (1, 0, 1, 1, 1), tokens=6, group=3, sinks=True, max_queries=1)
    for window in (None, 60):
        problem = make(Case(**case.__dict__ | {"window": window}))
        settings = {"implementation": "gpu", "interpret": True, "return_lse": True}
        problem.check(*run(problem, "heads_last", **settings, config=gpu.Config(5, 16, splits=3)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["on_wait", "eager"])
@pytest.mark.parametrize("case", [CASES[3], CASES[14], CASES[22]], ids=ids)
def test_tpu_without_races_and_unwritten_memory(case, mode):
    """The TPU interpreter: memory starts as NaN, what is out of bounds raises, a missing wait shows."""
    problem = make_once(case)
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan")
    given = problem.arguments("folded") | {
        "config": small_tiles("tpu", case),
        "decode_rows": case.decode_rows,
        "decode_queries": case.decode_queries,
    }
    out, lse = paged_attention(**given, implementation="tpu", interpret=interpret, return_lse=True)
    problem.check(out, lse)
    assert not interpreter.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_a_missing_wait_would_be_seen(monkeypatch, mode):
    """The test above can fail: a kernel that reads a buffer before its fetches have come."""
    transfer = tpu_kernel.transfer
    monkeypatch.setattr(tpu_kernel, "transfer", lambda *a, start: transfer(*a, start=True) if start else None)
    problem = make_once(CASES[3])
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan")
    given = problem.arguments("folded") | {"config": tpu.Config(16, 16, 2, 32, 16)}

    def attempt():
        problem.check(paged_attention(**given, implementation="tpu", interpret=interpret))
        assert not interpreter.races.races_found

    with pytest.raises(Exception):  # noqa: B017 - by version and mode: a race, NaN, or what is left unwaited
        attempt()


@pytest.mark.parametrize("name", LAYOUT)
def test_a_row_ignores_its_neighbours_bit_for_bit(name):
    problem = make(Case("three rows", (40, 20, 33), (3, 2, 1), group=3))
    settings = {"implementation": name, "interpret": True, "config": small_tiles(name, problem.case)}
    clean = np.asarray(run(problem, LAYOUT[name], **settings))
    given = problem.arguments(LAYOUT[name])
    own = jnp.asarray(problem.tables[1, :2])
    spoiled = {x: given[x].at[own].set(jnp.nan) for x in ("k_pages", "v_pages")}
    out = np.asarray(run(problem, LAYOUT[name], **settings, **spoiled))
    assert np.isnan(out[3:5]).all()
    np.testing.assert_array_equal(out[[0, 1, 2, 5]], clean[[0, 1, 2, 5]])


@pytest.mark.parametrize("name", LAYOUT)
def test_what_a_kernel_cannot_do_it_says(name):
    problem = make_once(CASES[3])
    with pytest.raises(NotImplementedError, match=f"in the layout '{LAYOUT[name]}'.*use implementation='xla'"):
        run(problem, "heads_first", implementation=name, interpret=True)

    def loss(q):
        given = problem.arguments(LAYOUT[name]) | {"q": q, "config": small_tiles(name, problem.case)}
        return paged_attention(**given, implementation=name, interpret=True).sum()

    with pytest.raises(NotImplementedError, match="pages has no derivative: use reference_attention"):
        jax.grad(loss)(problem.q)
    assert explain("auto", "cpu").implementation == "xla"
    assert explain("auto", name).implementation == name


def test_tpu_pages_and_tiles_that_do_not_fit():
    problem = make(Case("pages of 24", (30,), (1,), page=24, dtype="bfloat16"))
    with pytest.raises(NotImplementedError, match="multiple of 16 tokens for bfloat16, not 24"):
        run(problem, "folded", implementation="tpu", interpret=True)
    with pytest.raises(ValueError, match="does not fit"):
        run(make_once(CASES[3]), "folded", implementation="tpu", interpret=True, config=tpu.Config(16, 16, 2, 32, 12))


# --- bytes


def call_of(case, layout="folded"):
    """The static facts of a case, without its arrays."""
    pages = sum(-(-n // case.page) for n in case.lengths) + case.spare
    most = min(case.max_queries or case.packed, case.packed)
    rows = len(case.lengths)
    return Call(
        case.packed,
        case.kv_heads * case.group,
        case.kv_heads,
        case.head_dim,
        case.value_size,
        rows,
        case.table_width,
        pages,
        case.page,
        round_up(case.kv_heads, SUBLANES) if case.stored == "int8" else 0,
        case.dtype,
        case.stored,
        layout,
        case.window,
        case.softcap,
        case.sinks,
        False,
        rows if most <= case.decode_queries else case.decode_rows,
        most,
        min(case.decode_queries, most),
    )


def walked_bytes(call, config, starts, lengths) -> int:
    """What one run of the kernel for chunks moves, from its plan: DMAs of pieces, blocks whose index changes."""
    flat = np.asarray(tpu.flat_plan(call, config, jnp.asarray(starts), jnp.asarray(lengths)))
    fields = dict(zip(tpu.FIELDS, flat.reshape(len(tpu.FIELDS), -1), strict=True))
    size, groups = jnp.dtype(call.dtype).itemsize, call.kv_heads // config.block_heads
    widths = folded_width(call.heads, call.head_dim) + folded_width(call.heads, call.value_dim)
    blocks = 1 + int((np.diff(fields["block"]) != 0).sum())
    kv = folded_width(call.kv_heads, call.head_dim) + folded_width(call.kv_heads, call.value_dim)
    unit = config.dma_k * (kv * jnp.dtype(call.kv_dtype).itemsize + groups * 8 * call.scale_heads)
    steps = -(-(fields["end"] - fields["first"]) // (config.block_k // config.dma_k))
    assert (fields["before"] == np.cumsum(steps) - steps).all()
    return int((fields["end"] - fields["first"]).sum()) * unit + blocks * config.block_q * widths * size


def counted_bytes(case, name, full: bool) -> int:
    """What the DMAs and blocks of a call of decode rows move, counted from the traced kernel; without its scalars."""
    problem = problems.OPS["paged_attention"](case, "tpu")
    with Target.get(name).tracing():
        (call,) = traffic.count(problem.fn(), *problem.arguments(full=full)).calls
    return call.bytes - call.operands["scalars"]


def decode_rows_of(case: Case) -> Case:
    rows = case.decode_rows or len(case.lengths)
    own = {"lengths": case.lengths[:rows], "queries": case.queries[:rows], "decode_rows": 0, "max_queries": 1}
    return Case(**vars(case) | own | {"tokens": None})


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e", "7x"])
@pytest.mark.parametrize("case", LARGE, ids=ids)
def test_decode_rows_move_what_is_said(case, name):
    """By the CostEstimate for full rows, by `moved_bytes` for the case's own."""
    case = decode_rows_of(case)
    call, on = call_of(case), chip(name)
    config, (starts, lengths) = tpu.heuristic(call, on), full_rows(call)
    estimate = tpu.cost(call, config, starts, lengths).bytes_accessed
    assert abs(counted_bytes(case, name, full=True) / estimate - 1) < 0.05
    own = np.arange(call.rows + 1), np.array(case.lengths)
    assert abs(counted_bytes(case, name, full=False) / tpu.moved_bytes(call, config, *own, on) - 1) < 0.02


@pytest.mark.parametrize("name", ["v4", "v5e", "v6e", "7x"])
@pytest.mark.parametrize("case", LARGE[1:], ids=ids)
def test_chunks_move_what_is_said(case, name):
    call, on = call_of(case), chip(name)
    starts, lengths = full_rows(call)
    for (part, rows), tiles in list(zip(tpu.parts(call), tpu.tiles_of(call, tpu.heuristic(call, on), on), strict=True))[
        1:
    ]:
        given = starts[rows.start : rows.stop + 1], lengths[rows]
        estimate = tpu.cost(part, tiles, *given).bytes_accessed
        assert abs(walked_bytes(part, tiles, *given) / estimate - 1) < 0.05


@pytest.mark.parametrize(("layout", "module", "name"), [("folded", tpu, "v5e"), ("heads_last", gpu, "h100")])
def test_decode_rows_move_their_own_bytes(layout, module, name):
    """Rows of 1000 tokens in pages of 128: K, V, queries and results once each, at most 5% more."""
    case = LARGE[0]
    call = call_of(case, layout)
    config = module.heuristic(call, chip(name))
    starts, lengths = np.arange(65, dtype=np.int32), np.array(case.lengths, np.int32)
    moved = module.moved_bytes(call, config, starts, lengths)
    own = 64 * 1000 * call.kv_bytes + 64 * call.heads * 2 * 128 * 2
    assert own <= moved <= 1.05 * own


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e", "7x"])
@pytest.mark.parametrize("case", LARGE, ids=ids)
def test_chunks_and_decode_rows_move_their_own_bytes(case, name):
    """What the rows of a mixed call hold, as it is stored, and all T queries and results move once: at most 5% more."""
    call, on = call_of(case), chip(name)
    lengths, queries = np.array(case.lengths, np.int32), np.array(case.queries, np.int32)
    seen = np.minimum(lengths, queries + (case.window or lengths) - 1)
    own = int(seen.sum()) * call.kv_bytes + call.tokens * call.heads * (case.head_dim + case.value_size) * 2
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    moved = tpu.moved_bytes(call, tpu.heuristic(call, on), starts, lengths, on)
    assert own <= moved <= 1.05 * own


def test_a_window_is_all_that_is_fetched():
    call = call_of(LARGE[4])
    config = tpu.heuristic(call, chip("v5e"))
    starts = np.concatenate([[0], np.cumsum(LARGE[4].queries)]).astype(np.int32)
    moved = tpu.moved_bytes(call, config, starts, np.array(LARGE[4].lengths, np.int32))
    seen = 16 * 512 + min(700, 512 + 240 - 1)
    assert moved < 1.35 * (seen * call.kv_bytes + 256 * call.heads * 512 * 2)
