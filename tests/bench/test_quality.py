"""Perplexity in sliding windows, and distances to the unquantized model."""

import json
import math

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import pdx
from pdx.bench.quality import evaluate, windows
from pdx.calibration import quantize_model, stdlib_texts
from pdx.cli import app
from pdx.errors import RequestError
from tests.support import tiny_model

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory):
    return pdx.load(directory)


@pytest.mark.parametrize(("tokens", "length", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 3), (50, 8, 7)])
def test_every_token_but_the_first_is_scored_once(tokens, length, stride):
    at, seen = 0, []
    for part, known in windows(range(tokens), length, stride):
        assert part[0] == at
        assert 1 <= known < len(part) <= length
        seen += part[known:]
        at += stride
    assert seen == list(range(1, tokens))


@pytest.mark.parametrize(("tokens", "length", "stride"), [(1, 8, 4), (2, 8, 4), (8, 8, 7), (50, 8, 3)])
def test_windows_that_open_with_a_token_score_all(tokens, length, stride):
    seen = []
    for part, known in windows(range(tokens), length, stride, [-1]):
        assert part[0] == -1
        assert 1 <= known < len(part) <= length
        seen += part[known:]
    assert seen == list(range(tokens))


def test_perplexity_is_that_of_plain_windows(model):
    ids = model.tokenizer.encode(TEXT, add_special=False)[:300]
    opening = model.tokenizer.opening
    losses = []
    for part, known in windows(ids, 160, 80, opening):
        logits = pdx.forward(model.params, model.config, np.array([part])).logits[0]
        chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:-1], np.array(part)[1:, None], 1)[:, 0]
        losses += (-chosen[known - 1 :]).tolist()
    found = evaluate(model, model, TEXT, length=160, stride=80, max_tokens=300)
    assert found.tokens == len(losses) == 299 + len(opening)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert (found.kl, found.top1_agreement) == (pytest.approx(0, abs=1e-7), 1.0)
    assert found.reference_perplexity == found.perplexity


@pytest.mark.parametrize(
    "settings", [{"quantize": "int8"}, {"quantize": "int4:g32,*.down_proj=int8"}, {"kv_dtype": "int8"}]
)
def test_distances_see_what_was_quantized(directory, model, settings):
    other = pdx.load(directory, quantize=settings["quantize"]) if "quantize" in settings else model
    found = evaluate(other, model, TEXT, kv_dtype=settings.get("kv_dtype"), length=128, stride=64, max_tokens=200)
    assert 1e-9 < found.kl < 0.1
    assert 0.5 < found.top1_agreement <= 1
    assert found.perplexity != found.reference_perplexity


def test_coarser_is_farther(directory, model):
    def kl(policy):
        other = pdx.load(directory, quantize=policy)
        return evaluate(other, model, TEXT, length=128, stride=64, max_tokens=200).kl

    assert kl("int8") < kl("int4,embed=int8,lm_head=int8") < 1


def test_bad_requests_are_refused(model):
    with pytest.raises(RequestError, match="nothing to score"):
        evaluate(model, model, "")
    with pytest.raises(RequestError, match="stride of 160 does not fit"):
        evaluate(model, model, TEXT, length=160, stride=160)
    with pytest.raises(RequestError, match="do not fit the context of 512"):
        evaluate(model, model, TEXT, length=1024)


def test_the_command(directory, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    arguments = [
        "eval",
        "ppl",
        str(directory),
        "--file",
        str(file),
        "--quantize",
        "w8a8",
        "--window",
        "64",
        "--stride",
        "32",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"perplexity", "kl", "top1_agreement", "tokens"} <= set(found)
    assert "top-1 agreement" in CliRunner().invoke(app, arguments).stdout


def test_a_quantized_checkpoint_is_held_against_its_original(directory, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    out = tmp_path / "out"
    run = CliRunner().invoke(app, ["quantize", str(directory), str(out), "--quantize", "int8", "--method", "rtn"])
    assert run.exit_code == 0, run.output
    arguments = [
        "eval",
        "ppl",
        str(out),
        "--reference",
        str(directory),
        "--file",
        str(file),
        "--window",
        "64",
        "--stride",
        "32",
        "--json",
    ]
    saved = json.loads(CliRunner().invoke(app, arguments).stdout.splitlines()[-1])
    arguments[2:5] = [str(directory), "--quantize", "int8"]
    assert json.loads(CliRunner().invoke(app, arguments).stdout.splitlines()[-1]) == saved
    assert saved["kl"] > 0


@pytest.fixture(scope="module")
def smollm2():
    return pdx.load("smollm2-135m-instruct")


def real(model, plain, **settings):
    return evaluate(model, plain, stdlib_texts.evaluation(), max_tokens=1024, **settings)


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_keeps_its_quality_in_int8(smollm2):
    """A cut-down version of the table in docs/quantization.md."""
    int8 = real(pdx.load(smollm2.path, quantize="int8"), smollm2)
    assert int8.perplexity == pytest.approx(int8.reference_perplexity, rel=0.01)
    assert int8.kl < 0.01
    assert int8.top1_agreement > 0.93
    kv = real(smollm2, smollm2, kv_dtype="int8")
    assert kv.perplexity == pytest.approx(kv.reference_perplexity, rel=0.003)
    assert 0 < kv.kl < 0.003
    # Blocks taken as they are stand for the same numbers.
    assert real(pdx.load(smollm2.path, quantize="stored"), smollm2).kl < 1e-6


@pytest.mark.slow
@pytest.mark.real
def test_gptq_closes_most_of_what_rounding_loses(smollm2):
    policy = "none,*.up_proj=int4:g64"  # of all matrices it takes minutes; docs/quantization.md has them
    nearest = real(pdx.load(smollm2.path, quantize=policy), smollm2)
    better = real(quantize_model(smollm2, policy, stdlib_texts.calibration(), "gptq", sequences=4), smollm2)
    assert better.kl < 0.5 * nearest.kl
    assert better.top1_agreement > nearest.top1_agreement
