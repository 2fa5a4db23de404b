"""Which forms of a message a chat template accepts, found by rendering small chats with it.

Templates differ: content is text or a list of parts; the arguments of a tool call are an object or JSON text; a message
without content has null, a missing key or an empty text. Reading the source is unreliable (Qwen 3's tests whether
content is a string, and drops it otherwise), so small chats are rendered and the output is inspected.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

# Instead of a content: the key is left out.
ABSENT = object()

_WORD = "zqprobe"  # a word that no template contains
_PRINTED_PART = re.compile(rf"""["']text["']\s*:\s*["']{_WORD}""")
_PYTHON_NOTATION = re.compile(rf"'{_WORD}'\s*:")
_KNOWS_FUNCTION = re.compile(r"""(==|in)\s*[\[(]?\s*['"]function['"]""")
_ARGUMENTS = {"object": {_WORD: "x"}, "text": f'{{"{_WORD}": "x"}}'}


class Traits:
    """Which forms of a message one template accepts. Each answer is found on first use and cached.

    Args:
      source: the template.
      render: renders messages with it; any exception counts as "not accepted".
    """

    def __init__(self, source: str, render: Callable[[list[dict[str, Any]]], str]):
        self._source, self._render = source, render
        self._found: dict[tuple[str, bool], bool] = {}

    def role(self, role: str) -> str:
        """The role that a message of this role has for the template."""
        if role == "developer" and role not in self._source:
            return "system"
        if role == "function" and not _KNOWS_FUNCTION.search(self._source):
            return "tool"
        return role

    def reads_parts(self, role: str) -> bool:
        """Whether content that is a list of text parts appears as text in the prompt."""
        return self._is_rendered(role, True)

    def reads_only_parts(self, role: str) -> bool:
        """Whether content appears in the prompt only if it is a list of parts."""
        return not self._is_rendered(role, False) and self._is_rendered(role, True)

    def wants_arguments_as_text(self, *, given_as_text: bool) -> bool:
        """Whether the arguments of a call must be JSON text: the template fails with an object or, if the message had
        text, would print the object in Python's notation."""
        as_object, as_text = self._arguments
        if as_text is None or _WORD not in as_text or (as_object is not None and not given_as_text):
            return False
        return as_object is None or _WORD not in as_object or bool(_PYTHON_NOTATION.search(as_object))

    @cached_property
    def content_beside_calls(self) -> Any:
        """The content of a message that has only tool calls: None (null), ABSENT or ""."""
        texts = {
            key: self._try(_chat_with_call(_call(), content))
            for key, content in (("null", None), ("absent", ABSENT), ("empty", ""))
        }
        nones = (texts["empty"] or "").count("None")
        for key, content in (("null", None), ("absent", ABSENT)):
            if (text := texts[key]) is not None and _WORD in text and text.count("None") <= nones:
                return content
        return ""

    @cached_property
    def _arguments(self) -> tuple[str | None, str | None]:
        as_object, as_text = (self._try(_chat_with_call(_call("f", _ARGUMENTS[kind]))) for kind in ("object", "text"))
        return as_object, as_text

    def _is_rendered(self, role: str, as_parts: bool) -> bool:
        if (role, as_parts) not in self._found:
            text = self._try(_chat(role, [{"type": "text", "text": _WORD}] if as_parts else _WORD))
            self._found[role, as_parts] = text is not None and _WORD in text and not _PRINTED_PART.search(text)
        return self._found[role, as_parts]

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._render(messages)
        except Exception:  # the template does not accept such a chat
            return None


def names_in(template: str) -> frozenset[str]:
    """All names in the expressions of a template, including those of variables; none if it is not jinja2."""
    import jinja2

    try:
        return frozenset(value for _, kind, value in jinja2.Environment().lex(template) if kind == "name")
    except jinja2.TemplateSyntaxError:
        return frozenset()


def _chat(role: str, content: Any) -> list[dict[str, Any]]:
    """The shortest valid chat with a message of this role."""
    message, user = {"role": role, "content": content}, {"role": "user", "content": "x"}
    if role == "tool":
        return [*_chat_with_call(_call()), message | {"tool_call_id": "abcdefghi", "name": "f"}]
    return {"system": [message, user], "assistant": [user, message]}.get(role, [message])


def _chat_with_call(call: dict[str, Any], content: Any = "") -> list[dict[str, Any]]:
    answer = {"role": "assistant", "tool_calls": [call]} | ({} if content is ABSENT else {"content": content})
    return [{"role": "user", "content": "x"}, answer]


def _call(name: str = _WORD, arguments: Any = None) -> dict[str, Any]:
    # Mistral's templates require ids of nine letters.
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments or {}}}
