"""Hugging Face directories whose tokens and templates lie beside `tokenizer.json`."""

from __future__ import annotations

import json

import pytest

from pdx.errors import ModelFileError
from pdx.tokenizer import Tokenizer
from tests.support.tokenizer_fixtures import CHATML, SPECIAL, byte_level

SIZE = byte_level("gpt-2").get_vocab_size()
HI = [{"role": "user", "content": "x"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2]}

CASES = {
    "added_tokens.json": ({}, {"added_tokens.json": {"<x>": SIZE, "<y>": SIZE + 1}}),
    "added_tokens.json, not in order": ({}, {"added_tokens.json": {"<y>": SIZE + 1, "<x>": SIZE}}),
    "added_tokens.json, named special": ({"extra_special_tokens": ["<x>"]}, {"added_tokens.json": {"<x>": SIZE}}),
    "added_tokens.json, known already": ({}, {"added_tokens.json": {SPECIAL[1]: 1, "<x>": SIZE}}),
    "added_tokens.json beside a map": (
        {},
        {
            "added_tokens.json": {"<x>": SIZE, "<y>": SIZE + 1},
            "special_tokens_map.json": {"extra_special_tokens": ["<x>"], "eos_token": SPECIAL[0]},
        },
    ),
    "added_tokens_decoder rules": (
        {"added_tokens_decoder": {str(SIZE): {"content": "<x>", "special": True, "normalized": False}}},
        {"added_tokens.json": {"<y>": SIZE + 1}, "special_tokens_map.json": {"bos_token": "<y>"}},
    ),
    "decoder, lstrip and rstrip": (
        {
            "added_tokens_decoder": {
                str(SIZE): {
                    "content": "<x>",
                    "lstrip": True,
                    "rstrip": True,
                    "special": True,
                    "normalized": False,
                    "single_word": False,
                }
            }
        },
        {},
    ),
    "decoder, single_word and not special": (
        {
            "added_tokens_decoder": {
                str(SIZE): {
                    "content": "xy",
                    "single_word": True,
                    "normalized": True,
                    "lstrip": False,
                    "rstrip": False,
                    "special": False,
                }
            }
        },
        {},
    ),
    "additional_special_tokens": ({"additional_special_tokens": ["<x>", "<y>"]}, {}),
    "extra_special_tokens, objects": (
        {
            "extra_special_tokens": [
                {
                    "__type": "AddedToken",
                    "content": "<x>",
                    "lstrip": True,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                    "special": True,
                }
            ]
        },
        {},
    ),
    "extra_special_tokens, names": ({"extra_special_tokens": {"image_token": "<x>", "video_token": "<y>"}}, {}),
    "a name of its own": ({"image_token": "<x>"}, {}),
    "special_tokens_map.json, objects": (
        {},
        {
            "special_tokens_map.json": {
                "pad_token": {
                    "content": "<x>",
                    "lstrip": False,
                    "rstrip": True,
                    "normalized": False,
                    "single_word": False,
                }
            }
        },
    ),
    "split_special_tokens": ({"split_special_tokens": True}, {}),
}
TEXTS = ["a<x>b", "a <x> b", "<x><y>", f"a{SPECIAL[1]}b {SPECIAL[2]}", "axyb xy", "<y >", ""]


def directory(path, config, files):
    byte_level("gpt-2").save(str(path / "tokenizer.json"))
    for name, data in {"tokenizer_config.json": CONFIG | config, **files}.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(case, tmp_path):
    from transformers import AutoTokenizer

    path = directory(tmp_path, *CASES[case])
    theirs, ours = AutoTokenizer.from_pretrained(path), Tokenizer.from_hf_dir(path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        for skip in (True, False):
            ids = theirs(text)["input_ids"]
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["extra_special_tokens", "additional_special_tokens"])
def test_tokens_of_added_tokens_json_are_tokens(name, tmp_path):
    files = {"added_tokens.json": {"<x>": SIZE, "<y>": SIZE + 1}, "special_tokens_map.json": {name: ["<x>"]}}
    tokenizer = Tokenizer.from_hf_dir(directory(tmp_path, {}, files))
    assert tokenizer.encode("a<x>b<y>")[1::2] == [SIZE, SIZE + 1]
    assert tokenizer.special_ids >= {SIZE}
    assert SIZE + 1 not in tokenizer.special_ids, "only what is named special is"


def test_split_special_tokens_holds_for_texts_and_not_for_the_template(tmp_path):
    path = directory(tmp_path, {"split_special_tokens": True, "chat_template": CHATML}, {})
    tokenizer = Tokenizer.from_hf_dir(path)
    assert not set(tokenizer.encode(f"a{SPECIAL[2]}")) & tokenizer.special_ids
    assert tokenizer.encode(f"a{SPECIAL[2]}", parse_special=True)[-1] == 2
    assert tokenizer.encode_chat(HI)[0] == 1, "the template's own tokens stay tokens"
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    assert saved.encode(f"a{SPECIAL[2]}") == tokenizer.encode(f"a{SPECIAL[2]}")
    settings = tmp_path / "saved" / "pdx_tokenizer.json"
    old = json.loads(settings.read_text())
    del old["split_special_tokens"], old["control"]
    settings.write_text(json.dumps(old))
    assert Tokenizer.load(tmp_path / "saved").encode(SPECIAL[2]) == [2], "a checkpoint of an earlier version loads"


@pytest.mark.parametrize(
    ("config", "files", "says"),
    [
        ({}, {"added_tokens.json": {"<x>": SIZE + 7}}, f"'<x>' is listed as token {SIZE + 7}"),
        ({}, {"added_tokens.json": {SPECIAL[1]: 2}}, "listed as token 2"),
        ({}, {"added_tokens.json": {"<x>": "a"}}, "added_tokens.json gives '<x>' the id 'a'"),
        ({}, {"added_tokens.json": ["<x>"]}, "added_tokens.json: expected a JSON object"),
        ({}, {"added_tokens.json": "{"}, "added_tokens.json: cannot be read as JSON"),
        ({"extra_special_tokens": "<x>"}, {}, "extra_special_tokens is '<x>', neither a list"),
        ({"additional_special_tokens": [3]}, {}, "malformed special tokens"),
        ({"additional_special_tokens": [{"lstrip": True}]}, {}, "malformed special tokens"),
        ({"additional_special_tokens": [""]}, {}, "'' is not a token"),
        ({"added_tokens_decoder": [1]}, {}, "malformed special tokens"),
        ({"added_tokens_decoder": {"a": {"content": "<x>"}}}, {}, "malformed special tokens"),
        ({"added_tokens_decoder": {"1": "<x>"}}, {}, "'<x>' is listed as token 1"),
        ({"split_special_tokens": "yes"}, {}, "split_special_tokens is 'yes'"),
        ({"chat_template": {"default": 3}}, {}, "'default' is not a string"),
        ({"chat_template": 3}, {}, "malformed chat_template"),
        ({}, {"generation_config.json": {"eos_token_id": [True]}}, r"token id in .* is \[True\]"),
        ({}, {"config.json": {"pad_token_id": -2}}, "token id in .* is -2"),
    ],
)
def test_what_is_malformed_is_named(config, files, says, tmp_path):
    with pytest.raises(ModelFileError, match=says):
        Tokenizer.from_hf_dir(directory(tmp_path, config, files))


@pytest.mark.parametrize("names", [["vocab.json", "merges.txt"], ["tokenizer.model"], ["tekken.json"], []])
def test_a_directory_without_tokenizer_json_says_what_to_do(names, tmp_path):
    for name in names:
        (tmp_path / name).write_text("{}")
    says = rf"tokenizer\.json does not exist{', only ' if names else ''}{' and '.join(names)}\. .*save_pretrained"
    with pytest.raises(ModelFileError, match=says):
        Tokenizer.from_hf_dir(tmp_path)


@pytest.mark.parametrize(
    ("inline", "files", "plain", "with_tools"),
    [
        ([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}], {}, "D", "T"),
        ({"default": "D", "tool_use": "T"}, {}, "D", "T"),
        ({"rag": "R"}, {}, "R", "R"),
        ("I", {"additional_chat_templates/tool_use.jinja": "T"}, "I", "T"),
        ("I", {"chat_template.jinja": "J"}, "J", "J"),
        ({"default": "D", "tool_use": "T"}, {"chat_template.jinja": "J"}, "J", "T"),
        (None, {"chat_template.json": {"chat_template": "P"}}, "P", "P"),
        (None, {"chat_template.json": {"chat_template": {"default": "P", "tool_use": "T"}}}, "P", "T"),
        ("I", {"chat_template.json": {"chat_template": "P"}}, "I", "I"),
        (
            None,
            {"additional_chat_templates/default.jinja": "A", "additional_chat_templates/tool_use.jinja": "T"},
            "A",
            "T",
        ),
    ],
)
def test_which_template_a_chat_takes(inline, files, plain, with_tools, tmp_path):
    tokenizer = Tokenizer.from_hf_dir(directory(tmp_path, {"chat_template": inline}, files))
    assert tokenizer.apply_chat_template(HI) == plain
    assert tokenizer.apply_chat_template(HI, tools=TOOLS) == with_tools
