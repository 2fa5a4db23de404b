"""Rows of OpenAI's batch files: what `pdx batch` does with each field of the API.

Every field is of one kind:

- SETTING: becomes the field of `SamplingOptions` with this name;
- TEMPLATE: becomes the variable of the chat template with this name;
- READ: handled by code in this module;
- IGNORED: does not change the answer;
- `Only` some values: accepted with these values, which change nothing; refused with any other.

A field that is not in the tables is refused; null always means the default. The tables hold OpenAI's fields and those
that vLLM adds. `tests/parity/test_openai_types.py` compares them with the types of the `openai` package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pdx.clients.batch_file import Request, build, check_template
from pdx.clients.request_keys import closest
from pdx.errors import RequestError
from pdx.sampling.options import MAX_LOGPROBS, SamplingOptions
from pdx.tokenizer.messages import check_messages


class Kind(Enum):
    """How a field is handled, whatever its value."""

    SETTING = "setting"
    TEMPLATE = "template"
    READ = "read"
    IGNORED = "ignored"


@dataclass(frozen=True)
class Only:
    """Accepts only these values. Any other is refused, and the error ends with `hint`."""

    values: tuple[Any, ...] = ()
    hint: str = "leave it out"


Field = Kind | Only
SETTING, TEMPLATE, READ, IGNORED = Kind
NO_TOOLS = "pdx does not parse tool calls in answers: leave it out"
NO_GRAMMAR = "pdx does not constrain the form of answers: leave it out"
NO_SCORES = "pdx reports log-probabilities of the answer only: leave it out"

# Fields of both endpoints: OpenAI's, then vLLM's.
_BOTH: dict[str, Field] = {
    "model": READ,
    "max_tokens": SETTING,
    "temperature": SETTING,
    "top_p": SETTING,
    "presence_penalty": SETTING,
    "frequency_penalty": SETTING,
    "logit_bias": SETTING,
    "stop": SETTING,
    "seed": READ,
    "logprobs": READ,
    "n": Only((1,), "write the row several times, with a custom_id and a seed for each"),
    "stream": Only((False,), "answers in a file are not streamed"),
    "stream_options": IGNORED,
    "user": IGNORED,
    "top_k": READ,
    "min_p": SETTING,
    "repetition_penalty": SETTING,
    "stop_token_ids": SETTING,
    "ignore_eos": SETTING,
    "best_of": Only((1,)),
    "echo": Only((False,), NO_SCORES),
    "use_beam_search": Only((False,)),
    "length_penalty": Only((1,)),
    "min_tokens": Only((0,)),
    "include_stop_str_in_output": Only((False,)),
    "skip_special_tokens": Only((True,)),
    "spaces_between_special_tokens": IGNORED,
    "truncate_prompt_tokens": Only(hint="shorten the prompt"),
    "prompt_logprobs": Only(hint=NO_SCORES),
    "allowed_token_ids": Only(),
    "bad_words": Only(([],), "ban tokens with logit_bias"),
    "logits_processors": Only(([],)),
    "return_tokens_as_token_ids": Only((False,)),
    "return_token_ids": IGNORED,
    "prompt_embeds": Only(),
    "response_format": Only(({"type": "text"},), NO_GRAMMAR),
    "structured_outputs": Only(hint=NO_GRAMMAR),
    **dict.fromkeys((f"guided_{kind}" for kind in ("json", "regex", "choice", "grammar")), Only(hint=NO_GRAMMAR)),
    "guided_decoding_backend": IGNORED,
    "priority": IGNORED,
    "request_id": IGNORED,
    "cache_salt": IGNORED,
    "mm_processor_kwargs": IGNORED,
}

CHAT: dict[str, Field] = _BOTH | {
    "messages": READ,
    "max_completion_tokens": SETTING,
    "top_logprobs": READ,
    "reasoning_effort": TEMPLATE,
    "tools": Only(([],), NO_TOOLS),
    "functions": Only(([],), NO_TOOLS),
    "tool_choice": Only(("none", "auto"), NO_TOOLS),
    "function_call": Only(("none", "auto"), NO_TOOLS),
    "parallel_tool_calls": IGNORED,  # without tools there are no calls
    "modalities": Only((["text"],), "answers are text"),
    "audio": Only(hint="answers are text"),
    "prediction": IGNORED,  # makes an answer faster, but does not change it
    "moderation": Only(hint="pdx has no moderation model: leave it out"),
    "verbosity": Only(("medium",), "say in a message how long the answer is to be"),
    "web_search_options": Only(hint="pdx does not search the web: leave it out"),
    "metadata": IGNORED,
    "service_tier": IGNORED,
    "store": IGNORED,
    "safety_identifier": IGNORED,
    "prompt_cache_key": IGNORED,
    "prompt_cache_options": IGNORED,
    "prompt_cache_retention": IGNORED,
    "chat_template_kwargs": READ,
    "documents": TEMPLATE,
    "add_generation_prompt": READ,
    "continue_final_message": Only((False,), "give the beginning of the answer in a prompt of /v1/completions"),
    "chat_template": Only(hint="the model's own template is used: leave it out"),
    "add_special_tokens": Only((False,), "the chat template writes the special tokens"),
    "include_reasoning": Only((True,)),
    "thinking_token_budget": Only(),
}

COMPLETIONS: dict[str, Field] = _BOTH | {
    "prompt": READ,
    "suffix": Only(("",), "pdx only continues a prompt: leave it out"),
    "add_special_tokens": Only((True,), "give the prompt as token ids"),
}

URLS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETIONS}


def is_openai(row: Any) -> bool:
    """Whether a row has the format of OpenAI's batch files, not that of `pdx generate --prompts`."""
    if not isinstance(row, Mapping) or "body" in row:
        return isinstance(row, Mapping)
    return "custom_id" in row and ("url" in row or "method" in row) and not {"prompt", "messages"} & {*row}


def parse(number: int, row: Mapping[str, Any], defaults: SamplingOptions) -> Request:
    """The request of a row in line `number`. Raises RequestError for a field or value that pdx does not support."""
    fields, body = _envelope(row)
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        _check(name, value, fields)
    settings = {name: value for name, value in given.items() if fields[name] is SETTING}
    if "max_completion_tokens" in settings:  # the newer name wins
        settings["max_tokens"] = settings.pop("max_completion_tokens")
    settings |= _translated(given, fields is CHAT)
    if fields is COMPLETIONS:
        return build(number, row, _prompt(given.get("prompt")), settings, {}, defaults)
    if "messages" not in given:
        raise RequestError("the body has no messages")
    check_messages(given["messages"])
    return build(number, row, given["messages"], settings, _template(given), defaults)


def _envelope(row: Mapping[str, Any]) -> tuple[dict[str, Field], Mapping[str, Any]]:
    """The fields of the row's endpoint, and the row's body."""
    body = row.get("body")
    if not isinstance(body, Mapping) or not isinstance(row.get("custom_id"), str):
        raise RequestError("a batch row needs a custom_id, which is a text, and a body, which is an object")
    if body.get("messages") is None and body.get("prompt") is not None:
        usual = "/v1/completions"
    else:
        usual = "/v1/chat/completions"
    url, method = row.get("url") or usual, row.get("method") or "POST"
    if method != "POST" or not isinstance(url, str) or url not in URLS:
        raise RequestError(f"method must be POST and url one of {', '.join(URLS)}, got {method!r} and {url!r}")
    return URLS[url], body


def _check(name: str, value: Any, fields: Mapping[str, Field]) -> None:
    if name not in fields:
        other = next((url for url, others in URLS.items() if name in others), None)
        near = closest(name, fields)
        hint = f"; it belongs to {other}" if other else f"; did you mean {near}?" if near else ""
        raise RequestError(f"{name} is not a field that pdx knows here{hint}")
    field = fields[name]
    if isinstance(field, Only) and not any(_same(value, allowed) for allowed in field.values):
        raise RequestError(f"{name} is not supported as {_short(value)}: {field.hint}")


def _translated(given: Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    """The settings that have another name or other values in `SamplingOptions`."""
    settings: dict[str, Any] = {}
    if "model" in given and not isinstance(given["model"], str):
        raise RequestError(f"model is {given['model']!r}: it must be a text")
    if "seed" in given:
        seed = given["seed"]  # signed in the API, unsigned in pdx
        settings["seed"] = seed % 2**64 if type(seed) is int and -(2**63) <= seed < 0 else seed
    if "top_k" in given:
        settings["top_k"] = 0 if given["top_k"] == -1 else given["top_k"]  # -1 means off in vLLM, 0 in pdx
    wanted = given.get("logprobs", False if is_chat else None)
    if not is_chat:
        return settings | ({} if wanted is None else {"logprobs": wanted})
    if not isinstance(wanted, bool):
        raise RequestError(f"logprobs is {wanted!r}: for chats it is true or false, and top_logprobs says how many")
    if not wanted and given.get("top_logprobs"):
        raise RequestError("top_logprobs needs logprobs: true")
    most = given.get("top_logprobs", 0)
    if type(most) is not int or not 0 <= most <= MAX_LOGPROBS:
        raise RequestError(f"top_logprobs is {most!r}: it must be a whole number from 0 to {MAX_LOGPROBS}")
    return settings | ({"logprobs": most} if wanted else {})


def _prompt(prompt: Any) -> Any:
    """The prompt of a body: a text or token ids, possibly in a list of one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise RequestError(f"prompt holds {len(prompt)} prompts: write one row for each")
        prompt = prompt[0]
    is_ids = isinstance(prompt, list) and all(type(i) is int and i >= 0 for i in prompt)
    if not (isinstance(prompt, str) or is_ids) or not prompt:
        raise RequestError(f"prompt must be a text or a list of token ids, not empty, got {_short(prompt)}")
    return prompt


def _template(given: Mapping[str, Any]) -> dict[str, Any]:
    """The variables for the chat template besides the messages."""
    extra = given.get("chat_template_kwargs", {})
    check_template(extra)
    named = {name: value for name, value in given.items() if CHAT[name] is TEMPLATE}
    if twice := extra.keys() & named.keys():
        raise RequestError(f"{min(twice)} is also in chat_template_kwargs: give it once")
    if not isinstance(given.get("add_generation_prompt", True), bool):
        raise RequestError(f"add_generation_prompt is {given['add_generation_prompt']!r}: it must be true or false")
    own = {"add_generation_prompt": False} if given.get("add_generation_prompt") is False else {}
    return extra | named | own


def _same(value: Any, allowed: Any) -> bool:
    """Whether two JSON values are equal; in JSON, true is not 1."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
