"""Converting chat messages of OpenAI's API into the form that a chat template reads.

`check_messages` refuses malformed messages. `template_messages` converts them:

- content that is a list of parts is passed as parts or as their texts joined by newlines, whichever the template reads;
- `arguments` of a tool call, a JSON text in the API, become an object;
- the older names `function_call` and role `function` become `tool_calls` and role `tool`;
- the role `developer` becomes `system` if the template does not know it;
- reasoning is passed both as `reasoning_content` and as `thinking`, whichever name it has in the message.

All other keys are passed on unchanged (`name`, `tool_call_id`, a template's own keys).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pdx.errors import RequestError
from pdx.tokenizer.traits import ABSENT, Traits

Messages = Sequence[Mapping[str, Any]]

# Keys for the reasoning of a message; the first one that it has counts, as in transformers.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Kinds of content parts, and the key that holds their text.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA = ("image", "audio", "video", "file", "document")


def check_messages(messages: Messages) -> None:
    """Raises RequestError, naming the message, for anything that is not a list of text messages."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(
            f'messages must be a list such as [{{"role": "user", "content": "Hello"}}], not {type(messages).__name__}'
        )
    if not messages:
        raise RequestError("messages is empty: give at least one message")
    for index, message in enumerate(messages):
        _check(message, f"messages[{index}]")


def _check(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, got {message!r}")
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{where} needs a role: 'system', 'user' or 'assistant'")
    if message.get("audio") is not None:
        raise RequestError(f"{where}.audio is a spoken answer, and pdx reads text only: give its transcript as content")
    calls = [*_calls(message, where)]
    content = message.get("content")
    if not isinstance(content, (str, list, tuple, type(None))):
        raise RequestError(f"{where}.content must be text or a list of parts, got {content!r}")
    texts, thoughts = _texts(message, where)
    if content in (None, [], ()) and not (calls or texts or thoughts):
        raise RequestError(f"{where} has no content")


def template_messages(messages: Messages, traits: Traits) -> list[dict[str, Any]]:
    """The messages in the form that a template with these traits reads: JSON values, without keys that are null.

    Raises RequestError as `check_messages`, and for values that are not JSON.
    """
    check_messages(messages)
    return [_translated(message, f"messages[{index}]", traits) for index, message in enumerate(messages)]


def plain(value: Any, where: str) -> Any:
    """A copy of a JSON value, with mappings as dicts and sequences as lists. Raises RequestError for other values."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, where) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}; chat templates take JSON values only")


def _translated(message: Mapping[str, Any], where: str, traits: Traits) -> dict[str, Any]:
    # An explicit null means the same as a missing key, but templates print it as "None".
    left = {k: v for k, v in message.items() if v is not None and k not in ("content", "tool_calls", "function_call")}
    result = {key: plain(value, f"{where}.{key}") for key, value in left.items()}
    role = result["role"] = traits.role(message["role"])
    texts, thoughts = _texts(message, where)
    calls = [_with_arguments(call, at, traits) for call, at in _calls(message, where)]
    if calls:
        result["tool_calls"] = calls
    if content := _content(message, texts, role, traits, bool(calls)):
        result["content"] = content[0]
    if thoughts and not any(message.get(name) for name in _REASONING):
        result["reasoning_content"] = "\n".join(thoughts)
    reasoning = next((result[name] for name in _REASONING if name in result), None)
    if reasoning is None:
        return result
    return {"thinking": reasoning, **result, "reasoning_content": reasoning}


def _content(message, texts: list[str], role: str, traits: Traits, has_calls: bool) -> list[Any]:
    """[content], or [] if the key must be left out for this template."""
    if not texts:
        empty = traits.content_beside_calls if has_calls else ""
        return [] if empty is ABSENT else [empty]
    given = message.get("content")
    if traits.reads_parts(role) if isinstance(given, list | tuple) else traits.reads_only_parts(role):
        return [[{"type": "text", "text": text} for text in texts]]
    return ["\n".join(texts)]


def _texts(message: Mapping[str, Any], where: str) -> tuple[list[str], list[str]]:
    """The texts of a message's content, and the texts of its reasoning parts."""
    content, refusal = plain(message.get("content"), f"{where}.content"), message.get("refusal")
    if content is None and isinstance(refusal, str):
        content = refusal
    if isinstance(content, str):
        return [content], []
    texts, thoughts = [], []
    for index, part in enumerate(content or ()):
        at = f"{where}.content[{index}]"
        if isinstance(part, Mapping) and part.get("type") == "thinking":
            thoughts.append(_text_of(part, "thinking", at))
        else:
            texts.append(part if isinstance(part, str) else _part_text(part, at))
    return texts, thoughts


def _part_text(part: Any, at: str) -> str:
    if not isinstance(part, Mapping):
        raise RequestError(f'{at} must be a part such as {{"type": "text", "text": "Hello"}}, got {part!r}')
    kind = part.get("type")
    said = [str(kind)] if kind is not None else [str(key) for key, value in part.items() if value is not None]
    if media := next((m for m in _MEDIA for name in said if m in name.lower()), None):
        article = "an" if media[0] in "aeiou" else "a"
        raise RequestError(f"{at} is {article} {media} ({said[0]}): pdx reads text only, leave this part out")
    if kind is None and "text" in part:
        kind = "text"
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise RequestError(f"{at} is a part of type {kind!r}: pdx reads parts of type {', '.join(_TEXT_PARTS)}")
    return _text_of(part, _TEXT_PARTS[kind], at)


def _text_of(part: Mapping[str, Any], key: str, at: str) -> str:
    if not isinstance(part.get(key), str):
        raise RequestError(f"{at}.{key} must be text, got {part.get(key)!r}")
    return part[key]


def _calls(message: Mapping[str, Any], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(call, its place in the message) of each tool call, or of the deprecated `function_call`.

    Raises RequestError for a malformed call, and for arguments that are not a JSON object.
    """
    calls, old = message.get("tool_calls"), message.get("function_call")
    if not isinstance(calls, list | tuple | None):
        raise RequestError(f"{where}.tool_calls must be a list, got {calls!r}")
    found = [(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls or ())]
    if old is not None and not found:
        found = [({"type": "function", "function": old}, f"{where}.function_call")]
    for call, at in found:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(call, Mapping) and function is None and call.get("name") is not None:
            function = call  # Hugging Face's flat form of a call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"{at} must be a call of a function, such as "
                '{"type": "function", "function": {"name": "f", "arguments": "{}"}}'
            )
        _arguments(function.get("arguments"), at)
        yield plain(call, at), at


def _arguments(value: Any, at: str) -> Mapping[str, Any]:
    """The arguments of a call as an object. Missing arguments and an empty text are an empty object."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{at}: arguments must be a JSON object, but the text is not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise RequestError(f"{at}: arguments must be a JSON object, got {value!r}")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _with_arguments(call: dict[str, Any], at: str, traits: Traits) -> dict[str, Any]:
    function = call.get("function") or call
    given = function.get("arguments")
    value: Any = _arguments(given, at)
    if traits.wants_arguments_as_text(given_as_text=isinstance(given, str)):
        value = given if isinstance(given, str) and given else json.dumps(value, ensure_ascii=False)
    changed = function | {"arguments": value}
    return call | {"function": changed} if call.get("function") else changed
