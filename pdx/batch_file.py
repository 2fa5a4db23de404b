"""A file of requests to a file of answers: `pdx generate --prompts IN.jsonl --output OUT.jsonl`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdx import texts
from pdx.errors import PdxError, RequestError
from pdx.sampling_options import SamplingOptions
from pdx.tokenizer.chat import check_messages

SETTINGS = {f.name for f in dataclasses.fields(SamplingOptions)}


@dataclasses.dataclass(frozen=True)
class Request:
    """A line of the file: what it said, the prompt or messages in it, and its settings."""

    line: int
    row: dict[str, Any]
    prompt: Any
    options: SamplingOptions


def read(path: Path, defaults: SamplingOptions) -> list[Request]:
    """Read and check all requests; a row's own settings go before `defaults`.

    Raises RequestError that names the line. Keys that are no setting are the user's own: they are kept.
    """
    requests = [parse(where, number, row, defaults) for number, row, where in rows_of(path)]
    if not requests:
        raise RequestError(f"{path} holds no requests: one JSON object a line, such as " '{"prompt": "Hello"}')
    return requests


def rows_of(path: Path) -> Iterator[tuple[int, Any, str]]:
    """The number of each line that is not blank, what it says, and where that is for messages. Raises RequestError."""
    for number, line in enumerate(texts.lines(path), 1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # as it will be written
            except UnicodeEncodeError:
                raise RequestError(f"{where} holds half a surrogate pair, which is no character") from None
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{where} is no JSON: {error}") from None
            yield number, row, where


def parse(where: str, number: int, row: Any, defaults: SamplingOptions) -> Request:
    """The request that a row asks for. Raises RequestError that says `where` it stands."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise RequestError(f'{where}: expected an object with either "prompt" or "messages"')
    prompt = row.get("prompt", row.get("messages"))
    if not isinstance(prompt, str if "prompt" in row else list) or not prompt:
        raise RequestError(f"{where}: prompt must be a text and messages a list, neither of them empty")
    if "messages" in row:
        try:
            check_messages(prompt)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
    settings = {key: value for key, value in row.items() if key in SETTINGS}
    try:
        return Request(number, row, prompt, dataclasses.replace(defaults, **settings))
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


def check_output(path: Path, source: Path) -> None:
    """Raise RequestError where writing would destroy something."""
    if path.exists() and path.stat().st_size:
        raise RequestError(f"{path} exists already and is not empty: remove it or name another file")
    if path.resolve() == source.resolve():
        raise RequestError(f"{path} is the file of requests: name another one")
    if not path.parent.is_dir():
        raise RequestError(f"{path.parent} is not a directory: make it first")


def token_ids(model, source: Path, requests: list[Request]) -> list[list[int]]:
    """The prompts as the model reads them. Raises RequestError or ContextLengthError that names the line."""
    from pdx.generation import checked_ids

    ids = []
    for request in requests:
        try:
            ids.append(checked_ids(model, request.prompt, request.options))
        except PdxError as error:
            raise type(error)(f"{source}, line {request.line}: {error}") from error
    return ids


def run(
    model, source: Path, requests: list[Request], output: Path, *, batch_size: int, kernels: str, kv_dtype: str
) -> None:
    """Answer all requests; each row is on disk as soon as it and those before it in the file are finished.

    Raises RequestError or ContextLengthError, before anything runs or is written, for a row that cannot be served.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pdx.generation import stream
    from pdx.report_text import completion_fields

    prompts = token_ids(model, source, requests)
    waiting: dict[int, dict[str, Any]] = {}
    written = tokens = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with output.open("w", encoding="utf-8") as file, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=len(requests))
        pieces = stream(
            model, prompts, [r.options for r in requests], batch_size=batch_size, kernels=kernels, kv_dtype=kv_dtype
        )
        for piece in pieces:
            if piece.completion is None:
                continue
            waiting[piece.index] = requests[piece.index].row | completion_fields(piece.completion, kernels, model.mesh)
            tokens += piece.completion.completion_tokens
            while written in waiting:
                file.write(json.dumps(waiting.pop(written), ensure_ascii=False) + "\n")
                written += 1
            file.flush()
            progress.update(task, advance=1, description=f"requests, {tokens} tokens")
    print(f"{written} answers in {output}, {tokens} tokens", file=sys.stderr)
