"""Chats as clients of OpenAI's API write them, through templates that read content and calls in different ways."""

import json

import pytest

from pdx.errors import RequestError
from pdx.tokenizer.messages import check_messages
from tests.support.tokenizer_fixtures import tokenizer_of

PARTS = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
# How published templates take content: added to a text, printed, only as text (Qwen 3), either way, only in parts.
ADDS = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
PRINTS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXT_ONLY = "{% for m in messages %}<{{ m.role }}>{{ m.content if m.content is string else '' }}{% endfor %}"
LOOP = "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}"
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    + LOOP
    + "{% endif %}{% endfor %}"
)
PARTS_ONLY = "{% for m in messages %}<{{ m.role }}>" + LOOP + "{% endfor %}"
DUMPS = "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}"

CALLS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for t in m.tool_calls or [] %}"
TOJSON = CALLS + "{{ t.function.name }}:{{ t.function.arguments | tojson }}{% endfor %}{% endfor %}"
ITEMS = CALLS + "{% for k, v in t.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"
JOINS = CALLS + "{{ t.function.name + ':' + t.function.arguments }}{% endfor %}{% endfor %}"  # DeepSeek
SHOWS = CALLS + "{{ t.function.name }}:{{ t.function.arguments }}{% endfor %}{% endfor %}"


def render(template, messages):
    return tokenizer_of(template).apply_chat_template(messages)


def call(arguments, **message):
    function = {"name": "f", "arguments": arguments}
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}], **message},
    ]


@pytest.mark.parametrize("template", [ADDS, PRINTS, TEXT_ONLY])
def test_text_parts_are_joined_where_a_template_reads_text(template):
    assert render(template, [{"role": "user", "content": PARTS}]) == "<user>Say \nhi"
    assert render(template, [{"role": "user", "content": ["Say ", {"text": "hi"}]}]) == "<user>Say \nhi"
    mixed = [
        {"type": "input_text", "text": "a"},
        {"type": "output_text", "text": "b"},
        {"type": "refusal", "refusal": "c"},
    ]
    assert render(template, [{"role": "user", "content": mixed}]) == "<user>a\nb\nc"


def test_parts_stay_parts_where_a_template_reads_them():
    for role in ("user", "assistant", "system"):
        assert render(EITHER, [{"role": role, "content": PARTS}]) == f"<{role}>[Say ][hi]"
    assert render(EITHER, [{"role": "user", "content": "hi"}]) == "<user>hi"
    assert render(PARTS_ONLY, [{"role": "user", "content": "hi"}]) == "<user>[hi]"  # and not nothing
    assert render(DUMPS, [{"role": "user", "content": PARTS}]) == '<user>"Say \\nhi"'


def test_a_template_is_asked_role_by_role():
    users_only = (
        "{% for m in messages %}{% if m.role == 'user' and m.content is not string %}"
        + LOOP
        + "{% else %}{{ m.content + '' }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "system", "content": PARTS}, {"role": "user", "content": PARTS}]
    assert render(users_only, chat) == "Say \nhi[Say ][hi]"


@pytest.mark.parametrize("template", [ADDS, PRINTS, TEXT_ONLY, EITHER, PARTS_ONLY])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (IMAGE, "image"),
        ({"type": "image"}, "image"),
        ({"image_url": "u"}, "image"),
        ({"type": "input_audio"}, "audio"),
        ({"type": "file", "file": {}}, "file"),
        ({"type": "video_url"}, "video"),
        ({"type": "input_image"}, "image"),
    ],
)
def test_what_is_no_text_is_refused_in_words_wherever_it_stands(template, at, part, kind):
    content = [*PARTS[:at], part, *PARTS[at:]]
    chat = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": content},
    ]
    with pytest.raises(RequestError, match=rf"messages\[2\]\.content\[{at}\] is an? {kind}"):
        render(template, chat)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": [{"type": "text"}]}, r"content\[0\]\.text must be text"),
        ({"content": [{"type": "text", "text": 5}]}, r"content\[0\]\.text must be text"),
        ({"content": [{"type": "tool_result", "content": "x"}]}, "type 'tool_result'"),
        ({"content": [{}]}, r"content\[0\]"),
        ({"content": [5]}, r"content\[0\] must be a part"),
        ({"content": []}, "no content"),
        ({"content": {"type": "text", "text": "x"}}, "must be text or a list"),
        ({"tool_calls": "f"}, "tool_calls must be a list"),
        ({"tool_calls": [{"type": "custom", "custom": {"name": "f", "input": "x"}}]}, "must be a call of a function"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "is not JSON"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": '{"x": NaN}'}}]}, "NaN is not a JSON number"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, r"must be a JSON object, got \[1\]"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}, "is not JSON"),
        ({"function_call": {"name": "f", "arguments": "x"}}, "function_call: arguments"),
        ({"content": None, "audio": {"id": "a"}}, "audio"),
    ],
)
def test_what_is_no_message_is_named(message, said):
    with pytest.raises(RequestError, match=rf"messages\[0\].*{said}"):
        check_messages([{"role": "assistant"} | message])


@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', '{"city":"Rome"}', {"city": "Rome"}])
def test_arguments_reach_a_template_as_it_reads_them(arguments):
    assert render(TOJSON, call(arguments)) == '<user>x<assistant>f:{"city": "Rome"}'
    assert render(ITEMS, call(arguments)) == "<user>x<assistant>city=Rome;"
    assert json.loads(render(JOINS, call(arguments)).partition("f:")[2]) == {"city": "Rome"}


def test_arguments_as_text_are_not_printed_as_python_writes_them():
    assert render(SHOWS, call('{"ok": true}')) == '<user>x<assistant>f:{"ok": true}'
    for nothing in ("", None, "{}", {}):
        assert render(TOJSON, call(nothing)) == "<user>x<assistant>f:{}"
    bare = call("{}", tool_calls=[{"name": "f", "arguments": '{"a": 1}'}])
    assert render(CALLS + "{{ t.arguments.a }}{% endfor %}{% endfor %}", bare).endswith("1")


def test_the_callers_messages_are_left_alone():
    chat = call('{"a": 1}', content=None)
    before = json.dumps(chat)
    render(TOJSON, chat)
    assert json.dumps(chat) == before


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
def test_no_content_beside_calls(content):
    assert render(TOJSON, call("{}", **content)) == "<user>x<assistant>f:{}"
    assert render(TOJSON.replace("{{ m.content }}", "{{ '' + m.content }}"), call("{}", **content)).endswith("f:{}")
    by_null = (
        "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
    )
    assert render(by_null, call("{}", **content)) == "f"


def test_older_names_of_calls_and_roles():
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    chat = [{"role": "user", "content": "x"}, old, {"role": "function", "name": "f", "content": "3"}]
    assert render(TOJSON, chat) == '<user>x<assistant>f:{"a": 1}<tool>3'
    developer = [{"role": "developer", "content": "brief"}]
    assert render(PRINTS, developer) == "<system>brief"
    assert render(PRINTS + "{# knows developer #}", developer) == "<developer>brief"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_reaches_the_template_under_its_names(name):
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }};{% endfor %}"
    assert render(template, [{"role": "assistant", "content": "b", name: "R"}]) == "R|R;"
    parts = [{"type": "thinking", "thinking": "R"}, {"type": "text", "text": "b"}]
    assert render(template, [{"role": "assistant", "content": parts}]) == "R|R;"
    assert render(template, [{"role": "assistant", "content": "b", name: None}]) == "|;"


def test_a_refusal_and_what_else_a_message_holds():
    assert render(PRINTS, [{"role": "assistant", "content": None, "refusal": "No."}]) == "<assistant>No."
    kept = "{% for m in messages %}{{ m.name }}/{{ m.tool_call_id }}{% endfor %}"
    assert render(kept, [{"role": "tool", "content": "x", "name": "f", "tool_call_id": "c"}]) == "f/c"


def test_the_default_models_template_reads_parts():
    from pdx.tokenizer.traits import Traits

    # SmolLM2's, in its shape: content is added to a text.
    smol = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<s>system' }}"
        "{% endif %}{{ '<s>' + message['role'] + '\n' + message['content'] + '<e>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    assert render(smol, [{"role": "user", "content": PARTS}]) == "<s>system<s>user\nSay \nhi<e>\n<s>assistant\n"
    assert not Traits(smol, lambda m: 1 / 0).reads_parts("user")  # whatever a template raises
