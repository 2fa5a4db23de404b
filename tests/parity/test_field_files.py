"""What transformers makes of files as people publish them: RoPE scalings with extras, tied heads, old buffers."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pdx
from pdx.families import config_from_hf
from tests.families.test_families import inverse_frequencies
from tests.golden import phases
from tests.golden.phases import TOLERANCE, difference
from tests.parity import tiny

pytestmark = pytest.mark.parity

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "finetuned": {"rope_scaling": YARN | {"finetuned": True}},
    "type alone": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "both types": {"rope_scaling": YARN | {"type": "linear"}},
    "original beside": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "llama3, original beside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 128},
    "mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}},
    "mscale alone": {"rope_scaling": YARN | {"mscale": 0.7}},
    "linear with an attention factor": {"rope_scaling": {"type": "linear", "factor": 2, "attention_factor": 3.0}},
    "a factor without a type": {"rope_scaling": {"factor": 8.0}},
    "default with a factor": {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
    "sections of images": {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [4, 2, 2]}},
    "empty": {"rope_scaling": {}},
}
LENGTHS = (70, 9)


def rotary(config: dict):
    """transformers' inverse frequencies and factor on cos and sin."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})
    module = LlamaRotaryEmbedding(kind)
    return module.inv_freq.numpy(), module.attention_scaling


@pytest.mark.parametrize("name", SCALINGS)
def test_extras_in_rope_scaling(name):
    config = tiny.PUBLISHED["llama2"] | SCALINGS[name]
    cfg = config_from_hf(config)[1]
    expected, factor = rotary(config)
    np.testing.assert_allclose(inverse_frequencies(cfg.rope, cfg.head_dim), expected, rtol=2e-6)
    assert cfg.rope.attention_factor == pytest.approx(factor)


def test_attn_factor_is_the_product_told_as_attention_factor():
    config = tiny.PUBLISHED["llama2"] | {"rope_scaling": YARN | {"attn_factor": 0.9}}
    ours = config_from_hf(config)[1].rope
    plain = rotary(config)[1]  # transformers passes attn_factor over
    theirs = rotary(config | {"rope_scaling": YARN | {"attention_factor": 0.9 * plain}})
    assert ours.attention_factor == pytest.approx(theirs[1])
    assert ours.attention_factor != pytest.approx(plain)


def test_a_head_that_differs_and_old_buffers(tmp_path, measured):
    """A tied configuration: transformers unties it too, and passes the buffers over."""
    transformers = pytest.importorskip("transformers")
    tiny.make_model(tiny.PUBLISHED["smollm2"], tmp_path)
    path = tmp_path / "model.safetensors"
    content = load_file(path)
    head = content["model.embed_tokens.weight"][::-1].copy()
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    save_file(content | buffers | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype="float32"
    ).eval()
    model = pdx.load(tmp_path, dtype="f32")
    tokens = tiny.tokens_of(LENGTHS, model.config.vocab_size)
    found = difference(
        phases.whole(model.params, model.config, tokens, LENGTHS), tiny.whole_logits(theirs, tokens, LENGTHS)
    )
    measured(f"an untied head and old buffers: {found:.1e}")
    assert not model.config.tie_embeddings
    assert found < TOLERANCE
