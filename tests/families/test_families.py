"""Configurations and names against what transformers makes of them, and refusals of what pdx does not have.

`tests/golden/configs/make.py` made the golden values.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from pdx.config import RopeConfig
from pdx.errors import ModelFileError, UnsupportedModelError
from pdx.families import config_from_gguf, config_from_hf
from pdx.families.common import halves_from_pairs
from pdx.model import param_specs
from pdx.sharding import is_spec

CONFIGS = Path(__file__).parents[1] / "golden" / "configs"
GOLDEN = json.loads((CONFIGS / "families.json").read_text())
LLAMA = GOLDEN["llama2"]["config"]


def without(config: dict, *keys: str) -> dict:
    return {k: v for k, v in config.items() if k not in keys}


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    plain = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    return plain / np.asarray(rope.divisors or 1.0)


@pytest.mark.parametrize("name", GOLDEN)
def test_configuration_is_what_transformers_makes_of_it(name):
    golden, notes = GOLDEN[name], []
    family, cfg = config_from_hf(golden["config"], notes=notes)
    assert notes == []
    assert (cfg.head_dim, cfg.tie_embeddings) == (golden["head_dim"], golden["tied"])
    assert cfg.embed_scale == pytest.approx(golden["embed_scale"])
    assert cfg.norm_eps == golden["norm_eps"]
    assert cfg.windows == tuple(layer["window"] for layer in golden["layers"])
    for i, layer in enumerate(golden["layers"]):
        rope = cfg.layer_rope(i)
        np.testing.assert_allclose(inverse_frequencies(rope, cfg.head_dim), layer["inv_freq"], rtol=2e-6)
        assert rope.attention_factor == pytest.approx(layer["attention_factor"])
        assert cfg.attn_scale == pytest.approx(layer["scale"])
    assert cfg.family == family.name


@pytest.mark.parametrize("name", GOLDEN)
def test_names_and_shapes_are_those_of_transformers(name):
    golden = GOLDEN[name]
    family, cfg = config_from_hf(golden["config"])
    found = {}
    for path, spec in jax.tree_util.tree_flatten_with_path(param_specs(cfg), is_leaf=is_spec)[0]:
        keys = [getattr(k, "key", getattr(k, "idx", None)) for k in path]
        leaf, layer = (keys[2], keys[1]) if keys[0] == "layers" else (keys[0], None)
        source = family.hf_names.source(leaf, layer, cfg)
        found[source.name] = [source.stored_rows or spec.shape[0], *spec.shape[1:]]
        assert source.offset == (1.0 if "gemma" in name and "norm" in source.name else 0.0)
    assert found == golden["parameters"]


# As published on the hub, by older versions of transformers.
PUBLISHED = json.loads((CONFIGS / "published.json").read_text())


def test_published_configurations():
    got = {name: (*config_from_hf(config, notes=(notes := [])), notes) for name, config in PUBLISHED.items()}
    assert all(notes == [] for *_, notes in got.values())
    cfg = {name: c for name, (_, c, _) in got.items()}

    llama = cfg["llama-3.1-8b"]
    assert (llama.num_kv_heads, llama.head_dim, llama.norm_eps, llama.max_context) == (8, 128, 1e-5, 131072)
    assert llama.rope.theta == 500000
    assert llama.rope.divisors[0] == 1
    assert llama.rope.divisors[-1] == 8
    assert not llama.tie_embeddings

    assert set(cfg["mistral-7b-v0.1"].windows) == {4096}
    assert cfg["qwen2.5-0.5b"].qkv_bias
    assert not cfg["qwen2.5-0.5b"].o_bias
    assert set(cfg["qwen2.5-0.5b"].windows) == {None}
    assert cfg["qwen2.5-0.5b"].tie_embeddings
    assert cfg["qwen3-0.6b"].qk_norm
    assert cfg["qwen3-0.6b"].head_dim == 128
    assert not cfg["qwen3-0.6b"].qkv_bias

    gemma2 = cfg["gemma-2-2b"]
    assert gemma2.windows[:3] == (4096, None, 4096)
    assert gemma2.tie_embeddings
    assert (gemma2.attn_softcap, gemma2.logit_softcap, gemma2.attn_scale) == (50, 30, 1 / 16)
    assert gemma2.post_norms
    assert not gemma2.qk_norm
    assert gemma2.activation == "gelu_tanh"

    gemma3 = cfg["gemma-3-4b-it"]  # most of it from the defaults of its configuration class
    assert (gemma3.vocab_size, gemma3.num_heads, gemma3.num_kv_heads, gemma3.head_dim) == (262208, 8, 4, 256)
    assert gemma3.windows[4:7] == (1024, None, 1024)
    assert gemma3.tie_embeddings
    assert gemma3.qk_norm
    assert gemma3.rope.theta == 1e6
    assert set(gemma3.rope.divisors) == {8.0}
    assert gemma3.rope_window == RopeConfig(10_000.0)
    assert (gemma3.attn_softcap, gemma3.logit_softcap, gemma3.embed_scale) == (None, None, 2560**0.5)


def test_old_and_new_spelling_of_rope_agree():
    """`rope_theta`, `rope_scaling` and `rope_local_base_freq` against `rope_parameters`."""
    for name in ("llama3.1", "llama-linear", "qwen2-yarn", "smollm2"):
        new = GOLDEN[name]["config"]
        scaling = without(new["rope_parameters"], "rope_theta")
        old = without(new, "rope_parameters") | {"rope_theta": new["rope_parameters"]["rope_theta"]}
        for spelled in (scaling, without(scaling, "rope_type") | {"type": scaling["rope_type"]}):
            assert config_from_hf(old | {"rope_scaling": spelled})[1] == config_from_hf(new)[1]
    new = GOLDEN["gemma3-linear"]["config"]
    old = without(new, "rope_parameters", "layer_types", "_sliding_window_pattern") | {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert config_from_hf(old)[1] == config_from_hf(new)[1]


def test_layer_types_win_over_the_pattern():
    types = ["full_attention"] * 3 + ["sliding_attention"]
    config = GOLDEN["gemma3-linear"]["config"] | {"layer_types": types}
    assert config_from_hf(config)[1].windows == (None, None, None, 4096)
    with pytest.raises(ModelFileError, match=r"layer_types has 3 entries, expected .* 4"):
        config_from_hf(config | {"layer_types": types[:3]})
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        config_from_hf(config | {"layer_types": ["chunked_attention"] * 4})


REFUSED = [
    ({"architectures": ["MixtralForCausalLM"]}, "architectures = 'MixtralForCausalLM'.*LlamaForCausalLM"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
    ({"num_local_experts": 8}, "num_local_experts = 8"),
    ({"kv_lora_rank": 512}, "kv_lora_rank = 512"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
    ({"sliding_window": 4096}, "sliding_window = 4096"),
    ({"rope_interleaved": True}, "rope_interleaved = True"),
    ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "rope_type = 'longrope'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1, 2]}}, "mrope_section"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_what_pdx_does_not_have_is_refused_by_name(change, said):
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        config_from_hf(LLAMA | change, "some/config.json")
    assert "some/config.json" in str(caught.value)


def test_gemma3_attention_softcap_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"attn_logit_softcapping = 50\.0"):
        config_from_hf(GOLDEN["gemma3"]["config"] | {"attn_logit_softcapping": 50.0})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a positive number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_parameters\.factor is missing"),
    ],
)
def test_fields_of_the_wrong_kind_are_named(change, said):
    with pytest.raises(ModelFileError, match=said):
        config_from_hf(LLAMA | change)


def test_unknown_fields_are_told_and_a_missing_architecture_falls_back_on_the_type():
    notes = []
    family, _ = config_from_hf(without(LLAMA, "architectures") | {"some_new_switch": 3}, notes=notes)
    assert family.name == "llama"
    assert len(notes) == 1
    assert "some_new_switch = 3" in notes[0]
    with pytest.raises(ModelFileError, match="neither architectures nor model_type"):
        config_from_hf(without(LLAMA, "architectures", "model_type"))


class Tensors:
    """A file of nothing but names and shapes, and a `rope_freqs.weight`."""

    def __init__(self, shapes: dict, freqs=None):
        self.shapes = shapes | ({"rope_freqs.weight": np.shape(freqs)} if freqs is not None else {})
        self.freqs = freqs

    def names(self):
        return list(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def path_of(self, name):
        return "x.gguf"

    def read(self, name, dtype, rows=None):
        return np.asarray(self.freqs, dtype)


def metadata(arch: str, **fields) -> dict:
    head = {
        "block_count": 4,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
    }
    changes = {k.replace("__", "."): v for k, v in fields.items()}
    return {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in (head | changes).items()}}


EMBED = {"token_embd.weight": (128, 64)}
HEAD = EMBED | {"output.weight": (128, 64)}


def gguf(arch: str, tensors=EMBED, freqs=None, **fields):
    return config_from_gguf(metadata(arch, **fields), Tensors(tensors, freqs), "x.gguf")[1]


def test_gguf_fields_map_to_the_same_configuration_as_config_json():
    def agree(name: str, ours, **ignored):
        theirs = config_from_hf(GOLDEN[name]["config"] | {"max_position_embeddings": 512, **ignored})[1]
        assert ours == theirs

    agree("llama2", gguf("llama", HEAD, vocab_size=128, rope__dimension_count=16))
    biases = {f"blk.0.attn_{x}.bias": (64,) for x in ("q", "k", "v")}
    agree("qwen2", gguf("qwen2", EMBED | biases))
    agree(
        "qwen3",
        gguf("qwen3", HEAD | {"blk.0.attn_q_norm.weight": (32,)}, attention__key_length=32, attention__value_length=32),
    )
    agree(
        "gemma2",
        gguf(
            "gemma2",
            attention__key_length=32,
            attention__sliding_window=16,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        query_pre_attn_scalar=32,
    )
    agree(
        "gemma3",
        gguf(
            "gemma3",
            EMBED | {"blk.0.attn_q_norm.weight": (32,)},
            block_count=7,
            attention__key_length=32,
            attention__sliding_window=16,
            rope__freq_base=1e6,
        ),
        query_pre_attn_scalar=32,
    )
    agree(
        "gemma3-linear",
        gguf(
            "gemma3",
            EMBED | {"blk.0.attn_q_norm.weight": (32,)},
            attention__key_length=32,
            attention__sliding_window=4096,
            rope__freq_base=1e6,
            rope__freq_base_swa=1e4,
            rope__scaling__type="linear",
            rope__scaling__factor=8.0,
            attention__sliding_window_pattern=[True] * 4,
        ),
        query_pre_attn_scalar=32,
    )


def test_gguf_windows_and_scales_that_llama_cpp_derives():
    assert gguf("llama", HEAD, attention__sliding_window=8).windows == (8,) * 4
    wide = gguf("gemma2", block_count=46, attention__key_length=32, embedding_length=64)
    assert wide.attn_scale == 16**-0.5  # the 27B model: width per head
    assert wide.windows[:2] == (4096, None)


def test_gguf_rope_scalings():
    freqs = [1.0, 1.0, 2.5, 8.0, 8.0, 8.0, 8.0, 8.0]
    assert gguf("llama", HEAD, freqs=freqs).rope == RopeConfig(10000.0, tuple(freqs))
    assert gguf("llama", HEAD, rope__scaling__factor=2.0).rope.divisors == (2.0,) * 8  # no type: linear
    assert gguf("llama", HEAD, rope__scaling__type="none", rope__scaling__factor=2.0).rope.divisors is None
    theirs = config_from_hf(GOLDEN["qwen2-yarn"]["config"])[1].rope
    ours = gguf(
        "qwen2",
        rope__freq_base=1e6,
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=2048,
    ).rope
    assert ours == theirs
    with pytest.raises(UnsupportedModelError, match=r"llama.rope.scaling.type = 'longrope'"):
        gguf("llama", HEAD, rope__scaling__type="longrope")
    with pytest.raises(ModelFileError, match=r"rope_freqs.weight has shape \[3\], expected \[8\]"):
        gguf("llama", HEAD, freqs=[1.0, 2.0, 3.0])
    with pytest.raises(ModelFileError, match=r"rope_freqs.weight has values that are not positive"):
        gguf("llama", HEAD, freqs=[0.0] * 8)


@pytest.mark.parametrize(
    ("error", "fields", "said"),
    [
        (UnsupportedModelError, {"expert_count": 8}, "llama.expert_count = 8"),
        (UnsupportedModelError, {"rope__dimension_count": 8}, "llama.rope.dimension_count = 8"),
        (UnsupportedModelError, {"attention__value_length": 8}, "llama.attention.value_length = 8"),
        (UnsupportedModelError, {"attention__head_count_kv": [1, 2, 2, 2]}, "head_count_kv = .*every layer"),
        (UnsupportedModelError, {"some__new_switch": 1}, "llama.some.new_switch = 1"),
        (ModelFileError, {"block_count": None}, "llama.block_count is missing"),
    ],
)
def test_gguf_fields_that_do_not_fit_are_named(error, fields, said):
    with pytest.raises(error, match=said):
        gguf("llama", HEAD, **fields)
    assert gguf("llama", HEAD, attention__head_count_kv=[2, 2, 2, 2]).num_kv_heads == 2


def test_unknown_gguf_architecture_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"general.architecture = 'mamba'.*gemma3, llama"):
        config_from_gguf({"general.architecture": "mamba"}, Tensors(EMBED), "x.gguf")
    with pytest.raises(ModelFileError, match=r"general\.architecture is missing"):
        config_from_gguf({}, Tensors(EMBED), "x.gguf")


def test_unpermuting_is_the_inverse_of_the_published_permutation():
    """llama.cpp's converter: reshape to (heads, 2, half), swap, flatten."""
    heads, head_dim = 3, 8
    x = np.arange(heads * head_dim * 5).reshape(-1, 5)
    permuted = x.reshape(heads, 2, head_dim // 2, 5).swapaxes(1, 2).reshape(x.shape)
    assert not np.array_equal(permuted, x)
    np.testing.assert_array_equal(permuted[halves_from_pairs(heads, head_dim)], x)
