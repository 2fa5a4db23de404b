"""Tensors beside those of the text model: what is ignored, what is said, what is refused by name; tied heads."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from pdx.errors import ModelFileError
from pdx.families import families
from pdx.families.ignored_tensors import is_buffer, part_of
from pdx.weights.load import load
from tests.support import tiny_model, weight_files

LAYER = "model.layers.0."
# Name and shape, as older versions of the published classes saved them.
BUFFERS = {
    "model.layers.1.self_attn.rotary_emb.inv_freq": (4,),
    "model.layers.1.self_attn.rotary_emb.cos_cached": (1, 1, 512, 8),
    "model.layers.1.self_attn.rotary_emb.sin_cached": (1, 1, 512, 8),
    "model.layers.1.self_attn.rotary_emb.original_inv_freq": (4,),
    "model.rotary_emb.inv_freq": (4,),
    "model.rotary_emb_local.inv_freq": (4,),
    "model.rotary_emb.full_attention_inv_freq": (4,),
    "model.rotary_emb.sliding_attention_original_inv_freq": (4,),
    "rotary_pos_emb.inv_freq": (4,),
    "model.layers.0.self_attn.masked_bias": (),
    "model.layers.0.self_attn.bias": (1, 1, 64, 64),
    "model.layers.0.attn.masked_bias": (1,),
    "model.embeddings.position_ids": (1, 512),
    "model.causal_mask": (64, 64),
    "model.embed_tokens.embed_scale": (),
    "model.layers.0.self_attn._extra_state": (7,),
    "rope.freqs": (4,),
}
# What the model would compute otherwise: never taken for a buffer.
WEIGHTS = {
    "model.layers.0.self_attn.q_proj.bias": (32,),
    "model.layers.0.self_attn.bias": (32,),
    "model.layers.0.mlp.down_proj.bias": (32,),
    "model.layers.0.self_attn.q_norm.weight": (8,),
    "model.layers.0.self_attn.rotary_emb.weight": (4,),
    "model.layers.0.self_attn.q_proj.weight_scale": (1,),
    "model.layers.0.self_attn.k_scale": (1,),
    "model.layers.0.self_attn.q_proj.lora_A.weight": (2, 32),
    "model.layers.0.self_attn.sinks": (4,),
    "model.layers.2.input_layernorm.weight": (32,),
    "model.layers.0.pre_feedforward_layernorm.weight": (32,),
    "lm_head.bias": (258,),
    "model.norm.bias": (32,),
    "score.weight": (2, 32),
}
PARTS = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": "an image encoder",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.bias": "an image encoder",
    "multi_modal_projector.mm_input_projection_weight": "an image encoder",
    "model.multi_modal_projector.mm_soft_emb_norm.weight": "an image encoder",
    "visual.blocks.0.attn.qkv.weight": "an image encoder",
    "audio_tower.layers.0.fc1.weight": "an audio encoder",
    "mtp.layers.0.mlp.up_proj.weight": "draft heads",
    "model.mtp_layers.0.input_proj.weight": "draft heads",
    "v.blk.0.attn_q.weight": "an image encoder",
    "mm.mm_input_projection.weight": "an image encoder",
}


@pytest.fixture
def directory(tmp_path):
    return tiny_model.make(tmp_path / "tiny")


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def extended(directory, extra: dict):
    weight_files.rewrite(directory, lambda t: t.update({k: np.ones(s, np.float32) for k, s in extra.items()}))
    return load(directory)


def test_buffers_of_any_family_are_ignored(directory):
    plain = load(directory)
    model = extended(directory, BUFFERS)
    assert same(model.params, plain.params)
    assert model.notes == []


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_no_parameter_of_a_family_is_a_buffer(family):
    for leaves in (family.hf_names.leaves, family.gguf_names.leaves):
        for name in (leaf.format(i=3) for leaf in leaves.values()):
            assert not is_buffer(name, (32,))
            assert not is_buffer(name, (32, 32))
            assert part_of(name) is None


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_the_configuration_does_not_ask_for_are_refused_by_name(directory, name):
    with pytest.raises(ModelFileError, match=f"the configuration does not ask for tensor {name}") as caught:
        extended(directory, {name: WEIGHTS[name]})
    assert ("merge it into the model" in str(caught.value)) == ("lora" in name)
    assert ("quantized by another tool" in str(caught.value)) == ("scale" in name)


def test_parts_beside_the_text_model_are_ignored_and_said(directory):
    plain = load(directory)
    model = extended(directory, dict.fromkeys(PARTS, (2, 2)))
    assert same(model.params, plain.params)
    for part in set(PARTS.values()):
        held = [name for name, of in PARTS.items() if of == part]
        said = f"{len(held)} tensor{'s' * (len(held) > 1)} of {part}, "
        assert any(said in note and any(f"such as {name}:" in note for name in held) for note in model.notes), part


def test_draft_layers_behind_the_last_are_ignored_where_the_configuration_names_them(directory):
    plain = load(directory)
    draft = {"model.layers.2.eh_proj.weight": (32, 64), "model.layers.2.mlp.up_proj.weight": (48, 32)}
    with pytest.raises(ModelFileError, match=r"does not ask for tensor model\.layers\.2\.eh_proj\.weight"):
        extended(directory, draft)
    weight_files.reconfigure(directory, num_nextn_predict_layers=1)
    model = load(directory)
    assert same(model.params, plain.params)
    assert any("2 tensors of draft heads" in note for note in model.notes)
    with pytest.raises(ModelFileError, match=r"does not ask for tensor model\.layers\.3\.eh_proj\.weight"):
        extended(directory, {"model.layers.3.eh_proj.weight": (32, 64)})


def test_the_text_of_a_multimodal_checkpoint(tmp_path):
    """Gemma 3 with an image encoder: the nested names and configuration, and what is ignored is said."""
    directory = tiny_model.make(tmp_path / "tiny")
    text = json.loads((directory / "config.json").read_text())
    del text["hidden_act"], text["architectures"], text["rope_theta"]
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text | {"model_type": "gemma3_text", "head_dim": 8},
        "vision_config": {"hidden_size": 8},
        "mm_tokens_per_image": 4,
    }
    (directory / "config.json").write_text(json.dumps(config))
    plain = weight_files.tensors(directory)
    for i in range(tiny_model.LAYERS):
        for name, size in (
            ("pre_feedforward_layernorm", 32),
            ("post_feedforward_layernorm", 32),
            ("self_attn.q_norm", 8),
            ("self_attn.k_norm", 8),
        ):
            plain[f"model.layers.{i}.{name}.weight"] = np.zeros(size, np.float32)
    nested = {f"language_model.{name}": x for name, x in plain.items()}
    nested["vision_tower.vision_model.post_layernorm.weight"] = np.ones(8, np.float32)
    save_file(nested, directory / "model.safetensors")
    model = load(directory)
    assert [note for note in model.notes if "1 tensor of an image encoder" in note] == model.notes
    config["text_config"] = "nested"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="text_config is 'nested', expected an object"):
        load(directory)


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tied_configuration_with_another_head_unties(directory):
    head = weight_files.tensors(directory)[EMBED].copy()
    head[-1, -1] += 1e-3  # one value, the last that is compared
    weight_files.rewrite(directory, lambda t: t.update({HEAD: head}))
    model = load(directory)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(model.params["lm_head"], head)
    assert [n for n in model.notes if f"ties {HEAD} to {EMBED}" in n] == model.notes != []


def test_a_tied_configuration_with_the_same_head_stays_tied(directory):
    weight_files.rewrite(directory, lambda t: t.update({HEAD: t[EMBED].copy()}))
    model = load(directory)
    assert model.config.tie_embeddings
    assert "lm_head" not in model.params
    assert model.notes == []


def test_a_head_of_another_size_is_refused(directory):
    weight_files.rewrite(directory, lambda t: t.update({HEAD: t[EMBED][:-2].copy()}))
    with pytest.raises(ModelFileError, match=rf"tensor {HEAD} has shape \[256, 32\], expected \[258, 32\]"):
        load(directory)


def test_a_tied_model_stored_under_the_head_alone(directory):
    plain = load(directory)
    weight_files.rewrite(directory, lambda t: t.update({HEAD: t.pop(EMBED)}))
    model = load(directory)
    assert same(model.params, plain.params)
    assert model.config == plain.config
    weight_files.reconfigure(directory, tie_word_embeddings=False)
    with pytest.raises(ModelFileError, match=f"tensor {EMBED} is missing"):
        load(directory)


def test_names_without_the_leading_model(directory):
    """As the bare model is saved, buffers and all."""
    plain = load(directory)
    extended(directory, BUFFERS)
    names = list(weight_files.tensors(directory))
    weight_files.rewrite(directory, lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in names])
    assert same(load(directory).params, plain.params)


def test_an_untied_model_without_a_head_is_refused(directory):
    """Elsewhere it is drawn at random. A missing `tie_word_embeddings` is the family's default: Llama does not tie."""
    for change in ({"tie_word_embeddings": False}, {"tie_word_embeddings": None}):
        weight_files.reconfigure(directory, **change)
        with pytest.raises(ModelFileError, match=f"tensor {HEAD} is missing"):
            load(directory)


def test_a_gguf_file_ties_by_its_tensors(directory):
    content = weight_files.tensors(directory)
    tied = load(weight_files.write_gguf(directory.parent / "tied.gguf", content))
    own = load(weight_files.write_gguf(directory.parent / "own.gguf", content | {HEAD: content[EMBED] * 2}))
    assert tied.config.tie_embeddings
    assert not own.config.tie_embeddings
    np.testing.assert_array_equal(own.params["lm_head"], content[EMBED] * 2)
