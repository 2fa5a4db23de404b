"""Each way of splitting text that a GGUF file may name, against pieces that another engine of patterns found."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
from tokenizers import Regex, pre_tokenizers

from pdx.errors import UnsupportedModelError
from pdx.tokenizer import Tokenizer, pretokenize
from pdx.tokenizer.pretokenize import PRE_TOKENIZERS
from tests.golden.make_pre_tokenizers import GOLDEN, TEXTS
from tests.support.tokenizer_fixtures import byte_level, byte_level_metadata

LENGTHS = json.loads(GOLDEN.read_text(encoding="ascii"))
# Names that are split as another: a model that was made on, or converted as, the other's tokenizer.
SAME = {
    "gpt-2": ["phi-2", "jais", "trillion", "granite-docling", "olmo", "mpt", "exaone4", "mellum"],
    "smollm": ["starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
    "llama-bpe": ["llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"],
    "qwen2": ["deepseek-r1-qwen", "megrez", "hunyuan", "stablelm2", "grok-2"],
    "gpt-4o": ["llama4", "kanana2", "minimax-m2"],
    "tiny_aya": ["cohere2moe"],
    "deepseek-v3": ["hunyuan-dense", "joyai-llm"],
    "bailingmoe": ["llada-moe"],
    "bloom": ["poro-chat", "gpt3-finnish"],
}
NAMES = [(name, name) for name in LENGTHS] + [(other, name) for name, others in SAME.items() for other in others]


@pytest.mark.parametrize(("name", "golden"), NAMES)
def test_pieces_are_those_of_the_published_patterns(name, golden):
    steps = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in PRE_TOKENIZERS[name].patterns]
    for text, lengths in zip(TEXTS, LENGTHS[golden], strict=True):
        pieces = pre_tokenizers.Sequence(steps).pre_tokenize_str(text)
        assert [end - start for _, (start, end) in pieces] == lengths, text


def test_the_golden_pieces_tell_the_patterns_apart():
    distinct = {json.dumps(rows) for name, rows in LENGTHS.items() if name != "bailingmoe"}
    assert len(distinct) == len(LENGTHS) - 1
    assert LENGTHS["bailingmoe"] == LENGTHS["qwen2"], "spelled in other ways, they split alike"


def test_deepseeks_class_of_letters_is_of_cased_ones():
    letters = re.compile(pretokenize._DEEPSEEK_LETTERS.removeprefix("\\s?").removesuffix("+"))
    found = [c for c in map(chr, range(0x20000)) if letters.fullmatch(c)]
    assert len(found) > 2500
    assert {unicodedata.category(c) for c in found} <= {"Lu", "Ll", "Lt"}


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_a_file_of_every_name_loads_and_loses_no_text(name):
    metadata = byte_level_metadata("gpt-2") | {"tokenizer.ggml.pre": name}
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in TEXTS:
        same = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[name].nfc else text
        assert tokenizer.decode(tokenizer.encode(text)) == same


def test_bos_and_whole_pieces_go_with_the_name():
    for name, opening in (("falcon3", [1]), ("tekken", [1]), ("smaug-bpe", []), ("qwen2", [])):
        metadata = byte_level_metadata("llama-bpe") | {"tokenizer.ggml.pre": name}
        del metadata["tokenizer.ggml.add_bos_token"]
        assert Tokenizer.from_gguf(metadata).encode("")[:1] == opening
    whole = byte_level("llama-bpe").token_to_id("ĠCamelot")
    for name, is_whole in (("falcon3", True), ("minicpm5", True), ("smaug-bpe", False)):
        ids = Tokenizer.from_gguf(byte_level_metadata("gpt-2") | {"tokenizer.ggml.pre": name}).encode(" Camelot")
        assert (whole in ids) is is_whole


@pytest.mark.parametrize("name", ["kimi-k2", "afmoe", "superbpe", "gemma4", "", "Qwen2"])
def test_an_unknown_name_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=f"pre is '{name}'.*deepseek-r1-qwen.*Hugging Face directory"):
        Tokenizer.from_gguf(byte_level_metadata("gpt-2") | {"tokenizer.ggml.pre": name})
