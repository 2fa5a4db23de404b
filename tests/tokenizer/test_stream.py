"""Streaming: pieces of text as tokens come, in sum the decoded whole, never half a character."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Regex, decoders, models
from tokenizers import Tokenizer as Backend

from pdx.errors import UnsupportedModelError
from pdx.tokenizer import Tokenizer
from pdx.tokenizer.stream import DecodeRule, StreamDecoder
from tests.support.corpus import EMOJI, SCRIPTS, corpus
from tests.support.tokenizer_fixtures import SPECIAL, byte_level_metadata, sentencepiece_metadata


def _metaspace(tmp_path, scheme: str) -> Tokenizer:
    pieces = [("<unk>", 0.0), *((piece, -float(i)) for i, piece in enumerate(["▁", "▁a", "a", "b▁c", "▁▁", "é"], 1))]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_hf_dir(tmp_path)


@pytest.fixture(params=["bytes", "pieces", "pieces with prefix", "metaspace always", "metaspace never"])
def tokenizer(request, tmp_path) -> Tokenizer:
    if request.param == "bytes":
        return Tokenizer.from_gguf(byte_level_metadata("smollm"))
    if request.param.startswith("metaspace"):
        return _metaspace(tmp_path, request.param.split()[1])
    return Tokenizer.from_gguf(sentencepiece_metadata(prefix="prefix" in request.param))


def _streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True) -> str:
    stream = tokenizer.stream(skip_special=skip_special)
    return "".join(stream.push(i) for i in ids) + stream.flush()


@pytest.mark.filterwarnings("ignore:the prompt begins with")  # the corpus has such texts
def test_the_sum_of_the_stream_is_the_decoded_text(tokenizer):
    for text in corpus(500, special=SPECIAL):
        ids = tokenizer.encode(text)
        assert _streamed(tokenizer, ids) == tokenizer.decode(ids), text


def test_the_sum_of_the_stream_is_the_decoded_text_for_any_ids(tokenizer):
    rng = random.Random(7)
    broken = 0
    for _ in range(1500):
        # Low ids are special tokens and bytes: that is where characters break.
        top = rng.choice([12, 280, tokenizer.vocab_size + 9])
        ids = [rng.randrange(top) for _ in range(rng.randint(0, 24))]
        for skip in (True, False):
            text = tokenizer.decode(ids, skip_special=skip)
            assert _streamed(tokenizer, ids, skip_special=skip) == text, ids
            broken += "\ufffd" in text
    assert broken > 500 or tokenizer.vocab_size < 20, "the ids should hold bytes that are no characters"


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_no_half_characters(kind):
    metadata = byte_level_metadata("gpt-2") if kind == "bytes" else sentencepiece_metadata(prefix=False)
    tokenizer = Tokenizer.from_gguf(metadata)
    waited = 0
    for text in [*EMOJI, SCRIPTS["others"], SCRIPTS["chinese"], "naïve 𝄞 x"]:
        stream, shown = tokenizer.stream(), ""
        for token_id in tokenizer.encode(text, add_special=False):
            new = stream.push(token_id)
            waited += new == ""
            shown += new
            assert text.startswith(shown)
        assert shown + stream.flush() == text
    assert waited > 50


def test_characters_come_as_soon_as_they_are_whole():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("gpt-2"))
    stream = tokenizer.stream()
    ids = [tokenizer.token_id(char) for char in "ðŁĺĢ"]  # the four bytes of U+1F600
    assert [stream.push(i) for i in ids] == ["", "", "", "😀"]
    assert [stream.push(i) for i in ids[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_a_run_of_byte_pieces_is_judged_as_a_whole():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(prefix=False))
    good = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    word = tokenizer.encode("a", add_special=False)
    stream = tokenizer.stream()
    assert [stream.push(i) for i in good + word] == ["", "", "éa"]
    # One stray byte costs the whole run, as in the decoder of the tokenizers library.
    assert [stream.push(i) for i in good + good[:1] + word] == ["", "", "", "\ufffd\ufffd\ufffda"]
    assert stream.flush() == ""


def test_flush_makes_the_decoder_new():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(prefix=True))
    ids = tokenizer.encode("the the")
    stream = tokenizer.stream()
    for _ in range(2):
        assert "".join(stream.push(i) for i in ids) + stream.flush() == "the the"


def test_the_work_for_a_token_does_not_grow():
    looked_up = []
    rule = DecodeRule(byte_level=True)
    stream = StreamDecoder(rule, lambda i: looked_up.append(i) or "<s>Ġa"[3 * (i != 5) :], frozenset({"<s>Ġa"}))
    assert "".join(stream.push(i) for i in range(1000)) == " a" * 999
    assert looked_up == list(range(1000))


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.Replace(Regex("_+"), " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
)
def test_a_decoder_that_cannot_stream_says_so(decoder, tmp_path):
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.decoder = decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_hf_dir(tmp_path)
    assert tokenizer.decode([0, 1]) in ("a b", "ab")
    assert tokenizer.token_text(1) == "b"
    with pytest.raises(UnsupportedModelError, match="stream"):
        tokenizer.stream()


def test_fixtures_stream_by_more_than_one_rule():
    kinds = set()
    for metadata in (byte_level_metadata("gpt-2"), sentencepiece_metadata(prefix=True)):
        backend = json.loads(Tokenizer.from_gguf(metadata)._backend.to_str())
        kinds.add(DecodeRule.from_decoder(backend["decoder"]))
    assert {rule.byte_level for rule in kinds} == {True, False}
    assert {rule.strip for rule in kinds} == {("", 0), (" ", 1)}
