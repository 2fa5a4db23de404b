"""Every op's problems compiled by the chips' own compilers: `pytest -m aot`, the short list `-k smoke`.

One process a target, two at a time. PDX_AOT_REPORT=FILE keeps what was found, a JSON object a line.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from pallas_kernels.analysis import problems, targets

pytestmark = pytest.mark.aot
ROOT = Path(__file__).parents[2]


def _listed() -> list[tuple[str, str, bool]]:
    """Target, `op:case` and whether it belongs to the short list, of everything that is compiled."""
    found = []
    for name in targets.NAMES:
        platform = targets.Target.get(name).chip.platform
        for op in problems.ops(platform):
            listed = problems.problems(op, platform)
            # An op whose cases name none: its first real size and its first int8 one.
            first = [p for p in listed if p.smoke] or [listed[0], *[p for p in listed if p.call.kv_dtype == "int8"][:1]]
            found += [(name, f"{op}:{p.name}", p in first) for p in listed]
    return found


LISTED = _listed()
SMOKE = [(t, n) for t, n, smoke in LISTED if smoke]
REST = [(t, n) for t, n, smoke in LISTED if not smoke]


def compile_all(target: str, names: list[str]) -> dict[str, dict]:
    """What the compiler made of each problem; where it ended its process, the others run in a new one."""
    found: dict[str, dict] = {}
    environment = os.environ | targets.environment() | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    while left := [n for n in names if n not in found]:
        # Output goes to a pipe that communicate() empties; a problem is given five minutes on average.
        try:
            run = subprocess.run(
                [sys.executable, "-m", "tests.aot.kernel_child", target, *left],
                cwd=ROOT,
                text=True,
                env=environment,
                capture_output=True,
                timeout=300 * len(left),
            )
            code, out, err = run.returncode, run.stdout, run.stderr
        except subprocess.TimeoutExpired as late:
            code, out, err = "a timeout", (late.stdout or b"").decode(), (late.stderr or b"").decode()
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        found |= {line["name"]: line for line in lines if "name" in line}
        begun = next((line["begin"] for line in reversed(lines) if "begin" in line), left[0])
        if code != 0:
            found.setdefault(begun, {"error": f"the compiler's process ended with {code}: {err[-2000:]}"})
        elif not lines:
            found |= {n: {"error": err[-2000:]} for n in left}
    if report := os.environ.get("PDX_AOT_REPORT"):
        with Path(report).open("a", encoding="utf-8") as file:
            for name in names:
                line = {"target": target, "jax": jax.__version__, "name": name} | found[name]
                file.write(json.dumps(line) + "\n")
    return found


@pytest.fixture(scope="session")
def compiled(request):
    """A function: target, problem -> what was found. Starts all targets of the chosen tests at once, two running."""
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if item.path == Path(__file__) and hasattr(item, "callspec"):
            parameters = item.callspec.params
            wanted.setdefault(parameters["target"], []).append(parameters["name"])
    pool = ThreadPoolExecutor(int(os.environ.get("PDX_AOT_JOBS", "2")))
    running = {t: pool.submit(compile_all, t, names) for t, names in wanted.items() if targets.missing(t) is None}

    def find(target: str, name: str) -> dict:
        if why := targets.missing(target):
            pytest.skip(why)
        found = running[target].result()[name]
        assert "error" not in found, found["error"]
        if "unsupported" in found:
            pytest.skip(found["unsupported"])
        return found | {"op": name.split(":")[0]}

    yield find
    pool.shutdown(cancel_futures=True)


def check(found: dict, target: str) -> None:
    chip = targets.Target.get(target).chip
    assert found["kernels"] >= 1, "no Pallas kernel is in the program"
    assert not found["not_ieee"], "an f32 dot lost its precision"
    weights = found["op"] == "quantized_matmul"
    if found["cache"] >= (16 if weights else 512) << 20:
        assert not found["moved"], "\n".join(found["moved"])
    if found["cache"] >= 512 << 20 and not weights:
        # Queries and results, folded, are all there is: 1%. Chips with two cores keep two parts of the results in
        # f32, each with its log-sum-exp in whole registers: 8 times the queries' bytes. v4 keeps in HBM what others
        # have room for in VMEM.
        most = found["cache"] // 100
        if target not in ("v5e", "v6e"):
            most += 8 * found["queries"]
        assert found["temp"] <= most, f"{found['temp']} bytes of temporaries beside a cache of {found['cache']}"
    if chip.platform == "tpu":
        assert 0 < found["vmem"] <= chip.vmem_capacity_mib << 20
        return
    assert found["spills"] == 0
    assert found["shared"] <= chip.smem_bytes
    if found["dtype"] == "bfloat16":
        assert found["tensor_cores"], "bf16 does not reach the tensor cores"
    else:
        assert not any("tf32" in name for name in found["mma"]), found["mma"]


@pytest.mark.parametrize(("target", "name"), SMOKE)
def test_smoke(compiled, target, name):
    check(compiled(target, name), target)


@pytest.mark.parametrize(("target", "name"), REST)
def test_case(compiled, target, name):
    check(compiled(target, name), target)
