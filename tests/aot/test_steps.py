"""Whole steps compiled by the chips' own compilers: kernels in place, the cache aliased, nothing large copied."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pallas_kernels import targets

pytestmark = pytest.mark.aot
ROOT = Path(__file__).parents[2]
FULL = {
    "v5e": ("smollm2", "llama3-8b", "gemma3", "prefill", "verify", "float32"),
    "v6e": ("gemma3", "prefill"),
    "v5e:2x4": ("mesh", "mesh prefill"),
}
SMOKE = {name: ("smoke", "smoke prefill") for name in targets.NAMES}


@cache
def compiled(target: str, names: tuple[str, ...]) -> dict[str, dict]:
    """What the compiler made of the steps: one process for all of a target's, since a compiler can end it."""
    if why := targets.missing(target):
        pytest.skip(why)
    run = subprocess.run(
        [sys.executable, "-m", "tests.aot.step_child", target, *names], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | targets.environment() | {"XLA_FLAGS": ""}, timeout=1500,
    )  # fmt: skip
    found = {x["name"]: x for x in map(json.loads, filter(None, run.stdout.splitlines()))}
    for name in names:
        found.setdefault(name, {"error": f"the process ended with {run.returncode}: {run.stderr[-2000:]}"})
    return found


def of(target: str, name: str, names: tuple[str, ...]) -> dict:
    found = compiled(target, names)[name]
    assert "error" not in found, found["error"]
    return found


def check(found: dict, target: str) -> None:
    assert found["kernels"] >= found["layers"], "a layer's attention is not a kernel"
    assert found["memory"]["alias"] >= found["cache"], "the cache is not aliased"
    assert not found["spills"]
    if targets.Target.get(target).chip.platform == "tpu":
        # A GPU's compiler lays weights out anew for its own matrix products; a TPU's has no reason to.
        assert not found["moved"], found["moved"]
        assert found["memory"]["argument"] <= found["declared"] * 1.01
    assert not found["not_ieee"]


@pytest.mark.parametrize(("target", "name"), [(t, n) for t, names in FULL.items() for n in names])
def test_a_step_moves_nothing_but_what_it_needs(target, name):
    found = of(target, name, FULL[target])
    check(found, target)
    arguments, temporary = (found["memory"][part] / found["declared"] for part in ("argument", "temp"))
    print(f"{target} {name}: {found['seconds']:.0f} s, of weights + cache arguments {arguments:.4f} and temporary "
          f"{temporary:.4f}, {found['kernels']} kernels, VMEM {found['vmem_bytes'] / 2**20:.1f} MiB")  # fmt: skip
    if "prefill" not in name:
        assert found["memory"]["temp"] < 0.02 * found["declared"]
    if "mesh" in name:
        largest = max((size for _, size in found["collectives"]), default=0)
        assert 0 < largest < found["cache"] / found["layers"] / 2, f"a cache is gathered: {found['collectives']}"


@pytest.mark.parametrize("name", ["smoke", "smoke prefill"])
@pytest.mark.parametrize("target", SMOKE)
def test_smoke_every_target_compiles_both_phases(target, name):
    found = of(target, name, SMOKE[target])
    assert found["kernels"] >= found["layers"]
    assert found["memory"]["alias"] >= found["cache"]
    assert not found["spills"]
