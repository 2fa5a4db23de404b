"""`pdx compare`: that its loops do what they claim, that it tells faster from slower and right from wrong, and says
what ran."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hlo, problems
from pdx.bench.compare import contestants, device_time, exact, measure
from pdx.bench.compare.device_time import Loop, chained, empty_result
from pdx.bench.compare.rows import Comparison, Row, verdict
from pdx.bench.compare.show import show
from pdx.bench.timing import Timing
from tests.compare_cases import CPU, case_of, really_run, tell_the_time
from tests.compare_cases import NAMES as OPS


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tell_the_time(monkeypatch)


def contestant(op, arrays=None):
    case = case_of(op)
    problem = problems.OPS[op](case, "xla", "heads_last")
    return next(contestants.ours(op, case, arrays or exact.draw(problem), "cpu"))


# The loop


def turns_seen(fn, turns):
    """How often `fn`, called in a loop, is executed."""
    calls = []

    def counted(x):
        jax.debug.callback(lambda _: calls.append(1), x.ravel()[0])
        return fn(x)

    x = jnp.ones((4, 4))
    loop = Loop(chained(counted), empty_result(fn, x), [x], ())
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
        called = (re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", i.rest)
                  for name in new for i in module.computations[name].values())
        new = {name for names in called for name in names} - reached
    return [i for name in reached for i in module.computations[name].values()], module


def test_an_op_stays_in_its_loop_and_so_does_what_it_makes_of_its_weights():
    """The product and the widening of int8 weights, which depend on no query, are both in the loop's body."""
    w = jnp.ones((128, 256), jnp.int8)
    x = jnp.ones((4, 256))
    fn = lambda x, w: x @ w.astype(jnp.float32).T  # noqa: E731
    text = Loop(chained(fn), empty_result(fn, x, w), [x], (w,)).text
    inside, module = inside_loops(text)
    everywhere = [i for body in module.computations.values() for i in body.values()]
    for opcode, dims in (("dot", (4, 128)), ("convert", (128, 256))):
        found = [i for i in everywhere if i.opcode == opcode and sorted(i.shapes[0].dims) == sorted(dims)]
        assert found, opcode
        assert all(i in inside for i in found), opcode


@pytest.mark.parametrize("op", OPS)
def test_a_loop_of_an_op_needs_each_result(op):
    """After n turns the result is what n calls give, each fed with the one before; other queries give another."""
    c = contestant(op)
    loop = measure.make_loop(c)
    want = empty_result(c.fn, c.x, *c.held)
    call = jax.jit(c.fn)
    for _ in range(3):
        want = call(device_time.fed(c.x, want), *c.held)
    loop.run(3)
    np.testing.assert_allclose(np.asarray(loop.state, np.float32), np.asarray(want, np.float32), rtol=1e-3, atol=1e-3)
    once = call(c.x, *c.held)
    assert np.abs(np.asarray(loop.state, np.float32) - np.asarray(once, np.float32)).max() > 0
    before = np.asarray(loop.state)
    loop.run(3)
    assert not np.allclose(before, np.asarray(loop.state), equal_nan=True)


def test_what_a_launch_costs_is_apart_and_cancels(monkeypatch):
    x = jnp.ones((2, 2))
    loop = Loop(chained(lambda x: x), x, [x], ())
    monkeypatch.setattr(loop, "run", lambda turns: 5.0 + 2.0 * turns)
    assert loop().seconds == (2.0,)
    assert loop.dispatch.seconds == (5.0,)


def test_a_loop_is_made_long_enough(monkeypatch):
    x = jnp.ones((2, 2))
    loop = Loop(chained(lambda x: x), x, [x], ())
    monkeypatch.setattr(device_time, "SECONDS", 0.1)
    monkeypatch.setattr(loop, "run", lambda turns: 1e-3 * turns)
    loop.calibrate()
    assert loop.turns == 128 + device_time.FEW


# Right and wrong, faster and slower


@pytest.mark.parametrize("op", OPS)
def test_xla_and_the_interpreted_kernel_are_right_and_zeros_are_not(op):
    case = case_of(op)
    xla, pallas, *_ = measure.case_rows(op, case, CPU, "cpu", 1, ("v5e",))
    assert (xla.path, xla.rung, xla.ran, xla.auto) == ("xla", "measured", "XLA", True)
    assert (pallas.path, pallas.rung, pallas.ran, pallas.auto) == ("pallas", "interpreted", "interpreted", False)
    assert pallas.note == "not on cpu: compiled statically for v5e"
    assert pallas.seconds is None
    for row in (xla, pallas):
        assert 0 <= row.relative_error < 1e-4
        assert not row.wrong
    problem = problems.OPS[op](case, "xla", "heads_last")
    right, real = exact.answer(problem, exact.draw(problem))
    assert exact.errors(jnp.zeros(right.shape), right, real)[1] == 1.0


@pytest.mark.parametrize(("value", "error"), [(0.0, 1.0), (float("nan"), None)])
def test_a_wrong_implementation_is_found_and_wins_nothing(value, error):
    op = "quantized_matmul"
    problem = problems.OPS[op](case_of(op), "xla", "heads_last")
    arrays = exact.draw(problem)
    c = contestant(op, arrays)
    broken = replace(c, path="pallas", fn=lambda *a: jnp.full_like(c.fn(*a), value))
    rows = measure.compete([c, broken], measure.start_row(problem, CPU, "cpu"), exact.answer(problem, arrays), 1)
    by_path = {r.path: r for r in rows}
    assert by_path["pallas"].wrong
    assert not by_path["xla"].wrong
    assert by_path["pallas"].to_dict()["relative_error"] == error
    (said,) = Comparison("cpu", CPU, "told", {}, list(rows)).verdicts()
    assert said["verdict"] == "wrong"


FEATURES = (
    ("flash_attention", "int8, three KV heads, ring, soft cap, sinks"), ("flash_attention", "token tree"),
    ("flash_attention", "every slot held, no mask"), ("flash_attention", "ring that wrapped, rows far apart, chunks"),
    ("decode_attention", "rows that take no part"), ("paged_attention", "int8, bf16 queries, window, sinks"),
    ("quantized_matmul", "W8A8, rows"),
)  # fmt: skip


@pytest.mark.parametrize(("op", "name"), FEATURES)
def test_what_is_right_is_known_for_rarer_features(op, name):
    case = case_of(op, name)
    problem = problems.OPS[op](case, "xla", "heads_last")
    arrays = exact.draw(problem)
    c = contestants.of_problem("xla", problems.OPS[op](case, "xla"), arrays)
    _, relative = exact.errors(jax.jit(c.fn)(c.x, *c.held), *exact.answer(problem, arrays))
    assert relative < (3e-2 if "bf16" in name or name.startswith("W8A8") else 1e-4)


@pytest.mark.parametrize("pieces", [1 << 12, 1 << 16])
def test_pieces_change_nothing(monkeypatch, pieces):
    for op, name in (("flash_attention", "chunk behind a context"), ("quantized_matmul", "W4A16, affine")):
        problem = problems.OPS[op](case_of(op, name), "xla", "heads_last")
        arrays = exact.draw(problem)
        whole, real = exact.answer(problem, arrays)
        with monkeypatch.context() as m:
            m.setattr(exact, "PIECE_BYTES", pieces)
            np.testing.assert_allclose(exact.answer(problem, arrays)[0][real], whole[real], rtol=1e-4, atol=1e-5)


def test_a_slower_implementation_is_shown_as_slower(capsys, monkeypatch):
    """One that does everything again and again beside one that does it once, on a clock that counts what is done."""
    done = []

    def once(x, *held):
        jax.debug.callback(lambda _: done.append(1), x.ravel()[0])
        return c.fn(x, *held)

    def often(x, *held):
        return jax.lax.fori_loop(0, 3, lambda _, y: once(device_time.fed(x, 0 * y), *held), once(x, *held))

    def clock():
        jax.effects_barrier()
        return len(done) * 1e-3

    monkeypatch.setattr(Loop, "run", really_run)
    monkeypatch.setattr(device_time, "time", SimpleNamespace(perf_counter=clock))
    problem = problems.OPS["quantized_matmul"](case_of("quantized_matmul"), "xla", "heads_last")
    arrays = exact.draw(problem)
    c = contestant("quantized_matmul", arrays)
    contestants_here = [replace(c, fn=once), replace(c, path="pallas", fn=often)]
    rows = measure.compete(contestants_here, measure.start_row(problem, CPU, "cpu"), exact.answer(problem, arrays), 3)
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


@pytest.mark.parametrize(("target", "says"), [
    ("tpu_custom_call", "1 Pallas kernel"), ("__gpu$xla.gpu.triton", "1 Pallas kernel"), ("Sharding", "XLA"),
])  # fmt: skip
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
    arrays = exact.draw(problem)

    def refused(*_):
        raise NotImplementedError("no tiles of 7")

    rows = measure.compete([replace(c, path="pallas", fn=refused), c], measure.start_row(problem, CPU, "cpu"),
                           exact.answer(problem, arrays), 1)  # fmt: skip
    by_path = {r.path: r for r in rows}
    assert (by_path["pallas"].rung, by_path["pallas"].note) == ("not run", "no tiles of 7")
    assert by_path["xla"].seconds > 0


def test_jax_nn_stands_beside_cases_that_it_can_express():
    for op, name, there in (
        ("decode_attention", "one query head a KV head", True), ("decode_attention", "window of one", False),
        ("decode_attention", "int8", False), ("flash_attention", "Llama 3 8B, f32", True),
        ("flash_attention", "token tree", False), ("flash_attention", "chunk behind a context", False),
    ):  # fmt: skip
        case = case_of(op, name)
        assert (contestants.is_square(case) or contestants.is_decode(case)) == there, name
    op = "decode_attention"
    case = case_of(op)
    problem = problems.OPS[op](case, "xla", "heads_last")
    arrays = exact.draw(problem)
    (peer,) = [c for c in contestants.peers(op, case, arrays, "cpu") if c.path == "jax.nn"]
    _, relative = exact.errors(peer.result(peer.fn(peer.x, *peer.held)), *exact.answer(problem, arrays))
    assert relative < 1e-4


def test_jax_nn_does_a_whole_prompt():
    case = replace(case_of("flash_attention", "Llama 3 8B, f32"), new=(64,), queries=64, slots=64, kv_heads=2, group=2,
                   head_dim=16, window=20)  # fmt: skip
    problem = problems.OPS["flash_attention"](case, "xla", "heads_last")
    arrays = exact.draw(problem)
    (peer,) = [c for c in contestants.peers("flash_attention", case, arrays, "cpu") if c.path == "jax.nn"]
    _, relative = exact.errors(peer.fn(peer.x, *peer.held), *exact.answer(problem, arrays))
    assert relative < 1e-4
