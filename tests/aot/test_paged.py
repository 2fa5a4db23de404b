"""Pages are written and read where they lie: pools of 640 MB through the chips' own compilers."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pallas_kernels.analysis import targets

pytestmark = pytest.mark.aot
NAMES = (
    "bf16",
    "three heads of 64",
    "f32",
    "int8",
    "int8, three heads of 64",
    "copied bfloat16",
    "copied int8",
    "written int8",
    "written int8, many tokens",
)


@cache
def compiled(target: str) -> dict[str, dict]:
    """What the compiler made of the steps: one process for all of a target's, since a compiler can end it."""
    if why := targets.missing(target):
        pytest.skip(why)
    run = subprocess.run(
        [sys.executable, "-m", "tests.aot.paged_child", target, *NAMES],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=os.environ | targets.environment() | {"XLA_FLAGS": ""},
        timeout=1500,
    )
    found = {x["name"]: x for x in map(json.loads, filter(None, run.stdout.splitlines()))}
    for name in NAMES:
        found.setdefault(name, {"error": f"the process ended with {run.returncode}: {run.stderr[-2000:]}"})
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", targets.NAMES)
def test_pages_are_written_and_read_where_they_lie(target, name):
    found = compiled(target)[name]
    assert "error" not in found, found["error"]
    temporary = found["memory"]["temp"] / found["pools"]
    print(
        f"{target} {name}: {found['seconds']:.0f} s, temporary {temporary:.4f} of the pools, VMEM "
        f"{found['vmem_bytes'] / 2**20:.1f} MiB, {found['moved']}"
    )
    assert found["aliases"] >= found["arrays"]
    assert found["memory"]["alias"] >= found["pools"]
    assert not found["moved"]
    assert not found["spills"]
    if target in ("v5e", "v6e"):
        # Elsewhere the compiler keeps activations in HBM that it keeps in VMEM here.
        assert found["memory"]["temp"] < 0.01 * found["pools"] + 2 * found["sorted"]
