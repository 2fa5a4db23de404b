"""Policies, quantized parameters, and models that run on them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pallas_kernels import QuantArray, quantized_matmul
from pallas_kernels.quant_array import dequantize
from pdx import quant
from pdx.errors import ModelFileError, RequestError
from pdx.model import forward
from pdx.quant import Kind, Policy, parse_kind, quantize_params
from pdx.weights.checkpoint import save
from tests.support import models, tiny_model

pytestmark = pytest.mark.thin(6)


def floats(params):
    """The same parameters with each QuantArray as the matrix it stands for."""
    quantized = lambda x: isinstance(x, QuantArray)  # noqa: E731
    return jax.tree.map(lambda x: dequantize(x) if quantized(x) else x, params, is_leaf=quantized)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("policy", ["int8", "int8:g32", "int4", "int4:g32:affine", "int4:g32,lm_head=none,embed=int8"])
@pytest.mark.parametrize("cfg", [models.LLAMA, models.GEMMA], ids=["llama", "gemma"])
def test_quantized_values_give_what_their_matrices_give(cfg, policy):
    if "g32" in policy:
        policy += ",*.down_proj=int8"  # 48 columns
    params = quantize_params(models.params(cfg), policy)
    assert isinstance(params["layers"][0]["q_proj"], QuantArray)
    tokens = models.tokens(cfg, 2, 9)
    got, want = (models.whole(p, cfg, tokens).logits for p in (params, floats(params)))
    np.testing.assert_allclose(got, want, atol=models.TOLERANCE)


def test_w8a8_is_near():
    params, tokens = models.params(models.LLAMA), models.tokens(models.LLAMA, 1, 9)
    exact, near = (models.whole(p, models.LLAMA, tokens).logits for p in (params, quantize_params(params, "w8a8")))
    error = np.abs(np.asarray(near - exact)).max() / np.abs(np.asarray(exact)).max()
    assert 0 < error < 0.05


@pytest.mark.parametrize("policy", ["int8", "w8a8", "int4:g32,*.down_proj=int8", "none,lm_head=int8"])
def test_a_model_is_quantized_as_it_is_read(directory, policy):
    model, plain = pdx.load(directory, quantize=policy), pdx.load(directory)
    want = quantize_params(plain.params, policy)
    assert jax.tree.structure(model.params) == jax.tree.structure(want)
    for got, expected in zip(jax.tree.leaves(model.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), np.asarray(expected.astype(jnp.float32)))
    done = pdx.generate(model, ["Hello", "a longer one"], max_tokens=12, ignore_eos=True)
    assert [c.completion_tokens for c in done] == [12, 12]


@pytest.mark.slow
def test_sharded_equals_one_device(directory):
    one = pdx.generate(pdx.load(directory, quantize="int8"), "Hello", max_tokens=12, ignore_eos=True)[0]
    model = pdx.load(directory, quantize="int8", mesh="data=2,model=2")
    assert not model.params["layers"][0]["gate_proj"].values.is_fully_replicated
    assert pdx.generate(model, "Hello", max_tokens=12, ignore_eos=True)[0].token_ids == one.token_ids


@pytest.mark.parametrize(("mesh", "asked"), [(None, "auto"), ("data=2,model=2", "xla")])
def test_a_step_over_a_mesh_takes_xlas_products(directory, monkeypatch, mesh, asked):
    """Of the cache's devices, not of the process': one of many keeps its kernels."""
    seen = []

    def product(x, w, *, implementation, **settings):
        seen.append(implementation)
        return quantized_matmul(x, w, implementation="xla", **settings)

    monkeypatch.setattr(quant, "quantized_matmul", product)
    model = pdx.load(directory, quantize="int8", mesh=mesh)
    cache = pdx.init_cache(model.config, 2, 128, mesh=model.mesh)
    jax.make_jaxpr(lambda tokens, cache: forward(model.params, model.config, tokens, cache).logits)(
        jnp.zeros((2, 3), jnp.int32), cache
    )
    assert set(seen) == {asked}
    assert jax.device_count() > 1


def test_kinds_and_policies(tmp_path):
    assert parse_kind("none") is None
    assert parse_kind("w8a8") == Kind(8, None, True, "int8")
    assert parse_kind("int4:g64:affine") == Kind(4, 64, False)
    assert [Kind(4, 0).group_for(n) for n in (576, 640, 96, 48)] == [64, 128, 32, None]
    policy = Policy.parse("int4,layers.0.*=none,lm_head=w8a8")
    assert policy.kind("layers.0.q_proj") is None
    assert policy.kind("layers.1.q_proj") == Kind(4, 0)
    assert (policy.kind("embed"), policy.kind("lm_head")) == (Kind(8), Kind(8, activations="int8"))
    assert policy.kind("layers.1.attn_norm") is None
    file = tmp_path / "policy.toml"
    file.write_text('default = "int4"\n[layers]\n"layers.0.*" = "none"\nlm_head = "w8a8"\n')
    assert Policy.parse(str(file)) == policy
    assert not Policy.parse(None)
    assert not Policy.parse("none")


@pytest.mark.parametrize("text", ["none", "int8", "w8a8,layers.0.q_proj=none,lm_head=none", "none,embed=int8"])
def test_the_policy_of_parameters_is_how_they_are_stored(text):
    params = models.params(models.LLAMA)
    asked = Policy.parse(text)
    found = Policy.of(quantize_params(params, asked) if asked else params)
    names = ["embed", "lm_head", "layers.0.q_proj", "layers.1.down_proj", "layers.1.attn_norm"]
    assert [found.kind(n) for n in names] == [asked.kind(n) for n in names]


def test_layers_are_counted_from_the_end_too(directory):
    layers = pdx.load(directory, quantize="int8,layers.-1.*=none,*_norm=none").params["layers"]
    quantized = [isinstance(p["q_proj"], QuantArray) for p in layers]
    assert quantized == [True] * (len(layers) - 1) + [False]
    params = quantize_params(models.params(models.LLAMA), "none,layers.-2.up_proj=int8")
    assert [isinstance(p["up_proj"], QuantArray) for p in params["layers"]][-2:] == [True, False]


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("int8,layers.-9.*=none", "names no layer"),
        ("none,*_norm=int8", "names no layer"),
        ("int3", "is not one of none, stored, int8"),
        ("int8:g48", "is not one of"),
        ("int8:affine", "is not one of"),
        ("int8,lm_head", "is no exception such as"),
        ("int8,layers.7.*=none", "'layers.7.\\*' names no layer"),
        ("int4:g128", "down_proj: groups of 128 do not divide rows of 48"),
        ("missing.toml", "not a quantization policy"),
    ],
)
def test_what_makes_no_sense_is_refused(directory, policy, says):
    with pytest.raises(RequestError, match=says):
        pdx.load(directory, quantize=policy)


def test_twice_is_refused(directory):
    model = pdx.load(directory, quantize="int8")
    with pytest.raises(RequestError, match="is quantized already"):
        quantize_params(model.params, "int8")
    with pytest.raises(RequestError, match="is what a file holds"):
        quantize_params(pdx.load(directory).params, "stored")


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x.astype(jnp.float32)), np.asarray(y.astype(jnp.float32)))


@pytest.mark.parametrize("policy", ["int8", "int4,*.down_proj=int8", "int4:g32:affine,*.down_proj=w8a8,lm_head=none"])
def test_saved_is_loaded(directory, tmp_path, policy):
    model = pdx.load(directory, quantize=policy)
    same(pdx.load(save(model, tmp_path / "out")).params, model.params)
    again = pdx.load(tmp_path / "out", quantize="stored", mesh="data=2,model=2")
    same(again.params, model.params)
    assert not again.params["layers"][0]["gate_proj"].values.is_fully_replicated
    same(pdx.load(save(again, tmp_path / "twice")).params, model.params)
    with pytest.raises(RequestError, match="is quantized already: load the checkpoint without"):
        pdx.load(tmp_path / "out", quantize="int8")


def test_a_head_that_was_stored_apart_stays_apart(directory, tmp_path):
    model = pdx.load(directory, quantize="w8a8")
    head = model.params.get("lm_head", model.params["embed"])
    model.params = model.params | {"lm_head": replace(head, scales=head.scales * 2)}
    same(pdx.load(save(model, tmp_path / "out")).params, model.params)


@pytest.fixture
def saved(directory, tmp_path):
    return save(pdx.load(directory, quantize="int4:g32:affine,*.down_proj=int8"), tmp_path / "saved")


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("scales", "layers.1.q_proj is quantized and has no scales"),
        ("offsets", "layers.1.q_proj is quantized and has no offsets"),
        ("values", "layers.1.q_proj is quantized and has no values"),
    ],
)
def test_a_part_that_is_missing_is_named(saved, part, says):
    head = json.loads((saved / "pdx.json").read_text())
    del head["params"][f"layers.1.q_proj.{part}"]
    (saved / "pdx.json").write_text(json.dumps(head))
    with pytest.raises(ModelFileError, match=says):
        pdx.load(saved)


def test_parts_that_do_not_fit_are_named(saved):
    text = (saved / "pdx.json").read_text()

    def refuse(change, says):
        head = json.loads(text)
        change(head)
        (saved / "pdx.json").write_text(json.dumps(head))
        with pytest.raises(ModelFileError, match=says):
            pdx.load(saved)

    refuse(lambda h: h["quantized"]["layers.0.q_proj"].update(group=16), "scales of parameter layers.0.q_proj are")
    refuse(lambda h: h["quantized"]["layers.0.q_proj"].update(bits=8), "but its values are")
    refuse(lambda h: h["quantized"]["layers.0.q_proj"].update(bits=3), "but its values are")
    refuse(lambda h: h["quantized"]["layers.0.q_proj"].update(colour=1), "pdx.json")
    (saved / "pdx.json").write_text(text)
    next((saved / "params" / "layers.0.q_proj.scales").glob("0.0")).unlink()
    with pytest.raises(ModelFileError, match=r"the data of parameter layers\.0\.q_proj\.scales is missing"):
        pdx.load(saved)


def test_scales_that_are_not_finite_are_named(saved):
    file = saved / "params" / "layers.0.q_proj.scales" / "0.0"
    data = np.fromfile(file, np.float32)
    data[3] = np.nan
    data.tofile(file)
    with pytest.raises(ModelFileError, match="1 scales that are NaN or infinite"):
        pdx.load(saved)
