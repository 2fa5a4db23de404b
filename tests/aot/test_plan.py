"""`pdx plan --compile`: what is planned beside what the chip's own compiler says."""

import json

import pytest
from typer.testing import CliRunner

from pallas_kernels.analysis import targets
from pdx.cli import app

pytestmark = pytest.mark.aot
SHAPE = """family = "llama"
d_model = 576
num_layers = 1
num_heads = 9
num_kv_heads = 3
head_dim = 64
d_ff = 1536
max_context = 8192
tie_embeddings = true
"""


def planned(path, vocabulary: int, target: str) -> dict:
    if why := targets.missing(target):
        pytest.skip(why)
    path.write_text(f"{SHAPE}vocab_size = {vocabulary}\n")
    done = CliRunner().invoke(
        app,
        [
            "plan",
            str(path),
            "--chip",
            target,
            "--batch",
            "4",
            "--prompt",
            "128",
            "--context",
            "1024",
            "--compile",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def agree(found: dict) -> None:
    assert found["fits"]
    for step in found["compiled"]:
        assert step["fits"], step["error"]
        assert step["memory"]["argument"] == pytest.approx(step["planned"], rel=0.01)
        assert step["memory"]["alias"] > 0
        counted = f"{step['accessed'] / step['planned_accessed']:.2f} times" if step["accessed"] else "nothing of"
        print(f"{found['chip']} {step['name']}: XLA counts {counted} the bytes planned, {step['seconds']:.0f} s")


def test_both_answers_agree_for_a_tpu(tmp_path):
    agree(planned(tmp_path / "one.toml", 49152, "v5e"))


def test_both_answers_agree_for_a_gpu(tmp_path):
    agree(planned(tmp_path / "one.toml", 49152, "a100"))


def test_what_does_not_fit_is_refused_by_both(tmp_path):
    found = planned(tmp_path / "wide.toml", 16_000_000, "v5e")
    assert not found["fits"]
    for step in found["compiled"]:
        assert step["fits"] is False
        assert step["wanted"] > found["hbm_capacity_bytes"] > 0.9 * step["planned"]
