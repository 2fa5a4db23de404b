"""Static figures: a CostEstimate is held to the count of what moves, and the table says what it is."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from pallas_kernels.analysis import problems, static, targets, traffic
from pallas_kernels.analysis.targets import Target

CHIPS = {"tpu": "v5e", "gpu": "a100"}
LARGE = [
    (op, platform, p.name)
    for platform in CHIPS
    for op in problems.ops(platform)
    for p in problems.problems(op, platform, large_only=True)
    if not p.unsupported
]


def counted(op, platform, name, full):
    problem = next(p for p in problems.problems(op, platform, large_only=True) if p.name == name)
    differ = any(not np.array_equal(problem.scalars[x], problem.full[x]) for x in problem.full)
    return problem, count(op, platform, name, full and differ)


@cache
def count(op, platform, name, full):
    problem = next(p for p in problems.problems(op, platform, large_only=True) if p.name == name)
    with Target.get(CHIPS[platform]).tracing():
        return traffic.count(problem.fn(), *problem.arguments(full), platform=platform)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "platform", "name"), LARGE)
def test_cost_estimates_equal_what_moves(op, platform, name):
    _, found = counted(op, platform, name, full=True)
    assert all(call.declared is not None for call in found.calls)
    assert found.declared_bytes == pytest.approx(found.bytes, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "platform", "name"), [x for x in LARGE if x[0] == "decode_attention"])
def test_decode_moves_what_the_rows_hold(op, platform, name):
    problem, found = counted(op, platform, name, full=False)
    # A KV head count whose lanes are not whole is stored rounded up: 3 heads of 64 in 256 lanes.
    stored = problem.cache_bytes / (problem.cache_bytes if platform == "gpu" else _unpadded(problem))
    assert found.bytes <= 1.05 * stored * problem.bytes_needed


def _unpadded(problem):
    width = problem.call.kv_heads * (problem.call.head_dim + problem.call.value_dim)
    lanes = problem.arrays["k"].shape[2] + problem.arrays["v"].shape[2]
    return problem.cache_bytes * width / lanes


@pytest.mark.parametrize("op", problems.ops())
def test_every_problem_has_a_name_of_its_own(op):
    names = [p.name for p in problems.problems(op, "xla")]
    assert len(set(names)) == len(names)


def test_int8_by_int8_is_held_against_the_peak_of_int8():
    cases = problems.problems("quantized_matmul", "tpu", "prompt", large_only=True)
    wide, narrow = (
        static.facts(
            next(p for p in cases if p.name == f"llama gate, {kind}, prompt"), Target.get("v5e"), compile=False
        )
        for kind in ("W8A16", "W8A8")
    )
    assert narrow["floor_cycles"] == pytest.approx(wide["floor_cycles"] / 2, rel=0.01)


def test_a_row_is_traced_and_counted_without_a_compiler():
    problem = problems.problems("decode_attention", "tpu", "draft of four, ragged")[0]
    row = static.facts(problem, Target.get("v5e"), compile=False)
    assert row["bytes"] > row["bytes_needed"] > 0
    assert row["bytes_declared"] == pytest.approx(row["bytes_full"], rel=0.05)
    assert row["dynamic"]
    assert row["ieee"]
    json.dumps(row)


def test_needs_of_a_window_and_a_ring():
    (problem,) = [p for p in problems.problems("decode_attention", "xla") if p.name == "window of one"]
    assert problem.flops_needed == 2 * (3 + 3) * 4 * (8 + 8)  # two rows of three queries, one key each, four heads
    assert problem.bytes_needed == (3 + 3) * 2 * 16 * 4 + (3 + 3) * 4 * 16 * 4


def test_lines_and_configs():
    problem = problems.problems("decode_attention", "tpu", "Llama 3 8B, bf16")[0]
    config = static._parse_config(problem, "block_k=512,splits=2")
    assert (config.block_k, config.splits) == (512, 2)
    assert static._parse_config(problem, static._config_text(config)) == config
    assert static._parse_config(problem, None) is None
    row = static.facts(problems.problems("decode_attention", "tpu", "bf16")[-1], Target.get("v5e"), compile=False)
    told = static.line(row | {"kernels": [], "vmem_bytes": 2**20, "cycles": 1000, "dynamic": False})
    assert "1.00 MiB" in told
    assert "1,000" in told
    over = row["bytes"] / row["bytes_needed"], row["bytes"] / row["bytes_stored"]
    assert told.split(row["case"])[1].split()[1:3] == [f"{x:.3f}" for x in over]
    gpu = {"shared_bytes": 2048, "registers": 99, "spill_bytes": 0}
    assert "2.0 KiB, 99 regs, 0 B spilled" in static.line(row | {"kernels": [gpu]})
    turns = [{"instructions": 40, "per_byte": None}, {"instructions": 704, "per_byte": 5.176}]
    assert static.line(row | {"kernels": [gpu | {"loops": turns}]}).endswith("704 instructions a turn, 5.18 a byte")
    assert static.line(row | {"kernels": [gpu | {"loops": turns[:1]}]}).endswith("40 instructions a turn")
    assert "too much VMEM" in static.line({"case": "x", "error": "too much VMEM\nmore"})


def test_a_summary_tells_the_worst_and_the_median_case(monkeypatch, capsys):
    names = ("window of one", "draft of four, ragged")
    chosen = [p for p in problems.problems("decode_attention", "tpu") if p.name in names]
    monkeypatch.setattr(problems, "problems", lambda *a, **k: chosen)
    static.main(["decode_attention", "--summary", "--target", "v5e"])
    line = capsys.readouterr().out.splitlines()[-1].split(" | ")
    rows = [static.facts(p, Target.get("v5e"), compile=False) for p in chosen]
    worst, median = map(float, line[3].split(", "))
    assert line[2] == str(len(names))
    assert worst == pytest.approx(max(r["bytes"] / r["bytes_needed"] for r in rows), abs=1e-3)
    assert median < worst
    assert float(line[4].split(", ")[0]) < worst  # heads of 8 lie in 128 lanes


def test_a_missing_compiler_is_told(monkeypatch, capsys):
    monkeypatch.setattr(targets, "missing", lambda name: "needs libtpu: pip install x")
    with pytest.raises(SystemExit, match="needs libtpu"):
        static.main(["decode_attention", "--target", "v5e"])


WRONG = (
    ("nosuch --target v5e", "no op 'nosuch'; there are flash_attention"),
    ("nosuch --summary", "no op 'nosuch'; there are flash_attention"),
    ("decode_attention --summary --target zzz", "no chip 'zzz' .* it has v4, v5e"),
    ("decode_attention --target zzz", "no chip 'zzz' .* it has v4, v5e"),
    ("decode_attention --target v5e:9x9", "v5e has no slice 9x9.* such as v5e:2x4"),
    ("decode_attention --target v5e --case zzz", "has 'zzz' in its name; there are 'Llama 3 8B, bf16'.*--small"),
    ("decode_attention --target v5e --small --case zzz", "has 'zzz' in its name; .*'draft of four, ragged'"),
)


@pytest.mark.parametrize("compiler", [None, "needs libtpu"], ids=["compiler", "no compiler"])
@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=[a for a, _ in WRONG])
def test_what_is_not_there_is_told_with_what_there_is(monkeypatch, capsys, arguments, says, compiler):
    monkeypatch.setattr(targets, "missing", lambda name: compiler)
    with pytest.raises(SystemExit, match=says) as found:
        static.main(arguments.split())
    assert "\n" not in found.value.code
    assert not capsys.readouterr().out


def test_a_table_of_nothing_but_errors_fails(monkeypatch, capsys):
    monkeypatch.setattr(static, "table", lambda *a, **k: [{"case": "one", "error": "JaxRuntimeError: no VMEM\nmore"}])
    with pytest.raises(SystemExit, match=r"no case of decode_attention has figures for v5e: JaxRuntimeError: no VMEM$"):
        static.main(["decode_attention", "--target", "v5e"])
    assert "JaxRuntimeError: no VMEM" in capsys.readouterr().out


def test_a_case_that_no_kernel_takes_is_refused(monkeypatch):
    monkeypatch.setattr(problems.Problem, "unsupported", "heads too wide")
    with pytest.raises(ValueError, match="takes none of these cases on v5e: heads too wide"):
        static.table("decode_attention", "v5e")
    problem = problems.problems("decode_attention", "tpu", large_only=True)[0]
    assert static.row(problem, "v5e") == {"error": "heads too wide"}


@pytest.mark.aot
def test_the_command_prints_a_table():
    if why := targets.missing("v5e"):
        pytest.skip(why)
    command = [
        sys.executable,
        "-m",
        "pallas_kernels.analysis.static",
        "decode_attention",
        "--target",
        "v5e",
        "--case",
        "draft",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing here was measured" in done.stdout
    assert "a draft of eight, bf16" in done.stdout
    assert "MiB" in done.stdout
