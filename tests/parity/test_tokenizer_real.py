"""The tokenizers of the built-in models, token for token against transformers, sentencepiece and golden ids.

transformers rebuilds a tokenizer from GGUF metadata much as pdx does; where the two differ, the published
original decides. What transformers 5 makes different:

- SmolLM2 (`smollm`): single digits are not split off before GPT-2's pattern runs. (Likewise, of the names that
  no built-in model has, Qwen's `qwen2` lacks its NFC and Llama 3's `llama-bpe` its `ignore_merges`.)
- Gemma: runs of more than 31 spaces are cut into other pieces, because the merges of runs are tried shortest
  first; and U+2581 written twice in a text is not found as the added token it is published as.
"""

from __future__ import annotations

import json
import time
from functools import cache

import pytest

from pdx.tokenizer import Tokenizer
from pdx.weights.gguf_file import GgufFile
from pdx.weights.resolve import resolve
from tests.golden.make_tokenizer import GOLDEN
from tests.parity.test_tokenizer_parity import COUNT, compare, report
from tests.support.corpus import corpus

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
pytestmark = [pytest.mark.parity, pytest.mark.slow]


@cache
def _real(name: str):
    """The tokenizer of a built-in model by pdx and by transformers, and the metadata."""
    path = resolve(name).path
    metadata = GgufFile(path).metadata
    started = time.perf_counter()
    ours = Tokenizer.from_gguf(metadata)
    seconds = time.perf_counter() - started
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return ours, theirs, metadata, seconds


def test_real_smollm2(measured):
    from tokenizers import pre_tokenizers

    ours, theirs, _, seconds = _real("smollm2-135m-instruct")
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    texts = corpus(COUNT, special=["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>"])
    report(measured, f"SmolLM2 (loaded in {seconds:.2f} s)", texts, compare(ours, theirs, texts))
    assert ours.encode("Hello")[0] != ours.bos_id, "SmolLM2 takes no BOS"
    assert ours.eos_ids == {0, 2}
    chat = [{"role": "user", "content": "What is 12 × 3?"}]
    assert ours.encode_chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def test_real_gemma(measured):
    ours, theirs, _, seconds = _real("gemma-3-270m")
    texts = corpus(COUNT, special=["<start_of_turn>", "<end_of_turn>", "<bos>", "<table>"])
    usual = [text for text in texts if " " * 32 not in text and "\u2581\u2581" not in text]
    report(measured, f"Gemma 3 (loaded in {seconds:.2f} s)", usual, compare(ours, theirs, usual))
    assert len(usual) > 0.95 * len(texts)
    assert ours.encode("Hello")[0] == ours.bos_id == 2
    assert ours.eos_ids == {1, 106}


def test_real_gemma_equals_the_published_tokenizer(measured):
    ours = _real("gemma-3-270m")[0]
    rows = json.loads(GOLDEN.read_text(encoding="ascii"))
    assert any(" " * 32 in row["text"] for row in rows)
    for row in rows:
        assert ours.encode(row["text"]) == row["ids"], row["text"]
        assert ours.decode(row["ids"]) == row.get("decoded", row["text"])
    tokens = sum(len(row["ids"]) for row in rows)
    report(measured, "Gemma 3 as published (golden)", [row["text"] for row in rows], tokens)


def test_real_gemma_equals_sentencepiece(measured):
    from sentencepiece import sentencepiece_model_pb2

    ours, _, metadata, _ = _real("gemma-3-270m")
    proto = sentencepiece_model_pb2.ModelProto()
    columns = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*columns, strict=True):
        proto.pieces.add(
            piece=token.replace(" ", "\u2581") if kind == 4 else token,
            score=float(score) if kind == 1 else 0.0,
            type=2 if token == "<unk>" else int(kind),
        )
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback = 2, True
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = 0, 1, 2, 3
    spec.pad_piece, spec.eos_piece, spec.bos_piece, spec.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
    rules = proto.normalizer_spec
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces = "identity", False, False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    # Two of U+2581 are a user-defined piece, which the published tokenizer looks for in the raw text.
    texts = [text for text in corpus(COUNT) if "\u2581\u2581" not in text]
    for text in texts:
        ids = ours.encode(text, add_special=False, parse_special=False)
        assert ids == processor.encode(text), text
        assert ours.decode(ids) == processor.decode(ids)
    report(measured, "Gemma 3 against sentencepiece", texts, sum(len(ours.encode(text)) for text in texts))
