"""Chats to prompts through the model's own chat template, which is given JSON values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pdx.errors import ModelFileError, RequestError
from pdx.tokenizer.messages import Messages, plain, template_messages
from pdx.tokenizer.render import render
from pdx.tokenizer.traits import Traits

Tools = Sequence[Mapping[str, Any]]


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
    """The template for a chat, and its variables as JSON values.

    Args:
      templates: name -> jinja2 source.
      named: named tokens, such as `bos_token` -> `<s>`.
      source: the model's name in errors.
      extra: further variables.

    Raises RequestError for malformed messages and for a model without a template, ModelFileError for several templates
    without a default.
    """
    template = _choose(templates, with_tools=bool(tools), source=source)
    try:
        return template, {
            "documents": None,
            **named,
            **{key: plain(value, key) for key, value in extra.items()},
            "messages": template_messages(messages, _traits(template)),
            "tools": None if tools is None else plain(list(tools), "tools"),
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


@lru_cache(maxsize=16)
def _traits(template: str) -> Traits:
    # A template may concatenate the named tokens with texts, so they must be texts, but their content is irrelevant.
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")

    def render_messages(messages: list[dict[str, Any]]) -> str:
        chat = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
        return render(template, chat | tokens, "a model")

    return Traits(template, render_messages)
