"""Token for token against transformers and sentencepiece, on small tokenizers trained here."""

from __future__ import annotations

import json
import re

import pytest

from pdx.tokenizer import Tokenizer
from tests.support.corpus import CODE, SCRIPTS, WORDS, corpus
from tests.support.tokenizer_fixtures import CHATML, SPECIAL, USER_DEFINED, byte_level, byte_level_metadata

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.parity

MARKED = (*SPECIAL, USER_DEFINED)
COUNT = 4000


def compare(ours: Tokenizer, theirs, texts: list[str]) -> int:
    """Encodings and decodings equal for every text, as single calls and as streams; the number of tokens."""
    tokens = 0
    for text, expected in zip(texts, theirs(texts)["input_ids"], strict=True):
        ids = ours.encode(text)
        assert ids == expected, text
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            decoded = theirs.decode(expected, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special=skip) == decoded, text
            stream = ours.stream(skip_special=skip)
            assert "".join(map(stream.push, ids)) + stream.flush() == decoded, text
        tokens += len(ids)
    return tokens


def report(measured, name: str, texts: list[str], tokens: int) -> None:
    measured(f"tokenizer {name}: {len(texts)} strings, {tokens} tokens, all equal")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_directory(pre, tmp_path, measured):
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(byte_level(pre).to_str())
    if pre == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )
    saved.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_hf_dir(tmp_path)
    texts = corpus(COUNT, special=MARKED)
    report(measured, f"directory, {pre}", texts, compare(ours, theirs, texts))
    assert (ours.bos_id, ours.vocab_size) == (theirs.bos_token_id, len(theirs))
    assert theirs.eos_token_id in ours.eos_ids
    chat = [{"role": "user", "content": "Hi, 漢字"}]
    assert ours.encode_chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def test_unigram_directory(tmp_path, measured):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(_training_text(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    saved.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = corpus(COUNT, special=special)
    report(measured, "directory, Unigram", texts, compare(Tokenizer.from_hf_dir(tmp_path), theirs, texts))


_X = {"content": "<x>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
_THINK = _X | {"content": USER_DEFINED, "lstrip": False}


# The last ones stand in tokenizer_config.json only.
_CONFIGS = [
    {"extra_special_tokens": [USER_DEFINED]},
    {"additional_special_tokens": [USER_DEFINED, "<x>"]},
    {"extra_special_tokens": {"image_token": "<x>"}},
    {"eos_token": USER_DEFINED},
    {"eos_token": "<x>"},
    {"eos_token": _X | {"__type": "AddedToken"}},
    {"image_token": "<x>"},
    {"additional_special_tokens": ["<x>"], "added_tokens_decoder": {"801": _X | {"special": True}}},
    {"added_tokens_decoder": {"3": _THINK | {"special": True}}},
    {"added_tokens_decoder": {"3": _THINK | {"special": False, "rstrip": True}}},
    {"added_tokens_decoder": {"801": _X | {"special": False}}},
    {"add_bos_token": True, "add_eos_token": True, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
]
_CASES = [(config, "tokenizer_config.json") for config in _CONFIGS]
_CASES += [(config, "special_tokens_map.json") for config in _CONFIGS[:7]]


@pytest.mark.parametrize(("config", "file"), _CASES)
def test_special_tokens_of_a_configuration(config, file, tmp_path):
    byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(base))
    (tmp_path / file).write_text(json.dumps(base | config))
    ours, theirs = Tokenizer.from_hf_dir(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    compare(ours, theirs, ["a <think> b  <x> <|im_end|> c", *corpus(300, special=(*MARKED, "<x>", " <x> "))])
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == len(theirs)


@pytest.fixture(scope="module")
def model_proto(tmp_path_factory):
    """A SentencePiece BPE model with byte fallback, trained by sentencepiece, as bytes and as a file."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [line for text in _training_text() for line in text.split("\n") if line and "\0" not in line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=2000,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<b>", "\u2581\u2581", "\u2581\u2581\u2581"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_sentencepiece_directory(model_proto, tmp_path, measured):
    converted = transformers.LlamaTokenizer.from_pretrained(model_proto.parent)
    converted.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = corpus(COUNT, special=["<s>", "</s>"])
    report(measured, "directory, SentencePiece", texts, compare(Tokenizer.from_hf_dir(tmp_path), theirs, texts))


def _gguf_metadata(path) -> dict:
    """What a GGUF file says of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    spec = {"tokens": [], "scores": [], "token_type": []}
    for piece in proto.pieces:
        user_defined = piece.type == 4
        spec["tokens"].append(piece.piece.replace("\u2581", " ") if user_defined else piece.piece)
        spec["scores"].append(piece.score)
        spec["token_type"].append(piece.type)
    spec |= {"model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in spec.items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_equals_sentencepiece_itself(model_proto, prefix, measured):
    from sentencepiece import sentencepiece_model_pb2

    metadata = _gguf_metadata(model_proto) | {"tokenizer.ggml.add_space_prefix": prefix}
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_proto.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = prefix
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ours = Tokenizer.from_gguf(metadata)
    # Published conversions look for user-defined pieces in the raw text; see the tests of the rules.
    texts = [text for text in corpus(COUNT) if not re.search("\u2581\u2581|<b>|</?s>|<unk>", text)]
    tokens = 0
    for text in texts:
        ids = ours.encode(text, add_special=False)
        assert ids == processor.encode(text), text
        assert ours.decode(ids) == processor.decode(ids)
        tokens += len(ids)
    report(measured, f"GGUF against sentencepiece, prefix {prefix}", texts, tokens)


@pytest.mark.parametrize("template", ["chatml", "llama", "tools"])
def test_chat_templates(template, tmp_path):
    source = {
        "chatml": CHATML,
        "llama": (
            "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] "
            "| trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
            "{%- for m in messages %}\n{%- if loop.index0 > 3 %}{% break %}{% endif %}\n[{{ m.role }}] "
            "{{- system if loop.first }} {% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}"
            "{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"
        ),
        "tools": (
            "{% for tool in tools or [] %}\n{{ tool | tojson(indent=2) }}\n{% endfor %}"
            "{% set ns = namespace(last=none) %}{% for m in messages %}{% set ns.last = m %}{% endfor %}"
            "{{ ns.last.content }}{{ ns.last.tool_calls is defined }}{{ documents }}{{ extra | default('no') }}"
        ),
    }[template]
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level("gpt-2"), bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=source
    )
    saved.save_pretrained(tmp_path)
    ours, theirs = Tokenizer.from_hf_dir(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    system = {"role": "system", "content": " Be <brief> & 'kind'.\n"}
    user, answer = {"role": "user", "content": "1 < 2? 漢字 é"}, {"role": "assistant", "content": "Yes.", "name": None}
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"x": [1, None]}}}]
    for messages in ([user], [system, user], [system, user, answer, user, answer, user]):
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt, "tools": tools, "extra": "yes"}
            expected = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert ours.apply_chat_template(messages, **options) == expected
            ids = theirs.apply_chat_template(messages, tokenize=True, **options)["input_ids"]
            assert ours.encode_chat(messages, **options) == ids


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_equals_the_hf_directory_of_the_same_tokenizer(pre, tmp_path, measured):
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(pre), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    texts = corpus(COUNT, seed=1, special=MARKED)
    tokens = compare(Tokenizer.from_gguf(byte_level_metadata(pre)), saved, texts)
    report(measured, f"GGUF, {pre}", texts, tokens)


def _training_text() -> list[str]:
    return [*SCRIPTS.values(), *CODE, *WORDS, *corpus(400, seed=99)]
