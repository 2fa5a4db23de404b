"""Chat messages against transformers' own renderer, for what both accept."""

import pytest

from tests.support.tokenizer_fixtures import tokenizer_of

pytestmark = pytest.mark.parity

REASONING = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }};{% endfor %}"
PARTS = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"  # noqa: E501
CALLS = "{% for m in messages %}{{ m.role }}{% for t in m.tool_calls or [] %}{{ t.function | tojson }}{{ t.id }}{% endfor %}{{ m.tool_call_id }}{{ m.name }}{% endfor %}"  # noqa: E501
NULL = "{% for m in messages %}{% if m['content'] is none %}null{% else %}{{ m['content'] }}{% endif %}{% for t in m.tool_calls or [] %}{{ t.function.name }}{% endfor %}{% endfor %}"  # noqa: E501
USER = {"role": "user", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"city": "Röm", "n": [1, 2.5, None]}}}


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        *(
            (REASONING, [USER, {"role": "assistant", "content": "b", name: "R"}])
            for name in ("reasoning", "reasoning_content", "thinking")
        ),
        (REASONING, [USER, {"role": "assistant", "content": "b", "reasoning": "1", "thinking": "2"}]),
        (REASONING, [USER, {"role": "assistant", "content": "b", "reasoning": "1", "reasoning_content": "3"}]),
        (PARTS, [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}]),
        (PARTS, [USER]),
        (
            CALLS,
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "f"},
            ],
        ),
        (NULL, [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]),
    ],
)
def test_chats_are_rendered_as_by_transformers(template, messages):
    from transformers.utils.chat_template_utils import render_jinja_template

    (theirs,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=False)
    ours = tokenizer_of(template).apply_chat_template(messages, add_generation_prompt=False)
    assert ours == theirs
