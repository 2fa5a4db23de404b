"""Reading and checking the rows of a file of requests: a prompt or messages, and settings."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pdx.clients.request_keys import check_keys, closest
from pdx.errors import PdxError, RequestError
from pdx.generation.prompts import servable_ids
from pdx.io import inputs, outputs
from pdx.sampling.options import SamplingOptions
from pdx.tokenizer.messages import check_messages

SETTINGS = {f.name for f in dataclasses.fields(SamplingOptions)}
# Variables that pdx itself gives to a chat template.
_OWN_NAMES = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "sanitize_control_tokens",
)
# Variables that are refused if the template does not read them, since ignoring them would change the answer.
_ASKED_FOR = ("documents", "reasoning_effort")


@dataclasses.dataclass(frozen=True)
class Request:
    """A request of the file.

    Attributes:
      line: its line number, from 1.
      row: the JSON value of the line.
      prompt: a text, messages or token ids; None if there is an `error`.
      options: all sampling settings.
      settings: those that the row or the user gave, by field of `options`.
      template: variables for the chat template besides the messages.
      error: why the row cannot be served.
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


def ignored_names(model, requests: list[Request]) -> list[str]:
    """The template variables in the rows that this model's chat template does not read. They are ignored."""
    given = {name for request in requests for name in request.template} - {*_ASKED_FOR}
    if not given:
        return []
    known = model.tokenizer.template_names
    return sorted(name for name in given - known if not closest(name, known))


def read(path: Path, defaults: SamplingOptions) -> list[Request]:
    """Read and check all requests. A row's own settings override `defaults`.

    Other keys of a row are kept for its answer. Raises RequestError that names the line.
    """
    requests = []
    for number, row, where in read_rows(path):
        if has_lone_surrogate(row):
            raise RequestError(f"{where} holds half a surrogate pair, which is not a character")
        requests.append(parse(where, number, row, defaults))
    if not requests:
        raise RequestError(f'{path} holds no requests: one JSON object per line, such as {{"prompt": "Hello"}}')
    return requests


def read_rows(path: Path) -> Iterator[tuple[int, Any, str]]:
    """(line number, JSON value, place for error messages) of each line that is not blank. Raises RequestError."""
    for number, line in enumerate(inputs.lines(path), 1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                row = json.loads(line, parse_constant=_no_number)
                json.dumps(row)  # as it will be written
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{where} is not JSON: {error}") from None
            yield number, row, where


def has_lone_surrogate(row: Any) -> bool:
    """Whether a row holds half a surrogate pair, such as `\\ud83d` alone. It cannot be encoded."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _no_number(name: str):
    raise ValueError(f"{name} is not a JSON number")


def parse(where: str, number: int, row: Any, defaults: SamplingOptions) -> Request:
    """The request of a row. A null counts as a missing key. Raises RequestError that begins with `where`."""
    given = {k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else {}
    if "body" in given and "custom_id" in given:
        raise RequestError(f"{where}: this is a row of OpenAI's batch format, which pdx batch answers")
    if ("prompt" in given) == ("messages" in given):
        raise RequestError(f'{where}: expected an object with either "prompt" or "messages"')
    prompt: Any = given.get("prompt", given.get("messages"))
    kind: Any = str if "prompt" in given else list
    if not isinstance(prompt, kind) or not prompt:
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
    """A request with an already checked prompt. Raises RequestError for a setting out of its range."""
    return Request(number, row, prompt, dataclasses.replace(defaults, **settings), settings, template)


def check_template(extra: Any) -> None:
    """Raises RequestError unless `chat_template_kwargs` is an object of names that are not pdx's own."""
    if not isinstance(extra, Mapping):
        raise RequestError(f"chat_template_kwargs is {extra!r}: it must be an object")
    if own := [name for name in extra if name in _OWN_NAMES]:
        raise RequestError(f"chat_template_kwargs may not hold {own[0]}: pdx gives it to the template itself")


def prompt_of(model, request: Request) -> Any:
    """The prompt of a request. A chat with template variables is rendered to token ids here.

    Raises RequestError for a variable that this model's template does not read, if it is probably a misspelling or
    must not be ignored.
    """
    if not request.template:
        return request.prompt
    known = model.tokenizer.template_names
    for name in request.template.keys() - known - {"add_generation_prompt"}:
        if near := closest(name, known):
            raise RequestError(f"this model's chat template has no {name}: did you mean {near}?")
        if name in _ASKED_FOR:
            raise RequestError(f"this model's chat template has no {name}: leave it out")
    return model.tokenizer.encode_chat(request.prompt, **request.template)


def check_output(path: Path, source: Path) -> None:
    """Raise RequestError if `path` is the file of requests, is not empty, or cannot be written."""
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
        raise RequestError(f"{path} is the file of requests: name another one")
    if os.path.isfile(path) and os.stat(path).st_size:
        raise RequestError(f"{path} exists already and is not empty: remove it or name another file")
    outputs.check_file(path)


def token_ids(model, source: Path, requests: list[Request]) -> list[list[int]]:
    """The token ids of each prompt. Raises RequestError or ContextLengthError that names the line."""
    ids = []
    for request in requests:
        try:
            ids.append(servable_ids(model, prompt_of(model, request), request.options))
        except PdxError as error:
            raise type(error)(f"{source}, line {request.line}: {error}") from error
    return ids
