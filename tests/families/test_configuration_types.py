"""config.json with values of types that no published one has: a configuration or a sentence, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdx.errors import ModelFileError, PdxError, UnsupportedModelError
from pdx.families import config_from_hf

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "configs" / "families.json").read_text())
FIELDS = (
    "architectures",
    "model_type",
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "layer_types",
    "head_dim",
    "sliding_window",
    "max_window_layers",
    "use_sliding_window",
    "hidden_act",
    "hidden_activation",
    "text_config",
    "tie_word_embeddings",
    "num_key_value_heads",
    "max_position_embeddings",
    "query_pre_attn_scalar",
    "original_max_position_embeddings",
    "sliding_window_pattern",
    "quantization_config",
    "attention_bias",
    "num_nextn_predict_layers",
    "vocab_size",
    "partial_rotary_factor",
    "rms_norm_eps",
)
ODD = [
    "16",
    "",
    1.5,
    16.0,
    float("nan"),
    float("inf"),
    -1,
    0,
    10**400,
    True,
    False,
    [],
    [16],
    [[1]],
    {},
    {"a": 1},
    {"rope_type": 5},
    {"factor": "4"},
    {"type": "yarn", "factor": [4]},
    {"full_attention": 5},
    ["x"] * 50,
]


def refusal(config: dict) -> str:
    """The sentence that refuses a configuration; empty where it is taken."""
    try:
        config_from_hf(config)
    except PdxError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["llama3.1", "mistral-window", "qwen2-window", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_end_in_a_configuration_or_a_sentence(name, field):
    for value in ODD:
        assert len(refusal(GOLDEN[name]["config"] | {field: value})) < 500


def test_a_long_value_is_shown_short():
    config = GOLDEN["llama2"]["config"] | {"layer_scales": [0.5] * 1000, "note": "x" * 10_000}
    notes = []
    config_from_hf(config, notes=notes)
    assert "layer_scales = [0.5, 0.5" in notes[0]
    assert len(notes[0]) < 400
    with pytest.raises(UnsupportedModelError, match="quantization_config = ") as caught:
        config_from_hf(config | {"quantization_config": {"quant_method": "gptq", "skip": ["x"] * 1000}})
    assert len(str(caught.value)) < 400


def test_architectures_that_are_no_list():
    config = GOLDEN["llama2"]["config"]
    with pytest.raises(ModelFileError, match="architectures is 'LlamaForCausalLM'"):
        config_from_hf(config | {"architectures": "LlamaForCausalLM"})
