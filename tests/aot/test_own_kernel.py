"""The kernel of one's own that docs/compare.md shows, compiled for a TPU and a GPU that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.analysis import static, targets
from tests.support import own_kernel

pytestmark = pytest.mark.aot
ROOT = Path(__file__).parents[2]
STEP = """
import json, sys
from my_kernel import decode
from pallas_kernels.analysis import hlo
from pdx import aot
from pdx.cost import Setup
from tests.aot.step_child import model

cfg = model("llama3-8b", 2, vocab_size=2048, d_model=512, num_heads=8, num_kv_heads=2, d_ff=1024)
shape = {"batch": 4, "capacity": 2048}
made = aot.compile_step("decode_step", cfg, sys.argv[1], kernels={"decode_attention": decode}, **shape)
said = {
    "calls": len(hlo.pallas_calls(made.text)),
    "alias": made.memory["alias"],
    "cache": Setup(cfg).cache_bytes(4, 2048),
    "moved": [str(i) for i in hlo.moved(made.text, 1 << 20)],
    "spills": sum(k.spill_bytes for k in made.kernels),
}
print(json.dumps(said))
"""


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_smoke_the_documents_kernel_compiles(target, monkeypatch, tmp_path):
    if why := targets.missing(target):
        pytest.skip(why)
    own_kernel.module(monkeypatch, tmp_path)
    (row,) = static.table("decode_attention", target, "Llama 3 8B, bf16", exact=True, own="my_kernel:decode")
    assert "error" not in row, row
    assert row["pallas_calls"] == 1
    assert row["moved"] == []
    assert 1 <= static.ratios(row)["moved"] < 1.1
    assert not any(kernel["spill_bytes"] for kernel in row["kernels"])


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_smoke_a_step_with_it_in_the_ops_place_compiles(target, monkeypatch, tmp_path):
    if why := targets.missing(target):
        pytest.skip(why)
    own_kernel.module(monkeypatch, tmp_path)
    environment = os.environ | targets.environment() | {"XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", STEP, target], capture_output=True, text=True, env=environment, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["calls"] == 2, "one call a layer"
    assert found["alias"] >= found["cache"]
    assert found["spills"] == 0
    if target == "v5e":  # a GPU's compiler lays weights out anew for its own products
        assert found["moved"] == []
