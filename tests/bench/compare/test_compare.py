"""What `pdx compare` measures: its loops do what they claim, faster is told from slower and right from wrong."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.analysis import hlo, problems
from pallas_kernels.analysis.timing_loop import chained, fed, start
from pdx.bench.compare import contestants, device_time, expected, measure, paths
from pdx.bench.compare.device_time import Loop
from pdx.bench.compare.rows import Comparison, Row, verdict
from pdx.bench.compare.terminal import show
from pdx.bench.timing import Timing
from tests.support.compare_cases import CPU, NAMES, case_of, contestant, really_run, tell_the_time

pytestmark = pytest.mark.thin(4)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tell_the_time(monkeypatch)


# The loop


def turns_seen(fn, turns):
    """How often `fn`, called in a loop, is executed."""
    calls = []

    def counted(x):
        jax.debug.callback(lambda _: calls.append(1), x.ravel()[0])
        return fn(x)

    x = jnp.ones((4, 4))
    loop = Loop(chained(counted), start(fn, x), [x], ())
    loop.run(turns)
    jax.effects_barrier()
    return len(calls)


@pytest.mark.parametrize("turns", [0, 1, 7])
def test_every_turn_of_a_loop_is_executed(turns):
    assert turns_seen(lambda x: x * 2, turns) == turns


def inside_loops(text):
    """Instructions of the program that belong to the body of a while loop, by opcode as they act."""
    module = hlo.Module(text)
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    reached, new = set(), bodies
    while new:
        reached |= new
        called = (
            re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", i.rest)
            for name in new
            for i in module.computations[name].values()
        )
        new = {name for names in called for name in names} - reached
    return [i for name in reached for i in module.computations[name].values()], module


def test_an_op_stays_in_its_loop_and_so_does_what_it_makes_of_its_weights():
    """The product and the widening of int8 weights, which depend on no query, are both in the loop's body."""
    w = jnp.ones((128, 256), jnp.int8)
    x = jnp.ones((4, 256))
    fn = lambda x, w: x @ w.astype(jnp.float32).T  # noqa: E731
    text = Loop(chained(fn), start(fn, x, w), [x], (w,)).text
    inside, module = inside_loops(text)
    everywhere = [i for body in module.computations.values() for i in body.values()]
    for opcode, dims in (("dot", (4, 128)), ("convert", (128, 256))):
        found = [i for i in everywhere if i.opcode == opcode and sorted(i.shapes[0].dims) == sorted(dims)]
        assert found, opcode
        assert all(i in inside for i in found), opcode


@pytest.mark.parametrize("op", NAMES)
def test_a_loop_of_an_op_needs_each_result(op):
    """After n turns the result is what n calls give, each fed with the one before; other queries give another."""
    c = contestant(op)
    loop = measure.make_loop(c)
    x, want = start(c.fn, c.x, *c.held)
    call = jax.jit(c.fn)
    for _ in range(3):
        x = fed(x, want)
        want = call(x, *c.held)
    loop.run(3)
    found = np.asarray(loop.state[1], np.float32)
    np.testing.assert_allclose(found, np.asarray(want, np.float32), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(loop.state[0], x, rtol=1e-3, atol=1e-3)
    assert not np.allclose(x, c.x)
    loop.run(3)
    assert not np.allclose(found, np.asarray(loop.state[1]), equal_nan=True)


@pytest.mark.parametrize("op", NAMES)
def test_the_first_turn_is_the_call_itself(op):
    c = contestant(op)
    loop = measure.make_loop(c)
    loop.run(1)
    np.testing.assert_array_equal(loop.state[0], c.x)


def test_feeding_back_copies_nothing():
    """One value is written in place: no pass over what goes in or comes out is charged to the op."""
    x, w = jnp.ones((64, 256)), jnp.ones((512, 256))
    fn = lambda x, w: x @ w.T  # noqa: E731
    inside, _ = inside_loops(Loop(chained(fn), start(fn, x, w), [x], (w,)).text)
    moved = [i for i in inside if i.opcode in ("copy", "add", "multiply", "select") and i.shapes[0].bytes >= x.nbytes]
    assert moved == []


def test_what_a_launch_costs_is_apart_and_cancels(monkeypatch):
    x = jnp.ones((2, 2))
    loop = Loop(chained(lambda x: x), (x, x + 0), [x], ())
    monkeypatch.setattr(loop, "run", lambda turns: 5.0 + 2.0 * turns)
    assert loop().seconds == (2.0,)
    assert loop.dispatch.seconds == (5.0,)


def test_short_calls_on_a_gpu_run_in_blocks_of_a_known_length(monkeypatch):
    """Each block is a loop whose length the program knows, and all of its calls are made."""
    monkeypatch.setattr(device_time, "platform_of", lambda: "gpu")
    monkeypatch.setattr(device_time, "BLOCK", 4)
    fn, x = lambda x: x + 1, jnp.zeros((2, 2))
    loop = Loop(chained(fn), start(fn, x), [x], ())
    assert loop.block == 1
    loop()
    assert loop.block == 4
    loop.state = start(fn, x)
    loop.run(2)
    assert loop.state[1][0, 0] == 8  # calls, each of which adds one to what the call before gave


def test_a_loop_is_made_long_enough(monkeypatch):
    x = jnp.ones((2, 2))
    loop = Loop(chained(lambda x: x), (x, x + 0), [x], ())
    monkeypatch.setattr(device_time, "LONG_LOOP_S", 0.1)
    monkeypatch.setattr(loop, "run", lambda turns: 1e-3 * turns)
    loop.calibrate()
    assert loop.turns == 128 + device_time.SHORT_TURNS


# Right and wrong, faster and slower


@pytest.mark.parametrize("op", NAMES)
def test_xla_and_the_interpreted_kernels_are_right_and_zeros_are_not(op):
    case = case_of(op)
    names = [path.name for path in paths.other_platforms(op, "cpu", {})]
    xla, *kernels = measure.case_rows(op, case, CPU, "cpu", 1, ("v5e",))[: 1 + len(names)]
    assert (xla.path, xla.rung, xla.ran, xla.auto) == ("xla", "measured", "XLA", True)
    assert set(names) >= {"pallas tpu", "pallas gpu"}
    assert [k.path for k in kernels] == names
    for absent in (k for k in kernels if k.path == "cudnn"):  # a library: there is nothing to interpret
        assert (absent.rung, absent.auto, absent.relative_error) == ("not run", False, None)
        assert "compute capability 9.0" in absent.note
    kernels = [k for k in kernels if k.path != "cudnn"]
    for kernel in kernels:
        assert (kernel.rung, kernel.ran, kernel.auto, kernel.seconds) == ("interpreted", "interpreted", False, None)
        assert kernel.note == "not on cpu: static figures for v5e below"
    for row in (xla, *kernels):
        assert 0 <= row.relative_error < 1e-4
        assert not row.wrong
    problem = problems.OPS[op](case, "xla", "heads_last")
    right, real = expected.answer(problem, expected.draw(problem))
    assert expected.errors(jnp.zeros(right.shape), right, real)[1] == 1.0


@pytest.mark.parametrize(("value", "error"), [(0.0, 1.0), (float("nan"), None)])
def test_a_wrong_implementation_is_found_and_wins_nothing(value, error):
    op = "quantized_matmul"
    problem = problems.OPS[op](case_of(op), "xla", "heads_last")
    arrays = expected.draw(problem)
    c = contestant(op, arrays)
    broken = replace(c, path="pallas", fn=lambda *a: jnp.full_like(c.fn(*a), value))
    rows = measure.compete([c, broken], measure.start_row(problem, CPU, "cpu"), expected.answer(problem, arrays), 1)
    by_path = {r.path: r for r in rows}
    assert by_path["pallas"].wrong
    assert not by_path["xla"].wrong
    assert by_path["pallas"].to_dict()["relative_error"] == error
    (said,) = Comparison("cpu", CPU, "told", {}, list(rows)).verdicts()
    assert said["verdict"] == "wrong"


FEATURES = (
    ("flash_attention", "int8, three KV heads, ring, soft cap, sinks"),
    ("flash_attention", "token tree"),
    ("flash_attention", "every slot held, no mask"),
    ("flash_attention", "ring that wrapped, rows far apart, chunks"),
    ("decode_attention", "rows that take no part"),
    ("paged_attention", "int8, bf16 queries, window, sinks"),
    ("quantized_matmul", "W8A8, rows"),
)


@pytest.mark.parametrize(("op", "name"), FEATURES)
def test_what_is_right_is_known_for_rarer_features(op, name):
    case = case_of(op, name)
    problem = problems.OPS[op](case, "xla", "heads_last")
    arrays = expected.draw(problem)
    c = contestants.from_problem("xla", problems.OPS[op](case, "xla"), arrays)
    _, relative = expected.errors(jax.jit(c.fn)(c.x, *c.held), *expected.answer(problem, arrays))
    assert relative < (3e-2 if "bf16" in name or name.startswith("W8A8") else 1e-4)


@pytest.mark.parametrize("pieces", [1 << 12, 1 << 16])
def test_pieces_change_nothing(monkeypatch, pieces):
    for op, name in (("flash_attention", "chunk behind a context"), ("quantized_matmul", "W4A16, affine")):
        problem = problems.OPS[op](case_of(op, name), "xla", "heads_last")
        arrays = expected.draw(problem)
        whole, real = expected.answer(problem, arrays)
        with monkeypatch.context() as m:
            m.setattr(expected, "PIECE_BYTES", pieces)
            np.testing.assert_allclose(expected.answer(problem, arrays)[0][real], whole[real], rtol=1e-4, atol=1e-5)


def test_a_slower_implementation_is_shown_as_slower(capsys, monkeypatch):
    """One that does everything again and again beside one that does it once, on a clock that counts what is done."""
    done = []

    def once(x, *held):
        jax.debug.callback(lambda _: done.append(1), x.ravel()[0])
        return c.fn(x, *held)

    def often(x, *held):
        return jax.lax.fori_loop(0, 3, lambda _, y: once(x + 0 * y[0, 0], *held), once(x, *held))

    def clock():
        jax.effects_barrier()
        return len(done) * 1e-3

    monkeypatch.setattr(Loop, "run", really_run)
    monkeypatch.setattr(device_time, "time", SimpleNamespace(perf_counter=clock))
    problem = problems.OPS["quantized_matmul"](case_of("quantized_matmul"), "xla", "heads_last")
    arrays = expected.draw(problem)
    c = contestant("quantized_matmul", arrays)
    contestants_here = [replace(c, fn=once), replace(c, path="pallas", fn=often)]
    rows = measure.compete(
        contestants_here, measure.start_row(problem, CPU, "cpu"), expected.answer(problem, arrays), 3
    )
    assert [r.seconds for r in rows] == pytest.approx([1e-3, 4e-3])
    found = Comparison("cpu", CPU, "told", {}, list(rows))
    (said,) = found.verdicts()
    assert (said["path"], said["verdict"], said["over_xla"]) == ("pallas", "slower", pytest.approx(0.25))
    monkeypatch.setenv("COLUMNS", "120")
    show(found)
    assert re.search(r"pallas .* 0\.25x slower", capsys.readouterr().out)


def test_verdicts_are_by_device_time_and_spread():
    base = Row("op", "case", "xla", "cpu", "measured", seconds=1.0, low=0.9, high=1.1, dispatch_seconds=9.0)
    other = replace(base, path="pallas", dispatch_seconds=0.1)
    assert verdict(replace(other, seconds=0.5, low=0.4, high=0.6), base) == "faster"
    assert verdict(replace(other, seconds=2.0, low=1.9, high=2.1), base) == "slower"
    assert verdict(replace(other, seconds=1.05, low=1.0, high=1.1), base) == "same"
    assert verdict(replace(other, seconds=0.5, low=0.4, high=0.6, dtype="float32", relative_error=1.0), base) == "wrong"


def test_times_are_median_and_quartiles():
    assert Timing((5.0, 1.0, 2.0, 3.0, 4.0)).quartiles == (2.0, 4.0)
    assert Timing((1.0,)).quartiles == (1.0, 1.0)


# What ran


@pytest.mark.parametrize(
    ("target", "says"),
    [("tpu_custom_call", "1 Pallas kernel"), ("__gpu$xla.gpu.triton", "1 Pallas kernel"), ("Sharding", "XLA")],
)
def test_what_ran_is_read_from_the_program(target, says):
    text = f"""HloModule m

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %c = f32[8]{{0}} custom-call(%p), custom_call_target="{target}"
}}
"""
    assert measure.what_ran(text) == says


def test_a_contestant_that_fails_says_why_and_the_others_go_on():
    c = contestant("quantized_matmul")
    problem = problems.OPS["quantized_matmul"](case_of("quantized_matmul"), "xla", "heads_last")
    arrays = expected.draw(problem)

    def refused(*_):
        raise NotImplementedError("no tiles of 7")

    rows = measure.compete(
        [replace(c, path="pallas", fn=refused), c],
        measure.start_row(problem, CPU, "cpu"),
        expected.answer(problem, arrays),
        1,
    )
    by_path = {r.path: r for r in rows}
    assert (by_path["pallas"].rung, by_path["pallas"].note) == ("not run", "no tiles of 7")
    assert by_path["xla"].seconds > 0


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("decode_attention", "one query head a KV head"),
        ("decode_attention", "rows that take no part"),
        ("decode_attention", "window of one"),
        ("flash_attention", "chunk behind a context"),
        ("flash_attention", "everything that is held, not only what came before"),
    ],
)
def test_jax_nn_stands_beside_cases_that_it_can_express_and_is_right(op, name):
    case = case_of(op, name)
    problem = problems.OPS[op](case, "xla", "heads_last")
    arrays = expected.draw(problem)
    (peer,) = [c for c in contestants.peers(op, case, arrays, "cpu") if c.path == "jax.nn"]
    _, relative = expected.errors(peer.result(peer.fn(peer.x, *peer.held)), *expected.answer(problem, arrays))
    assert relative < 1e-4


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("decode_attention", "int8"),
        ("decode_attention", "ring that wrapped, rows far apart"),
        ("flash_attention", "token tree"),
        ("flash_attention", "soft cap"),
        ("flash_attention", "values of another size"),
    ],
)
def test_jax_nn_does_not_stand_beside_what_it_cannot_express(op, name):
    case = case_of(op, name)
    assert not contestants.expressible(case)
    assert list(contestants.peers(op, case, expected.draw(problems.OPS[op](case, "xla", "heads_last")), "cpu")) == []


def test_jax_nn_does_a_whole_prompt():
    case = replace(
        case_of("flash_attention", "Llama 3 8B, f32"),
        new=(64,),
        queries=64,
        slots=64,
        kv_heads=2,
        group=2,
        head_dim=16,
        window=20,
    )
    problem = problems.OPS["flash_attention"](case, "xla", "heads_last")
    arrays = expected.draw(problem)
    (peer,) = [c for c in contestants.peers("flash_attention", case, arrays, "cpu") if c.path == "jax.nn"]
    _, relative = expected.errors(peer.fn(peer.x, *peer.held), *expected.answer(problem, arrays))
    assert relative < 1e-4
