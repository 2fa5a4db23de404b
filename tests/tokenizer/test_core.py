"""Text to ids and back, from GGUF metadata and from Hugging Face directories, against independent pipelines."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pdx.errors import ModelFileError, RequestError, UnsupportedModelError
from pdx.tokenizer import Tokenizer
from tests.support.corpus import corpus
from tests.support.tokenizer_fixtures import (
    PUBLISHED,
    SPECIAL,
    USER_DEFINED,
    byte_level,
    byte_level_metadata,
    sentencepiece_encode,
    sentencepiece_metadata,
)

MARKED = (*SPECIAL, USER_DEFINED)


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata("smollm"))


@pytest.mark.parametrize("pre", sorted(PUBLISHED))
def test_byte_level_gguf_equals_the_published_pipeline(pre):
    tokenizer, published = Tokenizer.from_gguf(byte_level_metadata(pre)), byte_level(pre)
    for text in corpus(1200, special=MARKED):
        ids = tokenizer.encode(text)
        assert ids == published.encode(text).ids, text
        assert tokenizer.decode(ids) == published.decode(ids)
        assert tokenizer.decode(ids, skip_special=False) == published.decode(ids, skip_special_tokens=False)


def test_each_pre_tokenizer_splits_its_own_way():
    texts = {"digits": "12345", "taken whole": " Camelot"}
    pieces, accents = {}, {}
    for pre in PUBLISHED:
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre))
        for name, text in texts.items():
            pieces[pre, name] = [tokenizer.token_text(i) for i in tokenizer.encode(text)]
        accents[pre] = tokenizer.decode(tokenizer.encode("e\u0301"))
    assert pieces["smollm", "digits"] == pieces["qwen2", "digits"] == list("12345")
    assert pieces["llama-bpe", "taken whole"] == [" Camelot"] != pieces["qwen2", "taken whole"]
    assert accents["qwen2"] == "\u00e9"
    assert accents["smollm"] == "e\u0301"


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_gguf_equals_its_algorithm(prefix):
    metadata = sentencepiece_metadata(prefix=prefix)
    tokenizer = Tokenizer.from_gguf(metadata)
    # Added tokens are matched in the raw text and sections between them get their own prefix, as published;
    # SentencePiece has neither, so these texts hold nothing that is cut out.
    cut_out = ["\u2581\u2581", "<b>", "<s>", "</s>", "<unk>"] + (["\n"] if prefix else [])
    texts = [text for text in corpus(1500) if len(text) < 400 and not any(token in text for token in cut_out)]
    assert len(texts) > 400
    bytes_seen = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == sentencepiece_encode(metadata, text), text
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")
        bytes_seen += any(metadata["tokenizer.ggml.token_type"][i] == 6 for i in ids)
    assert bytes_seen > 100


def test_sentencepiece_prefix_and_space_runs():
    plain = Tokenizer.from_gguf(sentencepiece_metadata(prefix=False))
    prefixed = Tokenizer.from_gguf(sentencepiece_metadata(prefix=True))
    assert prefixed.encode("the", add_special=False) == plain.encode(" the", add_special=False)
    assert prefixed.decode(prefixed.encode(" a")) == " a"
    run = plain.encode("a" + " " * 7 + "b", add_special=False)
    assert [plain.token_text(i) for i in run] == ["a", "     ", "  ", "b"]
    assert plain.encode("", add_special=False) == prefixed.encode("", add_special=False) == []


def test_space_prefix_of_files_older_than_the_flag():
    metadata = sentencepiece_metadata(prefix=True)
    del metadata["tokenizer.ggml.add_space_prefix"]
    llama = Tokenizer.from_gguf(metadata)
    gemma = Tokenizer.from_gguf(metadata | {"general.architecture": "gemma2"})
    assert llama.encode("the") == gemma.encode(" the")


@pytest.mark.parametrize(("add_bos", "add_eos"), [(None, None), (True, False), (False, True), (True, True)])
def test_gguf_flags_decide_what_surrounds_a_text(add_bos, add_eos):
    flags = {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
    flags = {key: np.bool_(value) for key, value in flags.items() if value is not None}
    base = sentencepiece_metadata(prefix=False)
    del base["tokenizer.ggml.add_bos_token"]
    tokenizer = Tokenizer.from_gguf(base | flags)
    bare = tokenizer.encode("hello", add_special=False)
    # A SentencePiece file that says nothing wants BOS and no EOS.
    expected = [1] * (add_bos is not False) + bare + [2] * bool(add_eos)
    assert tokenizer.encode("hello") == expected


def test_special_tokens_in_text_are_parsed_only_when_asked(smol):
    text = f"a<|im_end|>b{USER_DEFINED}"
    assert 2 in smol.encode(text)
    raw = smol.encode(text, parse_special=False)
    assert not set(raw) & smol.special_ids
    assert raw[-1] == 3, "user-defined tokens are vocabulary, not control"
    assert smol.decode(raw) == text
    assert smol.decode(smol.encode(text)) == f"ab{USER_DEFINED}"


def test_threads_do_not_see_each_others_way_of_parsing(smol):
    parsed, raw = smol.encode("a<|im_end|>b"), smol.encode("a<|im_end|>b", parse_special=False)
    assert parsed != raw
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: smol.encode("a<|im_end|>b", parse_special=i % 2 == 0), range(400)))
    assert results == [parsed, raw] * 200


def test_ids_and_texts_of_a_gguf_vocabulary(smol):
    assert (smol.bos_id, smol.pad_id, smol.token_id("<|im_end|>"), smol.token_id("absent")) == (1, 0, 2, None)
    assert smol.eos_ids == {0, 2}, "the file's eos, and the other end that it marks as control"
    assert smol.vocab_size == len(byte_level_metadata("smollm")["tokenizer.ggml.tokens"])
    assert smol.token_text(smol.token_id("Ġt")) == " t"
    assert smol.token_text(2) == "<|im_end|>"
    assert smol.token_text(10**6) == ""
    more = byte_level_metadata("smollm") | {"tokenizer.ggml.eot_token_id": np.uint32(9)}
    assert Tokenizer.from_gguf(more).eos_ids == {0, 2, 9}


def test_numpy_arrays_are_as_good_as_lists():
    lists = sentencepiece_metadata(prefix=False)
    kinds = {"scores": np.float32, "token_type": np.int32}
    arrays = lists | {f"tokenizer.ggml.{key}": np.array(lists[f"tokenizer.ggml.{key}"], t) for key, t in kinds.items()}
    text = "".join(corpus(40))
    assert Tokenizer.from_gguf(arrays).encode(text) == Tokenizer.from_gguf(lists).encode(text)


def _without(key):
    return {name: value for name, value in byte_level_metadata("smollm").items() if name != f"tokenizer.ggml.{key}"}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "rwkv"}, UnsupportedModelError, "'rwkv'"),
        ({"pre": "kimi-k2"}, UnsupportedModelError, "'kimi-k2'.*smollm"),
        ({"model": None}, ModelFileError, "model is missing"),
        ({"tokens": None}, ModelFileError, "tokens is missing"),
        ({"tokens": ["a", 3]}, ModelFileError, "tokens should be a list of strings"),
        ({"merges": None}, ModelFileError, "merges is missing"),
        ({"merges": ["a b c"]}, ModelFileError, "'a b c'"),
        ({"merges": ["zzzz qqqq"]}, ModelFileError, "merges does not fit"),
        ({"token_type": [1, 2]}, ModelFileError, r"token_type should be 801 numbers.*\(2,\)"),
        ({"eos_token_id": 801}, ModelFileError, "eos_token_id is 801"),
        ({"eos_token_id": "</s>"}, ModelFileError, "eos_token_id is '</s>'"),
        ({"add_bos_token": "yes"}, ModelFileError, "add_bos_token should be true or false"),
        ({"bos_token_id": None, "add_bos_token": True}, ModelFileError, "bos_token_id is missing"),
    ],
)
def test_broken_gguf_metadata_is_named(change, error, says):
    metadata = byte_level_metadata("smollm") | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(error, match=f"model.gguf: .*{says}"):
        Tokenizer.from_gguf(metadata, source="model.gguf")


def test_broken_sentencepiece_metadata_is_named():
    good = sentencepiece_metadata(prefix=False)
    scores, tokens = good["tokenizer.ggml.scores"], good["tokenizer.ggml.tokens"]
    for change, says in [
        ({"scores": None}, "scores is missing"),
        ({"scores": [float("nan"), *scores[1:]]}, "scores holds NaN"),
        ({"tokens": [*tokens[:-1], "<b>"]}, "tokens holds '<b>' twice"),
    ]:
        with pytest.raises(ModelFileError, match=says):
            Tokenizer.from_gguf(good | {f"tokenizer.ggml.{key}": value for key, value in change.items()})
    with pytest.raises(UnsupportedModelError, match="'qwen2'"):
        Tokenizer.from_gguf(good | {"tokenizer.ggml.pre": "qwen2"})


def test_a_file_that_does_not_name_its_pre_tokenizer_gets_gpt2s_with_a_warning():
    with pytest.warns(UserWarning, match="old.gguf.*pre-tokenizer"):
        tokenizer = Tokenizer.from_gguf(_without("pre"), source="old.gguf")
    assert tokenizer.encode("it's 1234") == byte_level("gpt-2").encode("it's 1234").ids


def test_what_is_not_text_or_not_an_id_is_refused(smol):
    with pytest.raises(RequestError, match="surrogate"):
        smol.encode("a\ud800")
    with pytest.raises(RequestError, match="bytes"):
        smol.encode(b"a")
    for call in (lambda: smol.decode([-1]), lambda: smol.stream().push(-1), lambda: smol.token_text(-1)):
        with pytest.raises(RequestError, match="0 or more"):
            call()
    assert smol.decode(np.array([10**6, 2])) == ""


def test_importing_the_tokenizer_is_light():
    code = "import sys, pdx.tokenizer; print({'jax', 'tokenizers', 'jinja2', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
