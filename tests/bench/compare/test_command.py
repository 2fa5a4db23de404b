"""`pdx compare`: what it is asked for, what it prints and writes, and what compilers add."""

import csv
import importlib
import json
import re
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from pallas_kernels.analysis import problems, targets
from pdx.bench import compare as comparing
from pdx.bench.compare import absent_chips, ceiling, plot, selection, steps
from pdx.bench.compare.compile_process import DYNAMIC, xla_bytes
from pdx.bench.compare.rows import COLUMNS, Row
from pdx.bench.compare.steps import Shape, Subject
from pdx.cli import app
from pdx.errors import RequestError
from tests.support import tiny_model
from tests.support.compare_cases import CPU, NAMES, case_of, tell_the_time

pytestmark = pytest.mark.thin(3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tell_the_time(monkeypatch)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny_model.make(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("shape", [Shape("prefill", 2, 16), Shape("decode", 2, 16)], ids=lambda s: s.phase)
def test_steps_are_measured_and_right(directory, shape):
    subject = Subject(directory, "float32")
    params = steps.parameters(subject)
    xla, pallas = steps.rows(subject, params, shape, CPU, "cpu", 1)
    assert (xla.op, xla.rung, xla.ran) == (shape.phase, "measured", "XLA")
    assert xla.relative_error < 1e-4
    assert xla.seconds > 0
    assert pallas.note == "not on cpu: --targets gives static figures"
    cost = getattr(subject.setup(), shape.phase)(2, 16)
    assert (xla.flops, xla.bytes) == (cost.flops, cost.bytes)


def test_each_decode_step_of_a_loop_takes_the_token_before(directory):
    """Three turns give what three steps give, of which each stands at the same place with another token."""
    cfg, shape = Subject(directory, "float32").config(), Shape("decode", 1, 12)
    params = steps.parameters(Subject(directory, "float32"))
    loop = steps.make_loop(cfg, params, shape, "xla")
    loop.run(3)
    history, token = steps.prompts(cfg, shape), int(steps.prompts(cfg, shape)[0, -1])
    logits = np.zeros((1, cfg.vocab_size))
    for _ in range(3):
        history[0, -1] = (token + int(logits.argmax())) % cfg.vocab_size
        logits = np.asarray(steps._plain_logits(params, cfg, history))
    np.testing.assert_allclose(np.asarray(loop.state[1]), logits, rtol=1e-3, atol=1e-3)
    assert int(loop.state[2].lengths[0]) == 12


def test_a_shape_of_configs_gets_random_weights(monkeypatch):
    seen = []
    monkeypatch.setattr(steps, "init_params", lambda cfg, key, dtype: seen.append((cfg.num_layers, dtype)) or {})
    assert steps.parameters(Subject("smollm2-135m", "float32")) == {}
    assert seen == [(30, jnp.dtype("float32"))]


@pytest.fixture
def small(monkeypatch):
    """A run of one small case on a device whose figures are told."""
    monkeypatch.setattr(ceiling, "device_roofline", lambda: (CPU, "told"))
    monkeypatch.setattr(targets, "missing", lambda name: f"compiling for {name} needs libtpu: pip install 'X[aot]'")
    return ["compare", "decode_attention", "--shapes", NAMES["decode_attention"], "--rounds", "1"]


def run(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    if done.exit_code:
        raise done.exception
    return done.stdout


def test_json_csv_and_the_picture(small, tmp_path):
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "rows.csv", tmp_path / "roofline.png"
    found = json.loads(run(*small, "--json", "--csv", str(table), "--plot", str(picture)))
    assert set(found) == {"device", "ceiling", "versions", "rows", "verdicts", "notes"}
    assert found["notes"][0].startswith("No accelerator here")
    assert [(r["path"], r["device"], r["rung"]) for r in found["rows"]] == [
        ("xla", "cpu", "measured"),
        ("pallas tpu", "cpu", "interpreted"),
        ("pallas gpu", "cpu", "interpreted"),
        ("jax.nn", "cpu", "measured"),
        ("pallas", "v5e", "counted"),
    ]
    xla, _, _, peer, counted = found["rows"]
    assert set(xla) == set(COLUMNS)
    for row in (xla, peer):
        assert (
            min(
                row[k]
                for k in ("seconds", "gb_per_s", "tflop_per_s", "of_roofline", "compile_seconds", "dispatch_seconds")
            )
            > 0
        )
        assert row["low"] <= row["seconds"] <= row["high"]
    assert counted["moved_bytes"] >= counted["bytes"] > 0
    assert counted["done_flops"] >= counted["flops"] > 0
    assert "pip install 'X[aot]'" in counted["note"]
    assert [v["path"] for v in found["verdicts"]] == ["jax.nn"]
    with table.open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 5
    assert set(read[0]) == set(COLUMNS)
    assert float(read[0]["seconds"]) == xla["seconds"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_tables_fit_and_say_what_is_missing(small, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = run(*small, "--targets", "v5e,h100")
    assert max(map(len, out.splitlines())) <= 120
    assert "No accelerator here" in out
    assert re.search(r"xla\*.*XLA", out)
    assert re.search(r"pallas tpu +- .*interpreted", out)
    assert "not on cpu: static figures for v5e, h100 below" in out.replace("\n", " ")
    for target in ("v5e", "h100"):
        assert f"compiling for {target} needs libtpu: pip install 'X[aot]'" in out


def test_only_the_static_part_is_counted_for_targets(small, monkeypatch):
    monkeypatch.setattr(absent_chips, "_compile_in_process", lambda *_: pytest.fail("a compiler was started"))
    rows = absent_chips.rows("h100", [("decode_attention", case_of("decode_attention"))], None, [], True)
    assert [(r.path, r.rung, r.device) for r in rows] == [("pallas", "counted", "h100")]


def test_cycles_are_asked_of_every_kernel_that_compiled(monkeypatch):
    """Of the library's and of one's own; not of XLA, of loops of dynamic length, or of what was refused."""
    asked = []
    monkeypatch.setattr(targets, "missing", lambda name: None)
    monkeypatch.setattr(absent_chips.static, "cycles", lambda problem, target: asked.append(problem.call.layout) or 940)
    op, case = "decode_attention", case_of("decode_attention")
    row = Row(op, case.name, "pallas", "v5e", "compiled")
    given = [replace(row, path=path) for path in ("pallas", "mine", "xla", "loops", "refused")]
    given[3:] = [replace(given[3], note=DYNAMIC), replace(given[4], rung="not run", note="no")]
    monkeypatch.setattr(absent_chips, "_compile_in_process", lambda request, report: iter(given))
    extra = {
        op: dict.fromkeys(("mine", "loops", "refused"), importlib.import_module("pallas_kernels.decode_attention.tpu"))
    }
    found = absent_chips.rows("v5e", [(op, case)], None, [], True, extra=extra)
    assert [r.cycles for r in found] == [940, 940, None, None, None]
    assert found[1].cycle_seconds == 940 / 1.5e9
    assert asked == ["folded", "folded"]


def test_absent_chips_get_the_first_layers_of_each_kind():
    assert Subject("smollm2-135m", "bfloat16", False).compiled_config().num_layers == 2
    gemma = Subject("gemma-3-1b", "bfloat16", False)
    assert gemma.compiled_config().windows == gemma.config().windows[:6]
    assert set(gemma.compiled_config().windows) == set(gemma.config().windows)
    assert Subject("gemma-3-1b", "bfloat16").compiled_config() == gemma.config()


def test_a_compiler_that_ends_leaves_what_it_gave_and_says_so(monkeypatch):
    monkeypatch.setattr(targets, "missing", lambda name: None)
    given = [Row("decode_attention", "a", "pallas", "v5e", "compiled")]
    monkeypatch.setattr(absent_chips, "_compile_in_process", lambda request, report: iter(given))
    (row,) = absent_chips.rows("v5e", [("decode_attention", case_of("decode_attention"))], None, [], False)
    assert "The compiler ended here: 1 more are missing" in row.note
    given.clear()
    with pytest.raises(RequestError, match="the compiler for v5e ended"):
        absent_chips.rows("v5e", [("decode_attention", case_of("decode_attention"))], None, [], False)


def test_bytes_of_an_xla_program_are_those_that_its_fusions_read_and_write():
    text = """HloModule m

%f (p: s8[64,32], x: f32[4,32]) -> f32[4,64] {
  %p = s8[64,32]{1,0} parameter(0)
  %w = f32[64,32]{1,0} convert(%p)
  %x = f32[4,32]{1,0} parameter(1)
  ROOT %d = f32[4,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (a: s8[64,32], b: f32[4,32]) -> f32[4,64] {
  %a = s8[64,32]{1,0} parameter(0)
  %b = f32[4,32]{1,0} parameter(1)
  ROOT %r = f32[4,64]{1,0} fusion(%a, %b), kind=kOutput, calls=%f
}
"""
    assert xla_bytes(text) == 64 * 32 + 4 * 4 * 32 + 4 * 4 * 64
    assert xla_bytes(text.replace("fusion(%a, %b), kind=kOutput, calls=%f", "while(%a), condition=%c, body=%f")) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["attention"], "no op 'attention' to compare; there are flash_attention, .*, steps"),
        (
            ["decode_attention", "--shapes", "nothing"],
            "no case has 'nothing' in its name; there are: Llama 3 8B, bf16;",
        ),
        (["decode_attention", "--targets", "v9"], "target 'v9': no chip 'v9'.*targets are v4, v5e"),
        (["decode_attention", "--targets", "t4"], "t4 has no Pallas compiler"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(arguments, says):
    with pytest.raises(RequestError, match=says):
        run("compare", *arguments)


def test_a_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match=r"pip install 'pdx-inference\[notebook\]'"):
        plot.require()


def test_every_default_case_exists():
    for op, names in selection.ON_CPU.items():
        assert {c.name for c in selection.cases(op, None, "cpu")} == set(names)
        assert len(selection.cases(op, "all", "cpu")) > len(selection.cases(op, None, "tpu")) > 3
    assert set(selection.ON_CPU) == set(problems.ops())


def test_this_device_is_measured_where_the_table_lacks_it():
    chip = ceiling.measured(megabytes=1, side=64)
    assert chip.hbm_gbps > 0
    assert chip.tflops("float32") > 0
    assert chip.tflops("int8") > 0
    assert chip.tflops("bfloat16") == chip.tflops("float32")


@pytest.mark.slow
def test_the_library_call_is_the_command(small):
    found = comparing.compare(["decode_attention"], shapes=NAMES["decode_attention"], targets=(), rounds=1)
    assert [r.path for r in found.rows] == ["xla", "pallas tpu", "pallas gpu", "jax.nn"]


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_cases_and_steps_are_compiled(target):
    if why := targets.missing(target):
        pytest.skip(why)
    cases = [("decode_attention", case_of("decode_attention")), ("quantized_matmul", case_of("quantized_matmul"))]
    shapes = [Shape("decode", 1, 128)]
    rows = absent_chips.rows(target, cases, Subject("smollm2-135m", "bfloat16"), shapes, True)
    both = [*(op for op, _ in cases), "decode"]
    assert [(r.op, r.path, r.rung) for r in rows] == [(op, p, "compiled") for op in both for p in ("pallas", "xla")]
    for row in rows:
        assert row.compile_seconds > 0
        kernels = 30 if row.op == "decode" else 1
        assert row.ran == "XLA" if row.path == "xla" else re.match(r"(\d+) Pallas kernels?$", row.ran)
        if row.path == "pallas":
            assert int(row.ran.split()[0]) >= kernels
    assert all(r.vmem_bytes or r.shared_bytes for r in rows[:4] if r.path == "pallas")
    assert target == "h100" or rows[2].cycles > 0


def test_steps_without_a_compiler_have_what_the_cost_model_says(monkeypatch):
    monkeypatch.setattr(targets, "missing", lambda name: "pip install X")
    subject, shape = Subject("smollm2-135m", "bfloat16"), Shape("decode", 8, 128)
    (row,) = absent_chips.rows("v5e", [], subject, [shape], False)
    assert (row.op, row.rung, row.note) == ("decode", "counted", "pip install X")
    cost = subject.setup().decode(8, 128)
    assert (row.flops, row.bytes, row.seconds) == (cost.flops, cost.bytes, None)
    assert row.roofline_seconds > cost.bytes / 819e9 * 0.99
