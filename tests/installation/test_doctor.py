"""`pdx doctor` where something is wrong: it answers, names it, and ends with exit code 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.installation.test_versions import install

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "ok",
    "problems",
    "remedy",
    "pdx",
    "python",
    "platform",
    "versions",
    "environment",
    "host_memory",
    "caches",
    "devices",
    "kernels",
    "self_test",
    "seconds",
}


def doctor(path: str = "", *options: str, **env: str) -> subprocess.CompletedProcess:
    """Run it with `path` before everything that is installed."""
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    clean |= {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)])), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pdx", "doctor", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=clean | env,
        check=False,
    )


def broken_jax(folder: Path, code: str) -> str:
    (folder / "jax").mkdir()
    (folder / "jax" / "__init__.py").write_text(code, encoding="utf-8")
    return str(folder)


BROKEN = {
    "jax cannot be imported": (
        "raise ImportError('no libstdc++ of that version')",
        "devices: ImportError: no libstdc++ of that version",
    ),
    "jax is killed": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "devices: the process was ended by signal 11 (SIGSEGV)",
    ),
    "jax ends without a word": ("import os\nos._exit(3)", "devices: exit code 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_jax_that_does_not_start_is_described(tmp_path, case):
    code, says = BROKEN[case]
    done = doctor(broken_jax(tmp_path, code), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert set(found) == SECTIONS
    assert says in found["problems"]
    assert (found["ok"], found["devices"], found["kernels"], found["self_test"]) == (False, None, None, None)
    assert found["versions"]["fit"]


def test_a_backend_that_does_not_start_is_described():
    done = doctor("", JAX_PLATFORMS="no_such_backend")
    assert done.returncode == 1
    assert "problem    devices: RuntimeError: " in done.stdout
    assert "no_such_backend" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_releases_that_do_not_fit_are_named_and_the_device_left_alone(tmp_path):
    install(tmp_path, {"libtpu": "0.0.1"})
    (tmp_path / "libtpu.py").touch()
    done = doctor(broken_jax(tmp_path, "raise SystemExit('imported')"), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert not found["versions"]["fit"]
    assert found["versions"]["jax_and_parts"]["libtpu"] == "0.0.1"
    assert found["problems"][0].startswith("libtpu 0.0.1 does not belong to jax")
    assert found["problems"][-1].startswith("device, kernels and self-test were not tried")
    assert found["remedy"].startswith('pip install "jax[')
    assert "imported" not in done.stdout + done.stderr
    # Who goes on all the same gets an answer from the device too.
    again = json.loads(doctor(str(tmp_path), "--json", PDX_IGNORE_VERSIONS="1").stdout)
    assert "devices: imported" in again["problems"]


def test_a_device_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    from pdx.installation.doctor import examine

    monkeypatch.setenv("PYTHONPATH", broken_jax(tmp_path, "import time\ntime.sleep(100)"))
    found = examine(timeout_s=1)
    assert "devices: no answer within 1 s; does another process hold the device?" in found["problems"]


def test_what_pdx_needs_and_does_not_find_is_a_problem(tmp_path):
    install(tmp_path, {"flax": "0.11.2", "pdx_inference": "0.1.0"})
    metadata = tmp_path / "pdx_inference-0.1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "Requires-Dist: flax>=0.12\nRequires-Dist: no-such-package\n")
    found = json.loads(doctor(broken_jax(tmp_path, "raise ImportError('x')"), "--json").stdout)
    assert "flax 0.11.2 is installed, and pdx-inference needs flax>=0.12" in found["problems"]
    assert "no-such-package is not installed, and pdx-inference needs it" in found["problems"]


def test_folders_and_their_sizes(tmp_path):
    (tmp_path / "home" / "models" / "m").mkdir(parents=True)
    (tmp_path / "home" / "models" / "m" / "x").write_bytes(bytes(1234))
    env = {"PDX_HOME": str(tmp_path / "home"), "PDX_COMPILATION_CACHE": "off", "JAX_COMPILATION_CACHE_DIR": ""}
    found = json.loads(doctor(broken_jax(tmp_path, "raise ImportError('x')"), "--json", **env).stdout)
    caches = {c["what"]: (c["folder"], c["bytes"]) for c in found["caches"]}
    assert caches["models"] == (str(tmp_path / "home" / "models"), 1234)
    assert caches["compiled programs"] == (None, 0)


def test_the_self_test_can_fail():
    from pdx.bench.self_test import TOLERANCE, compare

    logits = np.random.default_rng(0).normal(size=(5, 2, 512)).astype(np.float32)
    assert compare(logits, logits + TOLERANCE / 2)["passed"]
    other = logits.copy()
    other[-1, 1, 7] += 0.1
    for wrong in (other, logits * 0, np.where(logits > 2, np.nan, logits), logits[:, ::-1]):
        assert compare(logits, wrong)["passed"] is False
        assert compare(logits, wrong)["reason"]


def test_a_slow_self_test_still_fits_80_columns():
    from pdx.installation.doctor import _device_rows

    path = {"prefill_s": 1.23456, "decode_step_s": 0.12345, "with_compilation_s": 123.45, "interpreted": True}
    test = {"xla": path | {"interpreted": False}, "pallas": path, "passed": False, "reason": ""}
    test |= {"relative_difference": 1.0, "relative_tolerance": 1e-3}
    rows = _device_rows({"devices": None, "kernels": None, "self_test": test})
    assert rows[1] == ("self-test", "pallas, interpreted: prefill 1235, decode 123 ms, first run 123 s")
    assert all(len(f"{name:11}{value}") <= 80 for name, value in rows)


@pytest.mark.slow
def test_all_is_well_here():
    done = doctor("", "--json", JAX_PLATFORMS="cpu")
    found = json.loads(done.stdout)
    assert done.returncode == 0, found["problems"]
    assert found["ok"]
    assert found["problems"] == []
    assert found["devices"]["backend"] == "cpu"
    assert {k["op"] for k in found["kernels"]} == {
        "flash_attention",
        "decode_attention",
        "paged_attention",
        "write_pages",
        "quantized_matmul",
    }
    assert all(k["reason"] for k in found["kernels"])
    assert found["self_test"]["passed"]
    assert found["self_test"]["pallas"]["interpreted"]
