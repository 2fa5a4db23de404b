"""Plans: what fits, what it costs, and what is said about it."""

import json

import pytest
from typer.testing import CliRunner

from pdx import cost, known, plan
from pdx.cli import app
from pdx.cost import Setup
from pdx.errors import ModelFileError, ModelNotFoundError, RequestError
from pdx.weights.opening import open_model
from pdx.weights.resolve import resolve

# Parameters as their model cards give them, in billions; Gemma's from 4B on are those of the text model.
PUBLISHED = {
    "llama-3-8b": 8.03, "llama-3-70b": 70.6, "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "mistral-7b": 7.24,
    "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-14b": 14.8, "qwen3-32b": 32.8,
    "smollm2-135m": 0.135, "gemma-3-270m": 0.268, "gemma-3-1b": 1.0, "gemma-3-4b": 3.88, "gemma-3-12b": 11.8,
    "gemma-3-27b": 27.0,
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_every_shape_has_the_parameters_that_are_published():
    assert set(known.names()) == set(PUBLISHED)
    for name, billions in PUBLISHED.items():
        cfg = known.config(name)
        count = sum(m.size for m in cost.matrices(cfg) if not (m.name == "lm_head" and cfg.tie_embeddings))
        assert count / 1e9 == pytest.approx(billions, rel=0.015), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), [("smollm2-135m", "smollm2-135m-instruct"), ("gemma-3-270m",) * 2])
def test_a_shape_is_that_of_the_model(name, model):
    shape, real = Setup(known.config(name)), Setup(open_model(resolve(model)).config)
    assert shape.weights == real.weights
    assert shape.decode(3, 1500).bytes_by_part == real.decode(3, 1500).bytes_by_part
    assert shape.prefill(2, 700) == real.prefill(2, 700)


def test_the_json_has_both_phases():
    done = run("llama-3-8b", "--chip", "v5e-1", "--quantize", "int8", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["hbm_capacity_bytes"] == 16 << 30
    assert found["hbm_bytes"] == pytest.approx(8.04e9 + 2048 * 131072, rel=0.001)
    assert set(found["prefill"]) == set(found["decode"])
    assert {"flops", "bytes", "intensity", "bound", "seconds"} <= set(found["decode"])
    assert (found["prefill"]["bound"], found["decode"]["bound"]) == ("compute", "memory")
    assert found["decode"]["seconds"] == pytest.approx(found["decode"]["bytes"] / 819e9, rel=0.01)
    assert found["prefill"]["intensity"] > 100 > 10 > found["decode"]["intensity"]


def test_what_does_not_fit_is_told_what_would():
    found = plan.make("llama-3-8b", known.config("llama-3-8b"), "v5e", batch=8)
    assert not found.fits
    first = plan.advice(found)[0]
    assert "does not fit" in first
    assert "--quantize int8" in first
    assert first.endswith("2 chips.")
    assert plan.make("llama-3-8b", found.setup.cfg, "v5e-2", batch=8).fits


def test_advice_follows_the_numbers():
    def said(**settings):
        return " ".join(plan.advice(plan.make("llama-3-8b", known.config("llama-3-8b"), "h100", **settings)))

    assert "A larger batch" in said(batch=1)
    assert "A larger batch" not in said(batch=200, quantize="int8", kv_dtype="int8")
    assert "--quantize" not in said(quantize="int8")
    assert "holds up the other rows" in said(batch=8, prompt=8192, context=8192)
    assert "loses at every acceptance" in said(batch=4096, context=16, prompt=16)
    assert "The TPOT asked for, 1.0 ms, is below the floor" in said(slo_tpot=1e-3)


def test_the_table_is_on_one_screen():
    done = run("gemma-3-270m", "--chip", "v6e", "--batch", "8", "--slo-tpot", "5")
    assert done.exit_code == 0, done.output
    for words in ("prefill (TTFT)", "decode (TPOT)", "critical batch", "largest batch within", "left"):
        assert words in " ".join(done.stdout.split())
    assert len(done.stdout.splitlines()) < 40


def test_bad_requests_are_refused(tmp_path):
    cfg = known.config("smollm2-135m")
    for settings, says in (({"on": "v9"}, "it has v4, v5e"), ({"on": "v5e", "batch": 0}, "must be at least 1"),
                           ({"on": "v5e", "context": 10**6}, "has a context of 8192"),
                           ({"on": "v5e", "quantize": "int4:g128"}, "do not divide rows of 576"),
                           ({"on": "v5e", "quantize": "stored"}, "is what a file holds"),
                           ({"on": "v5e", "quantize": "int8,nothing=none"}, "names no layer")):  # fmt: skip
        with pytest.raises(RequestError, match=says):
            plan.make("smollm2-135m", cfg, **settings)
    with pytest.raises(ModelNotFoundError, match="did you mean llama-3-8b"):
        known.config("llama-3-9b")
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("d_model = 3\nwindow = 3\n")
    with pytest.raises(ModelFileError, match="not the shape of a model"):
        known.config(wrong)
