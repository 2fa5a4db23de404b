"""Runs of white space in SentencePiece vocabularies from GGUF files: one token each, and no space that nobody wrote."""

from __future__ import annotations

import pytest

from pdx.tokenizer import Tokenizer
from tests.support.tokenizer_fixtures import sentencepiece_metadata

USER_DEFINED = 4


def gemma() -> Tokenizer:
    metadata = sentencepiece_metadata(prefix=False)
    keys = [f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "scores")]
    # SentencePiece never learns a piece across a user-defined one.
    rows = [row for row in zip(*(metadata[key] for key in keys), strict=True) if "\t" not in row[0]]
    rows += [("\t" * count, USER_DEFINED, -1000.0) for count in range(1, 7)]
    metadata |= zip(keys, map(list, zip(*rows, strict=True)), strict=True)
    del metadata["tokenizer.ggml.add_space_prefix"]  # as older files of Gemma
    return Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("\t" * 6 + "e", ["\t" * 6, "e"]),
        ("\t" * 7 + "e", ["\t" * 6, "\t", "e"]),
        ("a" + "\t" * 3 + "\n\n" + " " * 4 + "e", ["a", "\t\t\t", "\n\n", "    ", "e"]),
        (" e", [" ", "e"]),
        ("<s>\te", ["<s>", "\t", "e"]),
    ],
)
def test_a_run_is_the_longest_token_of_it(text, pieces):
    tokenizer = gemma()
    ids = tokenizer.encode(text, add_special=False)
    assert [tokenizer.token_text(i) for i in ids] == pieces
    assert tokenizer.decode(ids, skip_special=False) == text
