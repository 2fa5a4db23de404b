"""A tokenizer from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

A GGUF file has the vocabulary, the merges (byte-level BPE), and the name of a pre-tokenizer. The rest of the pipeline
is not in the file; it is rebuilt here as in the published tokenizers. SentencePiece files have a score per piece
instead of merges. There, every split of a piece into two pieces is a merge, in order of the piece's score; among splits
with equal scores, the one with the longest left part comes first.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pdx.errors import ModelFileError, UnsupportedModelError
from pdx.tokenizer.control import end_tokens, looks_like_control
from pdx.tokenizer.gguf_fields import Fields
from pdx.tokenizer.pretokenize import PRE_TOKENIZERS
from pdx.tokenizer.settings import Settings

if TYPE_CHECKING:
    import tokenizers

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_SPACE = "\u2581"  # SentencePiece's character for a space
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def build_from_gguf(metadata: Mapping[str, Any], source: str) -> tuple[tokenizers.Tokenizer, Settings]:
    """The backend and the settings that the metadata describe.

    Raises ModelFileError for missing or inconsistent fields, UnsupportedModelError for a tokenizer model or
    a pre-tokenizer that pdx does not know.
    """
    fields = Fields(metadata, source)
    kind = fields.text("model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind is None:
        raise fields.error("model", "is missing: the file has no tokenizer")
    if kind not in builders:
        raise UnsupportedModelError(
            f"{source}: tokenizer.ggml.model is {kind!r}; pdx reads {', '.join(map(repr, builders))}. "
            "A Hugging Face directory with a tokenizer.json works for any kind."
        )
    tokens = fields.strings("tokens")
    if not tokens:
        raise fields.error("tokens", "is missing or empty")
    types = fields.numbers("token_type", len(tokens)) or [_NORMAL] * len(tokens)
    settings = _settings(fields, tokens)
    ends = _end_ids(fields, tokens, types, settings)
    types = [
        _CONTROL if index in ends or (kind == _NORMAL and looks_like_control(token)) else kind
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]
    with _collector_paused():
        backend = builders[kind](fields, tokens, types)
        _add_tokens(backend, tokens, types, settings)
    return backend, Settings(settings.named, ends, settings.templates, source=source)


def _end_ids(fields: Fields, tokens: list[str], types: list[int], settings: Settings) -> frozenset[int]:
    """The ids that end a generation: those that the file names, and those of tokens that are end tokens by spelling."""
    ids = {token: index for index, token in enumerate(tokens)}
    control = {token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL}
    control |= set(settings.named.values())
    spelled = end_tokens(ids.__contains__, control.__contains__)
    named = {fields.token_id(key, len(tokens)) for key in _END_IDS} | fields.token_ids("eos_token_ids", len(tokens))
    return frozenset(i for i in named if i is not None) | {ids[token] for token in spelled}


def _byte_level(fields: Fields, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    name = fields.text("pre")
    if name in (None, "default"):
        warnings.warn(f"{fields.source} does not name its pre-tokenizer; GPT-2's is used", stacklevel=4)
        name = "gpt-2"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{fields.source}: tokenizer.ggml.pre is {name!r}, a pre-tokenizer that pdx does not know; "
            f"it knows {', '.join(sorted(PRE_TOKENIZERS))}. Load the model from a Hugging Face directory instead."
        )
    pre = PRE_TOKENIZERS[name]
    lines = fields.strings("merges")
    if lines is None:
        raise fields.error("merges", "is missing: byte-level BPE needs it")
    merges = [tuple(line.split(" ")) for line in lines]
    bad = next((line for line, merge in zip(lines, merges, strict=True) if len(merge) != 2), None)
    if bad is not None:
        raise fields.error("merges", f"has the line {bad!r}; expected two pieces and one space")
    backend = Tokenizer(_bpe(BPE, fields, tokens, merges, ignore_merges=pre.ignore_merges))
    backend.normalizer = pre.normalizer()
    backend.pre_tokenizer = pre.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    _set_template(backend, fields, tokens, add_bos=pre.add_bos)
    return backend


def _sentencepiece(fields: Fields, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    if fields.text("pre") not in (None, "default"):
        raise UnsupportedModelError(
            f"{fields.source}: tokenizer.ggml.pre is {fields.text('pre')!r}; a SentencePiece vocabulary has none"
        )
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        # Files store runs of spaces as spaces, but merges are applied after spaces have been replaced.
        if kind == _USER_DEFINED and token.isspace() and " " in token:
            tokens[index] = token.replace(" ", _SPACE)
    lines, scores = fields.strings("merges"), fields.numbers("scores", len(tokens))
    merges: Sequence[tuple[str, ...]]
    if lines is not None:
        merges = [tuple(line.split(" ")) for line in lines]
    elif scores is not None:
        merges = _merges_from_scores(tokens, types, scores)
    else:
        raise fields.error("scores", "is missing: a SentencePiece vocabulary needs it")
    unknown = fields.token_id("unknown_token_id", len(tokens))
    if unknown is None and _UNKNOWN in types:
        unknown = types.index(_UNKNOWN)
    backend = Tokenizer(
        _bpe(
            BPE,
            fields,
            tokens,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.flag("add_space_prefix")
    if prefix is None:
        # In files older than the flag: Llama's SentencePiece model adds a space, Gemma's does not.
        prefix = not str(fields.metadata.get("general.architecture", "")).startswith("gemma")
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _set_template(backend, fields, tokens, add_bos=True)
    return backend


def _merges_from_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, in the order in which SentencePiece would join them.

    User-defined pieces come first, whatever their score, since SentencePiece matches them before all others. Control
    and byte pieces never result from merges, so they are left out.
    """
    kinds = np.asarray(types)
    ranks = np.where(kinds == _USER_DEFINED, 0.0, scores)
    ids = np.flatnonzero((kinds == _NORMAL) | (kinds == _USER_DEFINED))
    ids = ids[np.argsort(-ranks[ids], kind="stable")]
    pieces = [tokens[i] for i in ids.tolist()]
    known = set(pieces)

    def splits(start: int, end: int) -> list[tuple[str, str]]:
        return [
            (left, right)
            for piece in pieces[start:end]
            for cut in range(len(piece) - 1, 0, -1)
            if (left := piece[:cut]) in known and (right := piece[cut:]) in known
        ]

    starts = np.flatnonzero(np.diff(ranks[ids], prepend=np.inf))
    ends = np.append(starts[1:], len(pieces))
    equal = ends - starts > 1
    merges, done = [], 0
    for start, end in zip(starts[equal].tolist(), ends[equal].tolist(), strict=True):
        merges += splits(done, start)
        merges += sorted(splits(start, end), key=lambda pair: (-len(pair[0]), -len(pair[1])))
        done = end
    return merges + splits(done, len(pieces))


def _bpe(bpe: Any, fields: Fields, tokens: list[str], merges: Sequence[tuple[str, ...]], **options: Any) -> Any:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise fields.error("tokens", f"holds {twice!r} twice")
    try:
        return bpe(vocab=vocab, merges=merges, **options)
    except Exception as error:  # tokenizers raises bare Exception
        raise fields.error("merges", f"does not fit tokenizer.ggml.tokens: {error}") from error


def _set_template(backend: Any, fields: Fields, tokens: list[str], *, add_bos: bool) -> None:
    from tokenizers import processors

    pieces, special = ["$A"], []
    for name, default in (("bos", add_bos), ("eos", False)):
        flag = fields.flag(f"add_{name}_token")
        token_id = fields.token_id(f"{name}_token_id", len(tokens))
        if flag and token_id is None:
            raise fields.error(f"{name}_token_id", f"is missing, but tokenizer.ggml.add_{name}_token is true")
        if token_id is None or not (default if flag is None else flag):
            continue
        pieces.insert(0 if name == "bos" else len(pieces), name)
        special.append({"id": name, "ids": [token_id], "tokens": [tokens[token_id]]})
    if special:
        backend.post_processor = processors.TemplateProcessing(single=pieces, pair=None, special_tokens=special)


def _settings(fields: Fields, tokens: list[str]) -> Settings:
    ids = {name: fields.token_id(f"{key}_token_id", len(tokens)) for name, key in _NAMED.items()}
    named = {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None}
    templates = {}
    for key, value in fields.metadata.items():
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
            if not isinstance(value, str):
                raise ModelFileError(f"{fields.source}: {key} should be a string, is {type(value).__name__}")
            templates[key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default"] = value
    return Settings(named=named, templates=templates)


def _add_tokens(backend: Any, tokens: list[str], types: list[int], settings: Settings) -> None:
    from tokenizers import AddedToken

    named = set(settings.named.values())
    special: list[str] = []
    plain: list[str] = []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _UNKNOWN) or token in named:
            # Gemma's unused tokens are control tokens in GGUF files, but ordinary added tokens in `tokenizer.json`.
            spare = token == "<mask>" or (token.startswith("<unused") and token[7:-1].isdigit())
            (plain if spare and token not in named else special).append(token)
        elif kind == _USER_DEFINED:
            plain.append(token)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special if token])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain if token])


@contextmanager
def _collector_paused() -> Iterator[None]:
    # Creating half a million merge tuples would trigger several full collections, each of which visits all of them.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
