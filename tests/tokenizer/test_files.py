"""Tokenizers from Hugging Face directories and from saved checkpoints; broken files are named."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from pdx.errors import ModelFileError
from pdx.tokenizer import Tokenizer
from tests.support.corpus import corpus
from tests.support.tokenizer_fixtures import (
    SPECIAL,
    USER_DEFINED,
    byte_level,
    byte_level_metadata,
    sentencepiece_metadata,
)

MARKED = (*SPECIAL, USER_DEFINED)


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata("smollm"))


@pytest.fixture
def hf_dir(tmp_path):
    """A directory as published: Llama 3's post-processor, a file each for configuration and generation."""
    backend = Backend.from_str(byte_level("llama-bpe").to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", backend.token_to_id("<|im_start|>"))]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    write = {
        "tokenizer_config.json": {
            "bos_token": "<|im_start|>",
            "eos_token": {"content": "<|endoftext|>", "lstrip": False},
            "chat_template": "from the configuration",
            "add_bos_token": False,
        },
        "generation_config.json": {"eos_token_id": [0, 7], "pad_token_id": 2},
    }
    for name, data in write.items():
        (tmp_path / name).write_text(json.dumps(data), encoding="utf-8")
    return tmp_path


def test_hf_directory_obeys_its_post_processor(hf_dir):
    tokenizer = Tokenizer.from_hf_dir(hf_dir)
    bare = byte_level("llama-bpe").encode("Hi 123").ids
    assert tokenizer.encode("Hi 123") == [1, *bare]
    assert tokenizer.encode("Hi 123", add_special=False) == bare
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids) == (1, 2, {0, 2, 7})
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "from the configuration"


def test_hf_directory_makes_named_tokens_special_and_adds_missing_ones(hf_dir):
    size = Tokenizer.from_hf_dir(hf_dir).vocab_size
    config = {
        "eos_token": USER_DEFINED,
        "additional_special_tokens": ["<extra>"],
        "added_tokens_decoder": {str(size): {"content": "<extra>", "special": True, "normalized": False}},
    }
    (hf_dir / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_hf_dir(hf_dir)
    assert tokenizer.decode(tokenizer.encode(f"a{USER_DEFINED}<extra>b")) == "ab"
    assert tokenizer.token_id("<extra>") == size in tokenizer.special_ids
    config["added_tokens_decoder"] = {str(size + 5): {"content": "<extra>"}}
    (hf_dir / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=r"tokenizer_config.json.*'<extra>'"):
        Tokenizer.from_hf_dir(hf_dir)


def test_hf_template_files_come_before_the_configuration(hf_dir):
    (hf_dir / "chat_template.jinja").write_text("from the file")
    more = hf_dir / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ tools | length }} tools")
    tokenizer = Tokenizer.from_hf_dir(hf_dir)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages) == "from the file"
    assert tokenizer.apply_chat_template(messages, tools=[{"name": "f"}]) == "1 tools"


def test_truncation_and_padding_of_the_file_are_not_obeyed(tmp_path):
    backend = Backend.from_str(byte_level("gpt-2").to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_hf_dir(tmp_path)
    text = "a b c d e f g h i j"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.filterwarnings("ignore:the prompt begins with")  # the corpus has such texts
@pytest.mark.parametrize("kind", ["gguf bytes", "gguf pieces", "directory"])
def test_saved_equals_loaded(kind, tmp_path, hf_dir):
    makers = {
        "gguf bytes": lambda: Tokenizer.from_gguf(byte_level_metadata("qwen2")),
        "gguf pieces": lambda: Tokenizer.from_gguf(sentencepiece_metadata(prefix=True)),
        "directory": lambda: Tokenizer.from_hf_dir(hf_dir),
    }
    before = makers[kind]()
    before.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["pdx_tokenizer.json", "tokenizer.json"]
    after = Tokenizer.load(tmp_path / "saved")
    for name in ("bos_id", "pad_id", "eos_ids", "vocab_size", "special_ids", "has_chat_template"):
        assert getattr(after, name) == getattr(before, name), name
    for text in corpus(300, special=MARKED):
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    if kind != "gguf pieces":
        chat = [{"role": "user", "content": "x"}]
        assert after.encode_chat(chat) == before.encode_chat(chat)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "model": {}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": [1]}'),
        ("tokenizer_config.json", '{"eos_token": {"lstrip": true}}'),
        ("generation_config.json", '{"eos_token_id": "</s>"}'),
    ],
)
def test_broken_hf_files_are_named(hf_dir, name, text):
    (hf_dir / name).unlink() if text is None else (hf_dir / name).write_text(text)
    with pytest.raises(ModelFileError, match=name):
        Tokenizer.from_hf_dir(hf_dir)


def test_broken_checkpoint_files_are_named(tmp_path, smol):
    with pytest.raises(ModelFileError, match=r"pdx_tokenizer.json.*convert"):
        Tokenizer.load(tmp_path)
    smol.save(tmp_path)
    (tmp_path / "pdx_tokenizer.json").write_text('{"format": 99}')
    with pytest.raises(ModelFileError, match="format 99"):
        Tokenizer.load(tmp_path)
    smol.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
