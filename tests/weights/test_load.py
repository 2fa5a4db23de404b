"""Loading end to end: the same parameters from every format, placed as declared, and every broken file named."""

from __future__ import annotations

import json
import re
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx.errors import ContextLengthError, ModelFileError, UnsupportedModelError
from pdx.model import param_specs
from pdx.sharding import is_spec, make_mesh
from pdx.weights.arrays import aligned_empty, nonfinite
from pdx.weights.load import Model, default_dtype, load
from tests.support import tiny_model, weight_files


@pytest.fixture
def directory(tmp_path):
    return tiny_model.make(tmp_path / "tiny")


def same(a, b) -> bool:
    """Equal, bit for bit, leaf by leaf."""
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def test_a_hugging_face_directory(directory):
    model, content = load(directory), weight_files.tensors(directory)
    assert (model.name, model.path, model.dtype, model.mesh) == ("tiny", directory, jnp.float32, None)
    assert model.notes == []
    np.testing.assert_array_equal(model.params["embed"], content["model.embed_tokens.weight"])
    down = content["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(model.params["layers"][1]["down_proj"], down)
    specs = param_specs(model.config)
    assert jax.tree.structure(model.params) == jax.tree.structure(specs, is_leaf=is_spec)
    assert model.tokenizer.decode(model.tokenizer.encode("a tiny model")) == "a tiny model"
    assert model.tokenizer is model.tokenizer


def test_gguf_and_shards_give_the_same_parameters(directory):
    whole, content = load(directory), weight_files.tensors(directory)
    from_gguf = load(weight_files.write_gguf(directory.parent / "tiny.gguf", content))
    assert same(from_gguf.params, whole.params)
    assert from_gguf.config == whole.config
    weight_files.shard(directory)
    assert same(load(directory).params, whole.params)
    # The comparison can fail: the rows of queries do come in another order in the GGUF file.
    q = content["model.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(weight_files.permute(q, tiny_model.HEADS), q)


def test_quantized_gguf_is_dequantized_after_its_rows_are_put_in_order(directory):
    content = weight_files.tensors(directory)
    kinds = {n: gguf.GGMLQuantizationType.Q8_0 for n in content if n.endswith("q_proj.weight")}
    model = load(weight_files.write_gguf(directory.parent / "q.gguf", content, quantized=kinds))
    for i, layer in enumerate(model.params["layers"]):
        x = content[f"model.layers.{i}.self_attn.q_proj.weight"]
        q8 = gguf.GGMLQuantizationType.Q8_0
        expected = gguf.quants.dequantize(gguf.quants.quantize(x, q8), q8)
        np.testing.assert_array_equal(layer["q_proj"], expected)


def test_an_output_head_of_its_own(directory):
    head = np.random.default_rng(5).standard_normal(weight_files.tensors(directory)["model.embed_tokens.weight"].shape)
    head = head.astype(np.float32)
    weight_files.rewrite(directory, lambda t: t.update({"lm_head.weight": head}))
    untied = load(directory)  # as transformers does
    assert re.search(r"ties lm_head\.weight to model\.embed_tokens\.weight.* differ", " ".join(untied.notes))
    weight_files.reconfigure(directory, tie_word_embeddings=False)
    np.testing.assert_array_equal(load(directory).params["lm_head"], head)
    assert load(directory).notes == []
    assert same(load(directory).params, untied.params)
    content = weight_files.tensors(directory)
    from_gguf = load(weight_files.write_gguf(directory.parent / "head.gguf", content))
    assert not from_gguf.config.tie_embeddings
    assert same(from_gguf.params, load(directory).params)


def test_a_repeated_tied_head_and_old_buffers_are_let_through(directory):
    plain = load(directory)
    weight_files.rewrite(
        directory,
        lambda t: t.update(
            {
                "lm_head.weight": t["model.embed_tokens.weight"].copy(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            }
        ),
    )
    assert same(load(directory).params, plain.params)


def test_gemma_norms_get_their_one_and_the_text_model_is_taken_out_of_a_multimodal_one(directory):
    """The names as two versions of transformers nest them."""
    text = json.loads((directory / "config.json").read_text())
    del text["hidden_act"], text["architectures"], text["rope_theta"]
    text |= {"model_type": "gemma3_text", "head_dim": 8}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 8},
        "image_token_index": 5,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng, plain = np.random.default_rng(0), weight_files.tensors(directory)
    for i in range(tiny_model.LAYERS):
        for name, size in (
            ("pre_feedforward_layernorm", 32),
            ("post_feedforward_layernorm", 32),
            ("self_attn.q_norm", 8),
            ("self_attn.k_norm", 8),
        ):
            plain[f"model.layers.{i}.{name}.weight"] = rng.standard_normal(size).astype(np.float32)

    def nest(prefix: str):
        def change(tensors):
            tensors.clear()
            tensors.update({prefix + n.removeprefix("model."): x for n, x in plain.items()})
            tensors["vision_tower.embeddings.weight"] = np.ones((2, 2), np.float32)
            tensors["multi_modal_projector.weight"] = np.ones((2, 2), np.float32)

        return change

    for prefix in ("language_model.model.", "model.language_model.", "model."):
        weight_files.rewrite(directory, nest(prefix))
        params = load(directory).params
        for ours, theirs in (
            ("mlp_norm", "pre_feedforward_layernorm"),
            ("attn_post_norm", "post_attention_layernorm"),
            ("q_norm", "self_attn.q_norm"),
        ):
            expected = plain[f"model.layers.1.{theirs}.weight"] + 1
            np.testing.assert_array_equal(params["layers"][1][ours], expected)
        np.testing.assert_array_equal(params["final_norm"], plain["model.norm.weight"] + 1)
        np.testing.assert_array_equal(params["layers"][0]["q_proj"], plain["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("spelling", ["bf16", jnp.bfloat16, "bfloat16"])
def test_bf16_keeps_norms_in_f32(directory, spelling):
    whole, model = load(directory), load(directory, dtype=spelling)
    for x, spec in zip(
        jax.tree.leaves(model.params),
        jax.tree.leaves(param_specs(model.config, jnp.bfloat16), is_leaf=is_spec),
        strict=True,
    ):
        assert x.dtype == spec.dtype
    assert model.params["layers"][0]["attn_norm"].dtype == jnp.float32
    assert bool((model.params["embed"] == whole.params["embed"].astype(jnp.bfloat16)).all())


def test_which_dtype_is_automatic():
    class Device:
        def __init__(self, platform, capability=None):
            self.platform, self.compute_capability = platform, capability

    chosen = [default_dtype(d) for d in (Device("cpu"), Device("tpu"), Device("gpu", "7.5"), Device("gpu", "8.0"))]
    assert chosen == [jnp.float32, jnp.bfloat16, jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("dtype", ["f64", "int8", jnp.int8, "float16"])
def test_other_dtypes_are_refused(directory, dtype):
    with pytest.raises(ValueError, match="is not one of auto, f32, bf16"):
        load(directory, dtype=dtype)


@pytest.mark.parametrize("mesh", ["model=2", "data=2,model=4", "model=3", "data=1"])
def test_parameters_lie_where_the_specs_say(directory, mesh):
    model, plain = load(directory, mesh=mesh), load(directory)
    specs = param_specs(model.config)
    for x, spec in zip(jax.tree.leaves(model.params), jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        assert x.sharding == spec.sharding(model.mesh)
    assert same(jax.tree.map(np.asarray, model.params), jax.tree.map(np.asarray, plain.params))
    shards = {s.data.shape for s in model.params["layers"][0]["gate_proj"].addressable_shards}
    ways = model.mesh.shape["model"]
    assert shards == {(tiny_model.FF // ways, tiny_model.WIDTH)}
    said = [n for n in model.notes if "replicated" in n]
    assert any("kv_heads (2) does not divide over model=" in n for n in said) == (ways in (3, 4))


def test_without_a_mesh_parameters_are_on_the_default_device(directory):
    other = jax.devices()[3]
    assert load(directory).params["embed"].devices() == {jax.devices()[0]}
    with jax.default_device(other):
        assert load(directory).params["embed"].devices() == {other}
    later = make_mesh("model=2", jax.devices()[4:])
    assert load(directory, mesh=later).params["embed"].devices() == set(jax.devices()[4:6])


def test_a_shorter_context(directory):
    assert load(directory, max_context=100).config.max_context == 100
    for wrong in (0, tiny_model.CONTEXT + 1):
        with pytest.raises(ContextLengthError, match=f"this model's context is 1 to {tiny_model.CONTEXT}"):
            load(directory, max_context=wrong)


def test_progress_is_told(directory):
    seen = []
    load(directory, progress=lambda label, done, total: seen.append((label, done, total)))
    label, done, total = seen[-1]
    assert (label, done) == ("loading", total)
    assert [d for _, d, _ in seen] == sorted(d for _, d, _ in seen)


def test_a_model_without_a_tokenizer_says_so(directory):
    model = load(directory)
    bare = Model(model.params, model.config, "bare", directory, model.dtype)
    with pytest.raises(ModelFileError, match="bare has no tokenizer"):
        _ = bare.tokenizer


Q = "model.layers.1.self_attn.q_proj.weight"


def broken(tensors, name=Q):
    x = tensors[name]
    x[3, 5] = np.nan
    x[4, 0] = np.inf


DAMAGE = [
    (lambda t: t.pop(Q), "tensor {q} is missing, the configuration asks for it"),
    (lambda t: [t.pop(n) for n in list(t) if ".1." in n], "and 8 more is missing"),
    (lambda t: t.update({Q: np.ones((16, 32), np.float32)}), r"tensor {q} has shape \[16, 32\], expected \[32, 32\]"),
    (
        lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": np.ones(32, np.float32)}),
        "the configuration does not ask for tensor",
    ),
    (broken, r"tensor {q} has 2 values that are NaN or infinite, the first of them at {index}; expected finite"),
]


@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=["missing", "missing layer", "mis-shaped", "extra", "nan"])
def test_broken_weights_are_named(directory, kind, damage, said):
    names = {"q": Q.replace(".", r"\."), "index": r"\[3, 5\]"}
    if kind == "hf":
        weight_files.rewrite(directory, damage)
        path, target = directory, directory / "model.safetensors"
    else:
        content = weight_files.tensors(directory)
        damage(content)
        path = target = weight_files.write_gguf(directory.parent / "broken.gguf", content)
        names = {"q": r"blk\.1\.attn_q\.weight", "index": r"\[3, 5\]"}
    for key, value in names.items():
        said = said.replace(f"{{{key}}}", value)
    with pytest.raises(ModelFileError, match=said) as caught:
        load(path)
    assert str(target) in str(caught.value)


def test_nan_scales_of_quantized_blocks_are_found(directory):
    content = weight_files.tensors(directory)
    kinds = {Q.replace("q_proj", "o_proj"): gguf.GGMLQuantizationType.Q8_0}
    path = weight_files.write_gguf(directory.parent / "scale.gguf", content, quantized=kinds)
    from pdx.weights.gguf_file import GgufFile

    start = GgufFile(path)._tensors["blk.1.attn_output.weight"].start
    data = bytearray(path.read_bytes())
    data[start + 34 : start + 36] = b"\x00\x7e"  # the f16 scale of the second block
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"blk\.1\.attn_output\.weight has 32 values that are NaN .* \[1, 0\]"):
        load(path)


def test_a_broken_configuration_is_named(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"config\.json: not readable as JSON"):
        load(directory)
    (directory / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelFileError, match=r"config\.json: not readable as JSON"):
        load(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(ModelFileError, match=r"config\.json: expected a JSON object"):
        load(directory)
    (directory / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match=r"config\.json: architectures = 'MambaForCausalLM'"):
        load(directory)


ABSURD = [
    ({"num_hidden_layers": 2_000_000_000}, r"config\.json: field num_hidden_layers is 2000000000, .* the 20 tensors"),
    ({"num_hidden_layers": 2_000_000_000, "architectures": ["MistralForCausalLM"]}, "num_hidden_layers is 2000000000"),
    ({"head_dim": 4_000_000_000, "rope_scaling": {"type": "linear", "factor": 2.0}}, "head_dim is 4000000000"),
    ({"vocab_size": 10**12 + 39}, r"embed_tokens\.weight has shape .*, expected \[1000000000039, 32\]"),
]


@pytest.mark.parametrize(("changes", "said"), ABSURD, ids=["layers", "windows", "head", "vocabulary"])
def test_absurd_sizes_are_refused_before_anything_is_made_of_them(directory, changes, said):
    weight_files.reconfigure(directory, **changes)
    with pytest.raises(ModelFileError, match=said):
        load(directory, quantize="int8")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"llama__block_count": 0x64000002}, r"broken\.gguf: field llama\.block_count is 1677721602, .* 20 tensors"),
        (
            {"llama__attention__head_count": 1 << 31, "llama__attention__key_length": 8},
            r"tensor blk\.0\.attn_q\.weight has shape \[32, 32\], expected \[17179869184, 32\]",
        ),
    ],
    ids=["layers", "heads"],
)
def test_absurd_sizes_of_gguf_are_refused_before_anything_is_made_of_them(directory, fields, said):
    path = weight_files.write_gguf(directory.parent / "broken.gguf", weight_files.tensors(directory), **fields)
    with pytest.raises(ModelFileError, match=said):
        load(path)


def test_a_directory_with_only_pickles_is_refused(directory):
    shutil.move(directory / "model.safetensors", directory / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="unpickling runs code"):
        load(directory)


def test_nonfinite_values_are_counted_and_found():
    x = np.ones((4, 5), np.float32)
    assert nonfinite(x) is None
    assert nonfinite(np.full(100, 3e38, np.float32)) is None  # a sum that overflows is no proof
    x[1, 2], x[3, 4] = -np.inf, np.inf
    assert nonfinite(x) == (2, 7)
    assert nonfinite(x.astype(jnp.bfloat16)) == (2, 7)


@pytest.mark.parametrize("shape", [(), (3,), (5, 7)])
def test_aligned_arrays(shape):
    x = aligned_empty(shape, np.float32)
    assert x.shape == shape
    assert x.ctypes.data % 64 == 0
