"""Runs of white space in SentencePiece vocabularies from GGUF files: one token each, and no space that nobody wrote."""

from __future__ import annotations

import pytest

from pdx.tokenizer import Tokenizer
from tests.tokenizer_fixtures import sentencepiece_metadata

USER_DEFINED = 4


def gemma() -> Tokenizer:
    metadata = sentencepiece_metadata(prefix=False)
    for count in range(1, 7):
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "\t" * count]
        metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED]
        metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], -1000.0]
    del metadata["tokenizer.ggml.add_space_prefix"]  # as older files of Gemma
    return Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("\t" * 6 + "the", ["\t" * 6, "the"]),
        ("\t" * 7 + "the", ["\t" * 6, "\t", "the"]),
        ("a" + "\t" * 3 + "\n\n" + " " * 4 + "the", ["a", "\t\t\t", "\n\n", "    ", "the"]),
        (" the", [" the"]),
        ("<s>\tthe", ["<s>", "\t", "the"]),
    ],
)
def test_a_run_is_the_longest_token_of_it(text, pieces):
    tokenizer = gemma()
    ids = tokenizer.encode(text, add_special=False)
    assert [tokenizer.token_text(i) for i in ids] == pieces
    assert tokenizer.decode(ids, skip_special=False) == text
