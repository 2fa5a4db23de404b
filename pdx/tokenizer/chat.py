"""Chats to prompts through the model's own template: sandboxed jinja2 with what published templates expect.

Templates come with model files, which are not trusted: they run in jinja2's immutable sandbox and see
nothing but plain JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pdx.errors import ModelFileError, RequestError
from pdx.tokenizer.messages import Messages, plain, template_messages
from pdx.tokenizer.traits import Traits

if TYPE_CHECKING:
    import jinja2


def render_chat(
    templates: Mapping[str, str],
    messages: Messages,
    *,
    named: Mapping[str, str],
    source: str,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    extra: Mapping[str, Any],
) -> str:
    """The prompt that a model's chat template makes of the messages.

    Raises RequestError for malformed messages, for a model without a template and for messages that the
    template refuses; ModelFileError for a template that is not valid or leaves the sandbox.
    """
    import jinja2

    template = _choose(templates, with_tools=bool(tools), source=source)
    variables = {
        "documents": None,
        **named,
        **{key: plain(value, key) for key, value in extra.items()},
        "messages": template_messages(messages, _traits(template)),
        "tools": None if tools is None else plain(list(tools), "tools"),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return _compiled(template).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise ModelFileError(f"{source}: line {error.lineno} of the chat template is not jinja2: {error}") from error
    except jinja2.exceptions.SecurityError as error:
        raise ModelFileError(f"{source}: the chat template does what its sandbox forbids: {error}") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise RequestError(
            f"the chat template of {source} refuses these messages: {error}. "
            "Check the roles, their order, and that each content is of a kind this model takes."
        ) from error


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
    # The named tokens are of no matter here, but a template may add texts to them.
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")

    def render(messages: list[dict[str, Any]]) -> str:
        return _compiled(template).render(messages=messages, tools=None, documents=None, add_generation_prompt=False,
                                          **tokens)

    return Traits(template, render)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; for a prompt its body is simply kept."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
