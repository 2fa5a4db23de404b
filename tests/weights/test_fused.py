"""Families whose files hold several parameters in one tensor: queries, keys and values, gate and up."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pdx import families
from pdx.errors import ModelFileError
from pdx.families.common import GGUF_NAMES, HF_NAMES, Names, halves_from_pairs
from pdx.weights import load as loading
from pdx.weights.load import load
from tests.support import models, tiny_model, weight_files

QKV, GATE_UP = "model.layers.{i}.self_attn.qkv_proj.weight", "model.layers.{i}.mlp.gate_up_proj.weight"
FUSED = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}
NAMES = Names(HF_NAMES | {leaf: name for name, leaves in FUSED.items() for leaf in leaves})


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def fuse(content: dict[str, np.ndarray], order=list) -> None:
    """Put the tensors of each layer together, their parameters in `order`."""
    for layer in range(tiny_model.LAYERS):
        for name, leaves in FUSED.items():
            parts = [content.pop(HF_NAMES[leaf].format(i=layer)) for leaf in leaves]
            content[name.format(i=layer)] = np.concatenate(order(parts))


@pytest.fixture
def directory(tmp_path):
    return tiny_model.make(tmp_path / "tiny")


def expect_fused(monkeypatch) -> None:
    """From here on Llama's files hold fused tensors."""
    llama = next(f for f in families.families() if f.name == "llama")
    monkeypatch.setattr(families, "families", lambda: (dataclasses.replace(llama, hf_names=NAMES),))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_fused_tensors_load_as_the_parameters_that_they_hold(directory, monkeypatch, quantize):
    monkeypatch.setattr(loading, "VALUES_PER_PIECE", 16 * tiny_model.WIDTH)  # quantized 16 rows at a time
    expected, content = load(directory, quantize=quantize), weight_files.tensors(directory)
    expect_fused(monkeypatch)
    weight_files.rewrite(directory, fuse)
    assert same(load(directory, quantize=quantize).params, expected.params)
    # The comparison can fail: in another order these are other matrices.
    wrong = dict(content)
    fuse(wrong, lambda parts: parts[::-1])
    weight_files.rewrite(directory, lambda found: found.update(wrong))
    assert not same(load(directory, quantize=quantize).params, expected.params)


def test_a_fused_tensor_is_held_to_the_rows_of_all_its_parameters(directory, monkeypatch):
    expect_fused(monkeypatch)
    weight_files.rewrite(directory, fuse)
    name, rows = QKV.format(i=1), (tiny_model.HEADS + 2 * tiny_model.KV_HEADS) * tiny_model.WIDTH // tiny_model.HEADS
    weight_files.rewrite(directory, lambda content: content.update({name: content[name][:-1].copy()}))
    with pytest.raises(ModelFileError, match=rf"{name} has shape \[{rows - 1}, .* expected \[{rows}, "):
        load(directory)


def test_fused_rows_may_be_stored_in_pairs_too():
    """GGUF files of a family with interleaved RoPE."""
    cfg = models.LLAMA
    names = Names(
        GGUF_NAMES | {f"{x}_proj": "blk.{i}.attn_qkv.weight" for x in "qkv"}, interleaved=("q_proj", "k_proj")
    )
    q, k, v = (names.source(f"{x}_proj", 0, cfg) for x in "qkv")
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    assert {s.name for s in (q, k, v)} == {"blk.0.attn_qkv.weight"}
    assert {s.stored_rows for s in (q, k, v)} == {queries + 2 * keys}
    np.testing.assert_array_equal(q.rows, halves_from_pairs(cfg.num_heads, cfg.head_dim))
    np.testing.assert_array_equal(k.rows, queries + halves_from_pairs(cfg.num_kv_heads, cfg.head_dim))
    np.testing.assert_array_equal(v.rows, queries + keys + np.arange(keys))
    assert names.source("up_proj", 0, cfg).stored_rows is None
