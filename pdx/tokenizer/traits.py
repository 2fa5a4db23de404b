"""What a chat template reads, found by rendering small chats with it.

Templates differ in what they take: content as text or as a list of parts, the arguments of a tool call as an object or
as JSON text, no content as null, as a missing key or as an empty text. Their source tells this badly (Qwen 3 asks
whether content is a string and then leaves a list out), so they are tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

# In the place of a content: the key is left out.
ABSENT = object()

_WORD = "zqprobe"
_PRINTED_PART = re.compile(rf"""["']text["']\s*:\s*["']{_WORD}""")
_PYTHON_NOTATION = re.compile(rf"'{_WORD}'\s*:")
_KNOWS_FUNCTION = re.compile(r"""(==|in)\s*[\[(]?\s*['"]function['"]""")
_ARGUMENTS = {"object": {_WORD: "x"}, "text": f'{{"{_WORD}": "x"}}'}


class Traits:
    """What one template reads. Each answer is found on first use and kept.

    Args:
      source: the template.
      render: a chat through it; may raise anything.
    """

    def __init__(self, source: str, render: Callable[[list[dict[str, Any]]], str]):
        self._source, self._render = source, render
        self._found: dict[tuple[str, bool], bool] = {}

    def role(self, role: str) -> str:
        """The role under which a message reaches the template."""
        if role == "developer" and role not in self._source:
            return "system"
        if role == "function" and not _KNOWS_FUNCTION.search(self._source):
            return "tool"
        return role

    def reads_parts(self, role: str) -> bool:
        """Whether content given as a list of text parts comes out as their text."""
        return self._shown(role, True)

    def reads_only_parts(self, role: str) -> bool:
        """Whether content must be a list of parts to come out at all."""
        return not self._shown(role, False) and self._shown(role, True)

    def wants_arguments_as_text(self, *, given_as_text: bool) -> bool:
        """Whether a call's arguments are to be JSON text: the template fails on an object, or, where text was given
        in the first place, would print the object as Python writes it."""
        as_object, as_text = self._arguments
        if as_text is None or _WORD not in as_text or (as_object is not None and not given_as_text):
            return False
        return as_object is None or _WORD not in as_object or bool(_PYTHON_NOTATION.search(as_object))

    @cached_property
    def content_beside_calls(self) -> Any:
        """What stands for no content beside tool calls: null, ABSENT or an empty text."""
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
        return tuple(self._try(_chat_with_call(_call("f", _ARGUMENTS[kind]))) for kind in ("object", "text"))

    def _shown(self, role: str, as_parts: bool) -> bool:
        if (role, as_parts) not in self._found:
            text = self._try(_chat(role, [{"type": "text", "text": _WORD}] if as_parts else _WORD))
            self._found[role, as_parts] = bool(text) and _WORD in text and not _PRINTED_PART.search(text)
        return self._found[role, as_parts]

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._render(messages)
        except Exception:  # whatever it is: the template does not take such a chat
            return None


def names_in(template: str) -> frozenset[str]:
    """Every name in the expressions of a template, those of variables among them; none in one that is not jinja2."""
    import jinja2

    try:
        return frozenset(value for _, kind, value in jinja2.Environment().lex(template) if kind == "name")
    except jinja2.TemplateSyntaxError:
        return frozenset()


def _chat(role: str, content: Any) -> list[dict[str, Any]]:
    """The shortest chat in which a message of this role may stand."""
    message, user = {"role": role, "content": content}, {"role": "user", "content": "x"}
    if role == "tool":
        return [*_chat_with_call(_call()), message | {"tool_call_id": "abcdefghi", "name": "f"}]
    return {"system": [message, user], "assistant": [user, message]}.get(role, [message])


def _chat_with_call(call: dict[str, Any], content: Any = "") -> list[dict[str, Any]]:
    answer = {"role": "assistant", "tool_calls": [call]} | ({} if content is ABSENT else {"content": content})
    return [{"role": "user", "content": "x"}, answer]


def _call(name: str = _WORD, arguments: Any = None) -> dict[str, Any]:
    # Mistral's templates want ids of nine letters.
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments or {}}}
