"""`rope_scaling` and `rope_parameters` as people publish them: extras, spellings, the context they give."""

from __future__ import annotations

import math

import pytest

from pdx.config import RopeConfig
from pdx.errors import ModelFileError, UnsupportedModelError
from pdx.families import config_from_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8, "num_key_value_heads": 2}
GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "head_dim": 8, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN_FACTOR = 0.1 * math.log(4.0) + 1


def read(config=LLAMA, **changes):
    notes = []
    return config_from_hf(config | changes, notes=notes)[1], notes


def rope(scaling, config=LLAMA, **changes) -> RopeConfig:
    return read(config, rope_scaling=scaling, **changes)[0].rope


@pytest.mark.parametrize(
    "nothing",
    [
        None,
        {},
        {"type": "default"},
        {"rope_type": "default"},
        {"type": "default", "rope_type": "default"},
        {"rope_type": "default", "rope_theta": 10000.0},
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_no_scaling_however_it_is_written(key, nothing):
    cfg, notes = read(**{key: nothing})
    assert (cfg.rope, cfg.max_context, notes) == (RopeConfig(10_000.0), 256, [])


@pytest.mark.parametrize(
    "extra",
    [
        {"finetuned": True},
        {"finetuned": False},
        {"type": "yarn"},
        {"beta_fast": None},
        {"attn_factor": 1.0},
        {"attn_factor": 1},
        {"extrapolation_factor": 1.0},
        {"apply_yarn_scaling": True},
        {"attention_factor": None},
    ],
)
def test_extras_that_change_nothing(extra):
    cfg, notes = read(rope_scaling=YARN | extra)
    assert cfg == read(rope_scaling=YARN)[0]
    assert notes == []


@pytest.mark.parametrize(
    ("scaling", "extra"),
    [
        (LINEAR, {"attention_factor": 3.0}),
        (LINEAR, {"attn_factor": 0.5}),
        (LINEAR, {"beta_fast": 16}),
        (LLAMA3, {"mscale": 0.7}),
        (YARN, {"low_freq_factor": 2.0}),
        ({"rope_type": "default"}, {"factor": 8.0}),
        ({}, {"factor": 8.0}),
        ({"rope_type": "default"}, {"original_max_position_embeddings": 64}),
    ],
)
def test_numbers_of_another_rule_are_passed_over_and_said(scaling, extra):
    """transformers warns and computes the same."""
    (name,) = extra
    cfg, notes = read(rope_scaling=scaling | extra)
    assert cfg.rope == read(rope_scaling=scaling)[0].rope
    assert [n for n in notes if f"{name} = " in n and "ignored" in n] == notes != []


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        (YARN | {"mystery": 3}, "mystery = 3"),
        ({"rope_type": "default", "mystery": 3}, "mystery = 3"),
        (LINEAR | {"mrope_section": [1, 2, 1]}, r"mrope_section = \[1, 2, 1\]"),
        (YARN | {"extrapolation_factor": 0.5}, r"extrapolation_factor = 0\.5"),
        (YARN | {"apply_yarn_scaling": False}, "apply_yarn_scaling = False"),
        (LINEAR | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
        ({"type": "dynamic", "factor": 2.0}, "rope_type = 'dynamic'"),
        ({"type": "su", "short_factor": [1.0] * 500, "long_factor": [2.0] * 500}, "rope_type = 'su'"),
        ({"rope_type": ["yarn"]}, r"rope_type = \['yarn'\]"),
        ({"full_attention": LINEAR, "chunked_attention": LINEAR}, "chunked_attention = "),
    ],
)
def test_what_would_change_something_is_refused_by_name(scaling, said):
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        read(rope_scaling=scaling)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings", "beta_fast", "attn_factor"])
@pytest.mark.parametrize("value", ["4.0", [4.0], {}, True, math.nan, math.inf, -1])
def test_numbers_of_the_wrong_kind_are_named(key, value):
    with pytest.raises(ModelFileError, match=rf"rope_parameters\.{key} is .*, expected a positive"):
        read(rope_scaling=YARN | {key: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": "yarn"},
        {"rope_scaling": [YARN]},
        {"rope_parameters": {"full_attention": "linear"}},
        {"rope_theta": "10000"},
        {"rope_scaling": YARN, "rope_theta": 1.0},
        {"rope_scaling": YARN | {"rope_theta": 1}},
        {"rope_scaling": LINEAR | {"factor": 1e308}},
        {"rope_scaling": LINEAR | {"factor": 10**400}},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 10**400}},
        {"original_max_position_embeddings": "64"},
        {"rope_scaling": {"type": "yarn"}, "original_max_position_embeddings": [64]},
    ],
)
def test_other_shapes_and_numbers_end_in_a_sentence(changes):
    with pytest.raises(ModelFileError, match=r"config\.json: "):
        read(**changes)


def test_attn_factor_multiplies():
    """The published value undoes YaRN's own factor; transformers gives the same when told the product."""
    published = YARN | {"attn_factor": 0.8782488562869419}
    cfg, notes = read(QWEN3, rope_scaling=published)
    assert cfg.rope.attention_factor == pytest.approx(1.0)
    assert [n for n in notes if "attn_factor" in n and "transformers ignores it" in n] == notes != []
    assert rope(YARN).attention_factor == pytest.approx(YARN_FACTOR)
    assert rope(YARN | {"attn_factor": 2}).attention_factor == pytest.approx(2 * YARN_FACTOR)
    cfg, notes = read(rope_scaling=YARN | {"attn_factor": 2, "attention_factor": 1.5})
    assert cfg.rope.attention_factor == 1.5  # the whole, by its definition
    assert [n for n in notes if "attn_factor = 2 is ignored" in n] == notes != []


def test_where_the_original_context_stands():
    """Beside `rope_scaling` it wins over the one inside, as in transformers."""
    inside, none = rope(YARN), rope({"type": "yarn", "factor": 4.0})
    assert rope({"type": "yarn", "factor": 4.0}, original_max_position_embeddings=64) == inside
    assert rope(YARN | {"original_max_position_embeddings": 32}, original_max_position_embeddings=64) == inside
    assert rope(YARN | {"original_max_position_embeddings": 256}) == none
    assert rope(LLAMA3 | {"original_max_position_embeddings": 16}, original_max_position_embeddings=32) == rope(LLAMA3)
    assert rope(YARN | {"original_max_position_embeddings": 8}) != inside


def test_the_type_under_both_names():
    assert rope(YARN | {"type": "linear"}) == rope(YARN)


@pytest.mark.parametrize(
    ("scaling", "config", "context"),
    [
        (LINEAR, LLAMA, 1024),
        (LINEAR | {"factor": 1.0}, LLAMA, 256),
        (LINEAR | {"factor": 2.5}, QWEN3, 640),
        (LINEAR | {"original_max_position_embeddings": 64}, LLAMA, 256),
        (LINEAR, GEMMA3, 256),
        (YARN, LLAMA, 256),
        (YARN | {"factor": 8.0}, LLAMA, 512),
        ({"type": "yarn", "factor": 4.0}, LLAMA, 1024),
        (LLAMA3, LLAMA, 256),
    ],
)
def test_the_context_that_a_scaling_gives(scaling, config, context):
    """`max_position_embeddings` counts YaRN's and Llama 3's scaling where these name the original context, and
    Gemma 3's; linear multiplies it."""
    assert read(config, rope_scaling=scaling)[0].max_context == context


def test_entries_per_layer_type():
    both = {
        "full_attention": LINEAR | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    cfg, _ = read(GEMMA3, rope_parameters=both)
    assert (cfg.rope, cfg.rope_window) == (RopeConfig(1e6, (4.0,) * 4), RopeConfig(1e4))
    old, _ = read(GEMMA3, rope_scaling=LINEAR, rope_theta=1e6, rope_local_base_freq=1e4)
    assert cfg == old
    cfg, _ = read(GEMMA3, rope_parameters=both | {"sliding_attention": None})
    assert (cfg.rope, cfg.rope_window) == (RopeConfig(1e6, (4.0,) * 4), RopeConfig(1e4))
    with pytest.raises(UnsupportedModelError, match=r"rope_parameters\.full_attention\.mystery = 1"):
        read(GEMMA3, rope_parameters=both | {"full_attention": LINEAR | {"mystery": 1}})
