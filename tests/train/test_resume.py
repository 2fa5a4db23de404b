"""A run that is killed goes on at its last checkpoint, and its loss curve is that of a run that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import distilling

ROOT = Path(__file__).parents[2]


def command(target: Path, out: Path, config: Path) -> list[str]:
    return [sys.executable, "-m", "pdx", "distill", str(target), str(out), "--config", str(config)]


def losses(out: Path) -> list[float]:
    lines = (out / "draft" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [line["loss"] for line in found]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(tmp_path):
    target, config = distilling.make(tmp_path)
    # Long enough to be killed inside: a step takes milliseconds.
    config.write_text(distilling.CONFIG.replace("steps = 30", "steps = 400"), encoding="utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(target, whole, config), cwd=ROOT, check=True, capture_output=True)

    first = subprocess.Popen(command(target, killed, config), cwd=ROOT, stderr=subprocess.DEVNULL)
    log = killed / "draft" / "log.jsonl"
    while not (log.is_file() and len(log.read_bytes().splitlines()) > 60):
        assert first.poll() is None
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    reached = len(log.read_bytes().splitlines())
    saved = max(int(p.name) for p in (killed / "draft" / "checkpoints").iterdir() if p.name.isdecimal())
    assert 0 < saved <= reached < 400
    data = {file.name: file.stat().st_mtime_ns for file in (killed / "data").iterdir()}

    subprocess.run(command(target, killed, config), cwd=ROOT, check=True, capture_output=True)
    assert len(losses(killed)) == 400
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-6)
    assert {file.name: file.stat().st_mtime_ns for file in (killed / "data").iterdir()} == data
    assert (killed / "draft" / "model" / "README.md").is_file()
