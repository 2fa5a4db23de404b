"""Calibrated quantization: nearer to the model than rounding to the nearest, exact where it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import pdx
from pallas_kernels import QuantArray
from pallas_kernels.quant_array import dequantize, quantize
from pdx.bench.quality import evaluate
from pdx.calibration import calibrate, layerwise, quantize_model, stdlib_texts
from pdx.calibration.rounding import gptq, grid, searched
from pdx.cli import app
from pdx.errors import RequestError
from pdx.quant import Kind, parse_kind
from tests.support import models, tiny_model

pytestmark = pytest.mark.thin(4)

KINDS = ["int8", "int4:g32", "int4:g32:affine", "int4:g64"]


@pytest.fixture(scope="module")
def problem():
    """A matrix, and activations of few directions and very different sizes."""
    keys = jax.random.split(jax.random.key(0), 4)
    w = jax.random.normal(keys[0], (48, 128)) / 8
    mix = jax.random.normal(keys[1], (24, 128)) * jnp.exp(jax.random.normal(keys[2], (128,)))
    return w, jax.random.normal(keys[3], (512, 24)) @ mix


def error(w, q, x):
    return float(jnp.square((dequantize(q, jnp.float32) - w) @ x.T).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_beats_searched_scales_and_those_beat_nearest(problem, kind):
    (w, x), kind = problem, parse_kind(kind)
    gram = x.T @ x / len(x)
    nearest = quantize(w, kind.bits, kind.group_for(128), kind.symmetric)
    better, best = searched(w, jnp.diag(gram), kind, "float32"), gptq(w, gram, kind, "float32")
    assert error(w, best, x) < 0.8 * error(w, better, x)
    # Scales are chosen for the mean square error of the columns alone: of int8 hardly any is to be gained.
    assert error(w, better, x) < (1.02 if kind.bits == 8 else 0.95) * error(w, nearest, x)
    for found in (better, best):
        assert (found.bits, found.groups, found.offsets is None) == (nearest.bits, nearest.groups, kind.symmetric)


def test_gptq_is_the_textbook_loop(problem):
    """Column by column in numpy, with the inverse of what is left computed anew for each (Frantar et al., eq. 2)."""
    w, x = problem
    w, kind = w[:5, :32], Kind(4, 32)
    gram = np.asarray(x.T @ x / len(x), np.float64)[:32, :32]
    found = np.asarray(gptq(w, jnp.asarray(gram, jnp.float32), kind, "float32").values.astype(jnp.int8))
    scale = np.asarray(grid(w, jnp.diag(jnp.asarray(gram, jnp.float32)), kind)[0], np.float64)
    left, want = np.asarray(w, np.float64).copy(), np.zeros_like(found)
    hessian = gram + np.eye(32) * 0.01 * np.diag(gram).mean()
    rest = list(np.argsort(-np.diag(gram), kind="stable"))
    while rest:
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        column = rest[0]
        steps = np.clip(np.round(left[:, column] / scale[:, 0]), -8, 7)
        want[:, column] = steps
        wrong = (left[:, column] - steps * scale[:, 0]) / inverse[0, 0]
        left[:, rest] -= wrong[:, None] * inverse[0]
        rest = rest[1:]
    assert (found == want).mean() > 0.98  # a tie may fall to the other side


def test_columns_that_are_never_used_do_no_harm(problem):
    w, x = problem
    x = x.at[:, 10:20].set(0)
    found = gptq(w, x.T @ x / len(x), Kind(4, 32), "float32")
    assert np.isfinite(np.asarray(found.scales)).all()
    nothing = gptq(w, jnp.zeros((128, 128)), Kind(8), "float32")
    np.testing.assert_allclose(dequantize(nothing), w, atol=0.02)


def shared_sizes(x, shared):
    size = jnp.abs(x).mean(0)
    return size if shared is None else jnp.broadcast_to(size.reshape(shared).max(1, keepdims=True), shared).reshape(-1)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [models.LLAMA, models.GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("kind", ["none", "int8"])
def test_scaling_alone_changes_nothing(cfg, kind, monkeypatch):
    """Columns multiplied and what they meet divided: in float the same function, in eight bits nearly."""
    params = pdx.init_params(cfg, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, 24), np.int32)
    policy = "int8" if kind == "int8" else "none,*.q_proj=int8,*.o_proj=int8,*.up_proj=int8,*.down_proj=int8"
    monkeypatch.setattr(layerwise, "EXPONENTS", (1.0,))
    if kind == "none":  # scales as for int8, nothing rounded
        monkeypatch.setattr(layerwise, "searched", lambda w, squares, kind, dtype: w)
        monkeypatch.setattr(layerwise, "rounded", lambda params, kinds: params)
        monkeypatch.setattr(layerwise, "_best_scale", lambda x, weights, shared: shared_sizes(x, shared))
    scaled = calibrate(params, cfg, policy + ",embed=none,lm_head=none", tokens, "awq")
    assert not np.allclose(scaled["layers"][0]["attn_norm"], params["layers"][0]["attn_norm"], rtol=1e-2)
    exact, got = (pdx.forward(p, cfg, tokens).logits for p in (params, scaled))
    limit = models.TOLERANCE if kind == "none" else 0.1 * float(jnp.abs(exact).max())
    np.testing.assert_allclose(got, exact, atol=limit)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("model"))


TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune. "


@pytest.mark.slow
def test_calibrated_models_are_nearer(directory):
    plain = pdx.load(directory)
    policy = "int4,*.down_proj=none,embed=none,lm_head=none"

    def kl(method):
        model = quantize_model(plain, policy, TEXT * 60, method, sequences=4)
        return evaluate(model, plain, TEXT[30:] * 5, length=128, stride=64, max_tokens=300).kl

    nearest = kl("rtn")
    assert kl("gptq") < 0.8 * nearest
    assert kl("awq") < 0.95 * nearest


@pytest.mark.slow
def test_a_head_in_int8_is_scaled_apart(directory, tmp_path):
    plain = pdx.load(directory)
    model = quantize_model(plain, "w8a8", TEXT * 60, "awq", sequences=2)
    assert isinstance(model.params["lm_head"], QuantArray)
    assert evaluate(model, plain, TEXT, length=64, stride=32, max_tokens=60).kl < 0.1


@pytest.mark.slow
def test_the_command(directory, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text(TEXT * 60)
    arguments = [
        "quantize",
        str(directory),
        str(out),
        "--quantize",
        "int4,*.down_proj=int8",
        "--calibration",
        str(text),
    ]
    done = CliRunner().invoke(app, [*arguments, "--sequences", "2"])
    assert done.exit_code == 0, done.output
    model = pdx.load(out)
    assert [model.params["layers"][0][n].bits for n in ("q_proj", "down_proj")] == [4, 8]
    assert pdx.generate(model, "Hello", max_tokens=4, ignore_eos=True)[0].completion_tokens == 4


def test_what_makes_no_sense_is_refused(directory):
    model = pdx.load(directory)
    with pytest.raises(RequestError, match="method 'magic' is not one of rtn, awq, gptq"):
        quantize_model(model, "int4", TEXT, "magic")
    with pytest.raises(RequestError, match="is too short: at least"):
        quantize_model(model, "int4", TEXT, "gptq")
    with pytest.raises(RequestError, match="names no layer"):
        quantize_model(model, "int4,nothing=int8", TEXT * 60, "gptq")


@pytest.mark.slow
def test_the_texts_are_long_and_apart():
    first, second = stdlib_texts.evaluation(), stdlib_texts.calibration()
    assert min(len(first), len(second)) > 100_000
    lines = {line for line in first.splitlines() if len(line) > 60}
    assert sum(line in lines for line in second.splitlines()) < 10
    assert stdlib_texts.calibration() == second
