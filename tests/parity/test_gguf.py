"""Tiny models of transformers written as GGUF in llama.cpp's layout, against transformers' own logits."""

from __future__ import annotations

import pytest
from gguf import GGMLQuantizationType as Kind

import pdx
from tests.golden.phases import TOLERANCE, difference, prefilled_then_decoded, whole
from tests.parity import gguf_files, tiny

pytestmark = pytest.mark.parity

LENGTHS, PROMPTS = (150, 37, 9), (80, 20, 1)
# GGUF leaves to the reader what Gemma's published sizes have: 1 / sqrt(head dim) as the scale, every sixth
# layer of Gemma 3 without a window, 10,000 as the base of those with one.
GEMMA = {"query_pre_attn_scalar": 32}
CONFIGS = {
    **{name: tiny.PUBLISHED[name] for name in ("llama31", "llama_linear", "smollm2", "mistral", "qwen2", "qwen3")},
    "gemma2": tiny.PUBLISHED["gemma2"] | GEMMA,
    "gemma3": tiny.PUBLISHED["gemma3"] | GEMMA,
}


def compare(config: dict, kind: Kind | None, directory) -> tuple[float, float]:
    """The largest logit differences in one pass and in decode behind a prefill."""
    pytest.importorskip("transformers")
    theirs = tiny.make_model(config, directory)
    gguf_files.write(directory / "tiny.gguf", theirs, kind)
    model = pdx.load(directory / "tiny.gguf", dtype="f32")
    tokens = tiny.tokens_of(LENGTHS, model.config.vocab_size)
    reference = tiny.whole_logits(theirs, tokens, LENGTHS)
    steps = prefilled_then_decoded(model.params, model.config, tokens, LENGTHS, PROMPTS, chunk=max(PROMPTS))
    return (
        difference(whole(model.params, model.config, tokens, LENGTHS), reference),
        difference(steps, [r[n - 1 :] for r, n in zip(reference, PROMPTS, strict=True)]),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_gives_the_logits_of_transformers(name, tmp_path, measured):
    one_pass, decode = compare(CONFIGS[name], None, tmp_path)
    measured(f"{name:14} as GGUF in f32: one pass {one_pass:.1e}, decode {decode:.1e}")
    assert max(one_pass, decode) < TOLERANCE


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0, Kind.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama31", "gemma3"])
def test_a_quantized_file_gives_the_logits_of_its_values(name, kind, tmp_path, measured):
    """Blocks are read, and Llama's rows put back in order, as `gguf` itself dequantizes them."""
    one_pass, decode = compare(CONFIGS[name], kind, tmp_path)
    measured(f"{name:14} as GGUF in {kind.name}: one pass {one_pass:.1e}, decode {decode:.1e}")
    assert max(one_pass, decode) < TOLERANCE


def test_rows_left_in_pairs_would_be_seen(tmp_path, monkeypatch):
    """The comparison fails for a file whose queries and keys were not put in llama.cpp's order."""
    monkeypatch.setattr(gguf_files, "in_pairs", lambda x, heads: x)
    assert min(compare(CONFIGS["smollm2"], None, tmp_path)) > 50 * TOLERANCE
