"""Chats to prompts through the model's own template, which sees nothing but plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pdx.errors import ModelFileError, RequestError
from pdx.tokenizer.render import render

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


def render_chat(
    templates: Mapping[str, str],
    messages: Messages,
    *,
    named: Mapping[str, str],
    source: str,
    add_generation_prompt: bool,
    tools: Tools | None,
    extra: Mapping[str, Any],
) -> str:
    """The prompt that a model's chat template makes of the messages.

    Raises RequestError for malformed messages, for a model without a template and for messages that the template
    refuses; ModelFileError for a template that is not valid, leaves the sandbox or asks for too much.
    """
    chosen = template_and_inputs(
        templates, messages, named=named, source=source, add_generation_prompt=add_generation_prompt, tools=tools,
        extra=extra,
    )  # fmt: skip
    return render(*chosen, source)


def template_and_inputs(
    templates: Mapping[str, str],
    messages: Messages,
    *,
    named: Mapping[str, str],
    source: str,
    add_generation_prompt: bool,
    tools: Tools | None,
    extra: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """The template for a chat, and its variables as JSON values. Raises as `render_chat`, before it renders."""
    template = _choose(templates, with_tools=bool(tools), source=source)
    try:
        return template, {
            "documents": None,
            **named,
            **{key: _plain(value, key) for key, value in extra.items()},
            "messages": _plain_messages(messages),
            "tools": None if tools is None else _plain(list(tools), "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
    except RecursionError:
        raise RequestError("the messages or tools are nested too deeply for a chat template") from None


def _choose(templates: Mapping[str, str], *, with_tools: bool, source: str) -> str:
    if not templates:
        raise RequestError(
            f"{source} has no chat template: it is a base model, or its files lack one. Give it a plain prompt, "
            "use the instruction-tuned variant, or add a chat_template.jinja to its Hugging Face directory."
        )
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if len(templates) == 1:
        return next(iter(templates.values()))
    raise ModelFileError(f"{source} has the chat templates {', '.join(sorted(templates))} but none named 'default'")


def check_messages(messages: Messages) -> None:
    """Raises RequestError for what is no chat, naming the message."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(
            'messages must be a list such as [{"role": "user", "content": "Hello"}], '
            f"not {type(messages).__name__}"
        )
    if not messages:
        raise RequestError("messages is empty: give at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{index}] must be an object with role and content, got {message!r}")
        if not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] needs a role: 'system', 'user' or 'assistant'")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise RequestError(f"messages[{index}] has no content")
        if not isinstance(content, (str, list, tuple, type(None))):
            raise RequestError(f"messages[{index}].content must be text or a list of parts, got {content!r}")


def _plain_messages(messages: Messages) -> list[dict[str, Any]]:
    check_messages(messages)
    # An explicit null means the same as a missing key, but templates print it as "None".
    return [
        {key: _plain(value, f"messages[{index}].{key}") for key, value in message.items() if value is not None}
        for index, message in enumerate(messages)
    ]


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}; chat templates take JSON values only")
