"""Small tokenizers for the tests, trained on the spot, and an independent SentencePiece to compare with.

`byte_level` builds the pipelines as the published `tokenizer.json` files spell them; `sentencepiece_metadata`
trains a vocabulary with scores, and `sentencepiece_encode` is the algorithm that SentencePiece documents.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import pdx.tokenizer
from pdx.tokenizer.settings import Settings
from tests.support.corpus import CODE, SCRIPTS, WORDS, corpus

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = "<think>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACE = "\u2581"

# `pre_tokenizer`, `normalizer` and `ignore_merges` as published with GPT-2, SmolLM2, Llama 3.1 and Qwen 3.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES | {"use_regex": False}]}


_LLAMA3 = _split(
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_QWEN = _split(
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "gpt-2": (_BYTES, None, False),
    "smollm": (_DIGITS, None, False),
    "llama-bpe": (_LLAMA3, None, True),
    "qwen2": (_QWEN, {"type": "NFC"}, False),
}


@cache
def byte_level(pre: str) -> Tokenizer:
    """A byte-level BPE of 800 pieces with the published pipeline of that name, special tokens first."""
    pre_tokenizer, normalizer, ignore_merges = PUBLISHED[pre]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[*SPECIAL, USER_DEFINED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_training_text(), trainer)
    data = json.loads(trained.to_str())
    data["pre_tokenizer"], data["normalizer"] = pre_tokenizer, normalizer
    data["model"]["ignore_merges"] = ignore_merges
    data["decoder"] = _BYTES | {"add_prefix_space": True}
    data["added_tokens"][len(SPECIAL)]["special"] = False
    # A piece that no merge makes: only `ignore_merges` finds it.
    data["model"]["vocab"]["ĠCamelot"] = len(data["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(data))


def byte_level_metadata(pre: str) -> dict[str, Any]:
    """What a GGUF file says of `byte_level(pre)`."""
    model = json.loads(byte_level(pre).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [4] + [1] * (len(tokens) - len(SPECIAL) - 1),
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


@cache
def _sentencepiece_pieces() -> tuple[str, ...]:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trained.train_from_iterator(_training_text(), trainers.BpeTrainer(vocab_size=900, show_progress=False))
    vocab = trained.get_vocab()
    longer = sorted((piece for piece in vocab if len(piece) > 1), key=vocab.__getitem__)
    # Characters that no longer piece needs are left out, so that they fall back to bytes.
    needed = set("".join(longer))
    return (*longer, *sorted(needed))


def sentencepiece_metadata(*, prefix: bool) -> dict[str, Any]:
    """What a GGUF file says of a SentencePiece BPE vocabulary, the merges only implied by the scores."""
    control = ["<unk>", "<s>", "</s>"]
    spaces, newlines = [" " * n for n in range(2, 6)], ["\n" * n for n in range(1, 6)]
    user = [*spaces, *newlines, "<b>"]
    # SentencePiece never learns a piece across a user-defined one.
    cut = (SPACE * 2, "\n", "<b>")
    pieces = [piece for piece in _sentencepiece_pieces() if not any(text in piece for text in cut)]
    raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    types = [2, 3, 3] + [4] * len(user) + [6] * 256 + [1] * len(pieces)
    return {
        "general.architecture": "llama" if prefix else "gemma3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*control, *user, *raw_bytes, *pieces],
        "tokenizer.ggml.token_type": types,
        # As converters write them: -1000 for what is not an ordinary piece.
        "tokenizer.ggml.scores": [-1000.0] * (3 + len(user)) + [0.0] * 256 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def sentencepiece_encode(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's BPE in plain Python: user-defined pieces are cut out first, the longest at each place;
    then the adjacent pair whose joined piece scores best is joined, the leftmost of equals, until none is left;
    what is not a piece becomes its bytes. (Kudo and Richardson, 2018, section 3.)"""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ids = {token.replace(" ", SPACE): index for index, token in enumerate(tokens)}
    score = {
        token: value
        for token, value, kind in zip(tokens, metadata["tokenizer.ggml.scores"], types, strict=True)
        if kind == 1
    }
    user = sorted((token.replace(" ", SPACE) for token, kind in zip(tokens, types, strict=True) if kind == 4), key=len)
    if metadata["tokenizer.ggml.add_space_prefix"] and text:
        text = " " + text
    text = text.replace(" ", SPACE)
    symbols: list[tuple[str, bool]] = []
    while text:
        whole = next((token for token in reversed(user) if text.startswith(token)), None)
        symbols.append((whole or text[0], whole is not None))
        text = text[len(whole or text[0]) :]
    while True:
        joined = [a[0] + b[0] if not (a[1] or b[1]) else "" for a, b in pairwise(symbols)]
        candidates = [(-score[piece], place) for place, piece in enumerate(joined) if piece in score]
        if not candidates:
            break
        place = min(candidates)[1]
        symbols[place : place + 2] = [(joined[place], False)]
    result: list[int] = []
    for symbol, _ in symbols:
        known = symbol in ids and types[ids[symbol]] in (1, 4)
        result += [ids[symbol]] if known else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode("utf-8")]
    return result


def _training_text() -> list[str]:
    return [*SCRIPTS.values(), *CODE, *WORDS, *corpus(400, seed=99)]


def tokenizer_of(template: str) -> pdx.tokenizer.Tokenizer:
    """A tokenizer without a vocabulary that has a chat template, for what a chat is rendered to."""
    settings = Settings(templates={"default": template}, source="this model")
    return pdx.tokenizer.Tokenizer(Tokenizer(models.BPE()), settings)
