"""The two built-in models as published: fetched once, mapped, converted. Needs a network the first time."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pdx.config import RopeConfig
from pdx.model import forward
from pdx.weights.builtin import BUILTIN
from pdx.weights.checkpoint import save
from pdx.weights.load import load

pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.fixture(scope="module", params=sorted(BUILTIN))
def model(request):
    return load(request.param)


def test_configuration(model):
    cfg = model.config
    if model.name == "gemma-3-270m":
        assert (cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (18, 640, 4, 1, 256)
        assert [i for i, w in enumerate(cfg.windows) if w is None] == [5, 11, 17]
        assert set(cfg.windows) == {None, 512}
        assert (cfg.rope, cfg.rope_window) == (RopeConfig(1e6), RopeConfig(1e4))
        assert (cfg.vocab_size, cfg.norm_eps, cfg.attn_scale) == (262144, 1e-6, 1 / 16)
        assert any("ai.google.dev/gemma/terms" in note for note in model.notes)
    else:
        assert (cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (30, 576, 9, 3, 64)
        assert set(cfg.windows) == {None}
        assert (cfg.vocab_size, cfg.norm_eps, cfg.rope) == (49152, 1e-5, RopeConfig(1e5))
        assert model.license == "Apache-2.0"
    assert cfg.tie_embeddings


def test_it_knows_the_capital_of_france(model):
    """The instruction model says it; transformers' three best of the small base model are ` the`, ` a`, ` Paris`."""
    ids = model.tokenizer.encode("The capital of France is")
    logits = np.asarray(forward(model.params, model.config, np.asarray([ids]), logits="last").logits[0])
    best = [model.tokenizer.decode([int(i)]).strip() for i in np.argsort(-logits)[:3]]
    assert best == ["the", "a", "Paris"] if model.name == "gemma-3-270m" else best[0] == "Paris"


def test_conversion_keeps_the_bits(model, tmp_path):
    directory = save(model, tmp_path / "converted")
    again = load(directory)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), model.params, again.params))
    assert (again.config, again.terms, again.license) == (model.config, model.terms, model.license)
    text = "def f(x): return x  # 日本語 🙂"
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
