"""Chats through the model's template: what templates expect, what the sandbox forbids, what users get wrong."""

from __future__ import annotations

import datetime

import pytest

from pdx.errors import ModelFileError, RequestError
from pdx.tokenizer import Tokenizer
from tests.support.tokenizer_fixtures import CHATML, byte_level_metadata

USER = {"role": "user", "content": "Hi"}


def make(template: str | None, **fields) -> Tokenizer:
    metadata = byte_level_metadata("smollm") | {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    metadata.pop("tokenizer.chat_template")
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return Tokenizer.from_gguf(metadata, source="model.gguf")


def test_a_prompt_with_and_without_the_start_of_an_answer():
    tokenizer = make(CHATML)
    assert tokenizer.apply_chat_template([USER]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template([USER], add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_chat_ids_hold_one_bos():
    tokenizer = make("{{ bos_token }}" + CHATML, add_bos_token=True, bos_token_id=0)
    ids = tokenizer.encode_chat([USER])
    assert ids[:2] == [0, 1]
    assert ids.count(0) == 1
    assert tokenizer.encode("Hi")[0] == 0
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.apply_chat_template([USER])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if true %}\n  x\n{% endif %}\n", "  x\n"),
        ("    {% for m in messages %}\n{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
        ("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ nothing }}", "<|im_start|><|im_end|><|endoftext|>"),
        ("{{ {'a': '<é&\\'>'} | tojson }}", '{"a": "<é&\'>"}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        ("{{ tools[0].name }} {{ enable_thinking }} {{ documents is none }}", "f False True"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ messages[0] | length }} {{ messages[0].tool_calls is defined }}", "2 False"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
    ],
)
def test_templates_find_what_published_ones_use(template, expected):
    messages = [USER | {"tool_calls": None}]
    assert make(template).apply_chat_template(messages, tools=[{"name": "f"}], enable_thinking=False) == expected


def test_a_named_template_is_taken_for_tools():
    metadata = byte_level_metadata("smollm")
    metadata |= {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "with tools"}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.apply_chat_template([USER]) == "plain"
    assert tokenizer.apply_chat_template([USER], tools=[{"name": "f"}]) == "with tools"
    metadata.pop("tokenizer.chat_template")
    assert Tokenizer.from_gguf(metadata).apply_chat_template([USER]) == "with tools"
    metadata["tokenizer.chat_template.other"] = "x"
    with pytest.raises(ModelFileError, match="other, tool_use but none named 'default'"):
        Tokenizer.from_gguf(metadata).apply_chat_template([USER])


def test_a_model_without_a_template_says_what_to_do():
    tokenizer = make(None)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match=r"model\.gguf has no chat template.*chat_template\.jinja"):
        tokenizer.encode_chat([USER])


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("Hi", "must be a list"),
        (USER, "must be a list"),
        ([], "messages is empty"),
        (["Hi"], r"messages\[0\] must be an object"),
        ([USER, {"content": "x"}], r"messages\[1\] needs a role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] needs a role"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be text"),
        ([{"role": "user", "content": [object()]}], r"messages\[0\]\.content holds a object"),
    ],
)
def test_malformed_messages_are_named(messages, says):
    with pytest.raises(RequestError, match=says):
        make(CHATML).apply_chat_template(messages)


@pytest.mark.parametrize(
    ("template", "error", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", RequestError, r"model\.gguf refuses.*roles must alternate"),
        ("{{ messages[0].content + 3 }}", RequestError, "refuses"),
        ("{{ messages[7].content }}", RequestError, "refuses"),
        ("\n{% if %}", ModelFileError, r"model\.gguf: line 2 of the chat template"),
        ("{{ messages.append(1) }}", ModelFileError, "sandbox"),
        ("{{ ''.__class__.__mro__ }}", ModelFileError, "sandbox"),
        ("{{ raise_exception.__globals__['json'] }}", ModelFileError, "sandbox"),
    ],
)
def test_templates_that_refuse_break_or_escape(template, error, says):
    with pytest.raises(error, match=says):
        make(template).apply_chat_template([USER])


def test_a_template_sees_only_plain_values():
    class Text(str):
        def secret(self):
            return "seen"

    with pytest.raises(RequestError, match="holds a Text"):
        make("{{ messages[0].content.secret() }}").apply_chat_template([{"role": "user", "content": Text("x")}])
    with pytest.raises(RequestError, match="tools holds a function"):
        make(CHATML).apply_chat_template([USER], tools=[lambda: None])
