"""The rows of a file of requests, read and checked: prompt or messages, and settings."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pdx.clients.request_keys import check_keys, closest
from pdx.errors import PdxError, RequestError
from pdx.generation.prompts import checked_ids
from pdx.io import inputs, outputs
from pdx.sampling.options import SamplingOptions
from pdx.tokenizer.messages import check_messages

SETTINGS = {f.name for f in dataclasses.fields(SamplingOptions)}
# What a chat template is given by pdx itself.
_OWN_NAMES = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "sanitize_control_tokens",
)
# Values that a row must not lose: refused where the template does not read them.
_ASKED_FOR = ("documents", "reasoning_effort")


@dataclasses.dataclass(frozen=True)
class Request:
    """A line of the file.

    row: what it said.
    prompt: a text, messages or token ids.
    settings: the fields of `options` that somebody gave.
    template: what its chat template is given beside the messages.
    error: why the row cannot be served; there is no prompt then.
    """

    line: int
    row: Any
    prompt: Any
    options: SamplingOptions
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: RequestError | None = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], Mapping)


def unread_names(model, requests: list[Request]) -> list[str]:
    """What rows give to the chat template and it does not read, and is passed over."""
    given = {name for request in requests for name in request.template} - {*_ASKED_FOR}
    if not given:
        return []
    known = model.tokenizer.template_names
    return sorted(name for name in given - known if not closest(name, known))


def read(path: Path, defaults: SamplingOptions) -> list[Request]:
    """Read and check all requests; a row's own settings go before `defaults`.

    Raises RequestError that names the line. Keys that are no setting are the user's own: they are kept.
    """
    requests = []
    for number, row, where in rows_of(path):
        if has_half_pair(row):
            raise RequestError(f"{where} holds half a surrogate pair, which is no character")
        requests.append(parse(where, number, row, defaults))
    if not requests:
        raise RequestError(f'{path} holds no requests: one JSON object a line, such as {{"prompt": "Hello"}}')
    return requests


def rows_of(path: Path) -> Iterator[tuple[int, Any, str]]:
    """The number of each line that is not blank, what it says, and where that is for messages. Raises RequestError."""
    for number, line in enumerate(inputs.lines(path), 1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                row = json.loads(line, parse_constant=_no_number)
                json.dumps(row)  # as it will be written
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{where} is no JSON: {error}") from None
            yield number, row, where


def has_half_pair(row: Any) -> bool:
    """Whether a row says `\\ud83d` alone, as texts that were cut inside of a character do: it is in no encoding."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")


def parse(where: str, number: int, row: Any, defaults: SamplingOptions) -> Request:
    """The request that a row asks for; a null is a key that is not there. Raises RequestError that says `where`."""
    given = {k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else {}
    if "body" in given and "custom_id" in given:
        raise RequestError(f"{where}: this is a row of OpenAI's batch format, which pdx batch answers")
    if ("prompt" in given) == ("messages" in given):
        raise RequestError(f'{where}: expected an object with either "prompt" or "messages"')
    prompt = given.get("prompt", given.get("messages"))
    if not isinstance(prompt, str if "prompt" in given else list) or not prompt:
        raise RequestError(f"{where}: prompt must be a text and messages a list, neither of them empty")
    try:
        check_keys(given, SETTINGS)
        if "messages" in given:
            check_messages(prompt)
        template = given.get("chat_template_kwargs", {}) if "messages" in given else {}
        check_template(template)
        settings = {key: value for key, value in given.items() if key in SETTINGS}
        return build(number, row, prompt, settings, template, defaults)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


def build(
    number: int,
    row: Any,
    prompt: Any,
    settings: Mapping[str, Any],
    template: Mapping[str, Any],
    defaults: SamplingOptions,
) -> Request:
    """A request of a prompt that is checked. Raises RequestError for a setting out of its range."""
    return Request(number, row, prompt, dataclasses.replace(defaults, **settings), settings, template)


def check_template(extra: Any) -> None:
    """Raises RequestError unless `chat_template_kwargs` is an object of names that are not pdx's own."""
    if not isinstance(extra, Mapping):
        raise RequestError(f"chat_template_kwargs is {extra!r}: it must be an object")
    if own := [name for name in extra if name in _OWN_NAMES]:
        raise RequestError(f"chat_template_kwargs may not hold {own[0]}: pdx gives it to the template itself")


def prompt_of(model, request: Request) -> Any:
    """The prompt of a request, with a chat's own template values already in it.

    Raises RequestError for one that this model's template does not know.
    """
    if not request.template:
        return request.prompt
    known = model.tokenizer.template_names
    for name in request.template.keys() - known - {"add_generation_prompt"}:
        if near := closest(name, known):
            raise RequestError(f"this model's chat template has no {name}: {near} is meant?")
        if name in _ASKED_FOR:
            raise RequestError(f"this model's chat template has no {name}: leave it out")
    return model.tokenizer.encode_chat(request.prompt, **request.template)


def check_output(path: Path, source: Path) -> None:
    """Raise RequestError where writing would destroy something, or is not possible."""
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
        raise RequestError(f"{path} is the file of requests: name another one")
    if os.path.isfile(path) and os.stat(path).st_size:
        raise RequestError(f"{path} exists already and is not empty: remove it or name another file")
    outputs.check_file(path)


def token_ids(model, source: Path, requests: list[Request]) -> list[list[int]]:
    """The prompts as the model reads them. Raises RequestError or ContextLengthError that names the line."""
    ids = []
    for request in requests:
        try:
            ids.append(checked_ids(model, prompt_of(model, request), request.options))
        except PdxError as error:
            raise type(error)(f"{source}, line {request.line}: {error}") from error
    return ids
