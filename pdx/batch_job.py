"""A file of requests through the engine: `pdx batch IN.jsonl OUT.jsonl`, any number of rows, resumable.

While the job runs, finished rows lie in a journal beside the output, in the order in which they finished, each on disk
as soon as it is done. A run that is interrupted, even killed, is resumed by the same command: it reads the journal,
drops a line that was cut short, and computes the other rows. When all are there the output is written in the order of
the input, in one piece, and the journal goes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pdx.batch_file import SETTINGS, Request, check_output, parse, rows_of
from pdx.completion import Completion
from pdx.errors import EngineError, RequestError
from pdx.layers.attention import explain_mixed
from pdx.report_text import completion_fields
from pdx.sampling_options import SamplingOptions

# Of OpenAI's batch rows: what asks for something that would be answered otherwise.
REFUSED = ("tools", "functions", "response_format", "suffix", "echo", "best_of", "audio", "modalities")
URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
# Requests under way for each slot of the engine: one that runs and one that waits, so that no slot is ever empty.
AHEAD = 2


def read(path: Path, defaults: SamplingOptions) -> list[Request]:
    """Read and check all rows: those of `pdx generate --prompts`, or OpenAI's batch rows with custom_id and body.

    Raises RequestError that names the line.
    """
    requests, seen = [], set()
    for number, row, where in rows_of(path):
        plain = row
        if isinstance(row, dict) and "body" in row:
            plain = _from_openai(row, where)
            if row["custom_id"] in seen:
                raise RequestError(f"{where}: custom_id {row['custom_id']!r} stands in an earlier line too")
            seen.add(row["custom_id"])
        requests.append(dataclasses.replace(parse(where, number, plain, defaults), row=row))
    if not requests:
        raise RequestError(f"{path} holds no requests: one JSON object a line, such as " '{"prompt": "Hello"}')
    return requests


def _from_openai(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of an OpenAI batch row under the names of `SamplingOptions`."""
    body, url = row["body"], row.get("url", "/v1/chat/completions")
    if not isinstance(body, dict) or not isinstance(row.get("custom_id"), str):
        raise RequestError(f"{where}: a batch row needs a custom_id and a body, which is an object")
    if row.get("method", "POST") != "POST" or url not in URLS:
        raise RequestError(f"{where}: method must be POST and url one of {', '.join(URLS)}, got {url!r}")
    wrong = [key for key in REFUSED if body.get(key)] + [key for key in ("n",) if body.get(key, 1) != 1]
    if wrong:
        raise RequestError(f"{where}: {wrong[0]} is not supported: leave it out")
    given = {key: value for key, value in body.items() if key in SETTINGS and value is not None}
    if "max_completion_tokens" in body:
        given["max_tokens"] = body["max_completion_tokens"]
    if isinstance(body.get("logprobs"), bool):  # chat says whether, and apart from it how many
        given.pop("logprobs", None)
        if body["logprobs"]:
            given["logprobs"] = body.get("top_logprobs", 0)
    return given | {key: body[key] for key in (URLS[url],) if key in body}


class Journal:
    """Finished rows of a job on disk, by the line they come from.

    Args:
      output: what the job is to write; the journal lies beside it.
      key: what the job is: a journal of another one is refused.
    """

    def __init__(self, output: Path, key: str):
        self.output, self.path = output, output.with_name(output.name + ".journal")
        self.done: dict[int, str] = {}
        header = json.dumps({"job": key})
        kept = self._read(header) if self.path.exists() else 0
        self._file = self.path.open("r+b" if kept else "wb")
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            self._append(header)

    def _read(self, header: str) -> int:
        """Take up what an earlier run finished; how many bytes of its journal are whole."""
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break  # the process was killed while it wrote this
                if number == 0 and line.decode() != header + "\n":
                    raise RequestError(
                        f"{self.path} is of another job (other requests, another model or other settings): finish that "
                        "one, or remove the file to begin anew"
                    )
                if number:
                    at, _, row = line.decode().rstrip("\n").partition(" ")
                    self.done[int(at)] = row
                whole += len(line)
        return whole

    def add(self, line: int, row: Mapping[str, Any]) -> None:
        """Keep the answer to the request of a line."""
        text = json.dumps(row, ensure_ascii=False)
        self._append(f"{line} {text}")
        self.done[line] = text

    def _append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()  # to the system: a killed process loses nothing of it

    def finish(self, lines: list[int]) -> None:
        """Write the output in the order of `lines`, in one piece, and remove the journal."""
        whole = self.output.with_name(self.output.name + ".part")
        with whole.open("w", encoding="utf-8") as file:
            file.writelines(self.done[line] + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self.output)
        self.close()
        self.path.unlink()

    def close(self) -> None:
        self._file.close()


def job_key(source: Path, *settings: Any) -> str:
    """What tells one job from another: the requests, byte for byte, and all settings."""
    digest = hashlib.sha256(source.read_bytes())
    digest.update(repr(settings).encode())
    return digest.hexdigest()


@dataclasses.dataclass
class Tally:
    """What a run of a job did."""

    rows: int = 0
    resumed: int = 0
    failed: int = 0
    tokens: int = 0


def run(
    engine, requests: list[Request], journal: Journal, *, progress: Callable[[Tally], None] = lambda tally: None
) -> Tally:
    """Answer what the journal does not hold, and write the output. A row that cannot be served gets an `error`.

    Raises EngineError where the engine itself is gone: the journal stays, for another run.
    """
    lines = [r.line for r in requests]
    tally = Tally(resumed=sum(line in journal.done for line in lines))
    left = iter([r for r in requests if r.line not in journal.done])
    try:
        asyncio.run(_work(engine, left, journal, tally, progress))
        tally.failed = sum(bool(json.loads(journal.done[line]).get("error")) for line in lines)
        journal.finish(lines)
    finally:
        journal.close()
    return tally


async def _work(engine, left: Iterator[Request], journal: Journal, tally: Tally, progress) -> None:
    async def worker() -> None:
        for request in left:
            row = await _answer(engine, request, tally)
            journal.add(request.line, row)
            tally.rows += 1
            progress(tally)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AHEAD * engine.config.slots, engine.config.max_queue)):
                group.create_task(worker())
    except* EngineError as group:
        raise group.exceptions[0] from None


async def _answer(engine, request: Request, tally: Tally) -> dict[str, Any]:
    try:
        async for output in engine.stream(request.prompt, request.options):
            completion = output.completion
    # Whatever it is, it is this row's: the others go on, and the row says what it was.
    except Exception as error:
        if engine.is_closed:
            raise EngineError(f"{error}; what is finished is kept: the same command goes on from there") from error
        return _failed(request, error)
    tally.tokens += completion.completion_tokens
    return _answered(engine, request, completion)


def _answered(engine, request: Request, done: Completion) -> dict[str, Any]:
    fields = completion_fields(done, {"mixed": explain_mixed(engine.config.kernels)}, engine.model.mesh)
    if "body" not in request.row:
        return request.row | fields
    is_chat = "messages" in request.row["body"]
    said = {"message": {"role": "assistant", "content": done.text}} if is_chat else {"text": done.text}
    return {
        "id": f"batch_req_{request.line}", "custom_id": request.row["custom_id"], "error": None,
        "response": {"status_code": 200, "request_id": f"req_{request.line}", "body": {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request.line}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()), "model": request.row["body"].get("model") or engine.model.name,
            "choices": [said | {"index": 0, "finish_reason": done.finish_reason}],
            "usage": {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens,
                      "total_tokens": done.prompt_tokens + done.completion_tokens},
            "pdx": {k: v for k, v in fields.items() if k not in ("text", "prompt_tokens", "completion_tokens")},
        }},
    }  # fmt: skip


def _failed(request: Request, error: Exception) -> dict[str, Any]:
    said = {"code": type(error).__name__, "message": str(error)}
    if "body" not in request.row:
        return request.row | {"error": said}
    return {"id": f"batch_req_{request.line}", "custom_id": request.row["custom_id"], "response": None, "error": said}


def run_file(engine, source: Path, output: Path, requests: list[Request], *settings: Any) -> Tally:
    """The whole job with a progress bar on standard error; `settings`: what the answers depend on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    check_output(output, source)
    journal = Journal(output, job_key(source, *settings))
    if journal.done:
        print(f"going on: {len(journal.done)} of {len(requests)} rows were finished before", file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=len(requests), completed=len(journal.done))
        begin = time.perf_counter()

        def progress(tally: Tally) -> None:
            found, seconds = engine.metrics(), max(time.perf_counter() - begin, 1e-9)
            prefill, decode = found.prefill_tokens / seconds, found.decode_tokens / seconds
            said = f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s"
            bar.update(task, completed=tally.resumed + tally.rows, description=said)

        return run(engine, requests, journal, progress=progress)
