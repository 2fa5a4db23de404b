"""A file of requests to a file of answers, any number of rows, resumable: `pdx batch IN.jsonl OUT.jsonl` through the
engine, and its short form `pdx generate --prompts IN.jsonl --output OUT.jsonl` in static batches.

While the job runs, finished rows lie in a journal beside the output (`pdx.clients.journal`), each on disk as soon as
it is done. A run that is interrupted, even killed, is resumed by the same command: it reads the journal and computes
the other rows. When all are there the output is written in the order of the input, in one piece, and the journal goes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pdx import __version__
from pdx.clients import openai_answers, openai_rows
from pdx.clients.batch_file import Request, has_half_pair, parse, prompt_of, rows_of, token_ids
from pdx.clients.journal import InOrder, Journal, check_job, path_of
from pdx.errors import EngineError, NotFiniteError, RequestError
from pdx.generation import stream
from pdx.generation.completion import Completion
from pdx.generation.generator import cache_dtype
from pdx.generation.results import completion_fields
from pdx.io.outputs import is_ordinary
from pdx.layers.kernels import explain, explain_mixed
from pdx.quant import Policy
from pdx.sampling.options import SamplingOptions
from pdx.speculative.options import Speculation

# Requests under way for each slot of the engine: one that runs and one that waits, so that no slot is ever empty.
AHEAD = 2


def read(path: Path, defaults: SamplingOptions, asked: Mapping[str, Any] | None = None) -> list[Request]:
    """Read and check all rows: those of `pdx generate --prompts`, or OpenAI's batch rows with custom_id and body.

    `asked`: the settings in `defaults` that the user gave, which go before those that the model's files recommend.
    A row that cannot be served is a request with an `error`. Raises RequestError for what no row can answer for: a line
    that is no JSON, one custom_id for two rows, a file without rows.
    """
    requests, seen = [], {}
    for number, row, where in rows_of(path):
        request = _request(number, row, defaults)
        requests.append(dataclasses.replace(request, settings={**(asked or {}), **request.settings}))
        name = row.get("custom_id") if openai_rows.is_openai(row) else None
        if isinstance(name, str) and seen.setdefault(name, number) != number:
            raise RequestError(
                f"{where}: custom_id {name!r} stands in line {seen[name]} too: give each row one of its "
                "own, or nobody can tell the two answers apart"
            )
    if not requests:
        raise RequestError(f'{path} holds no requests: one JSON object a line, such as {{"prompt": "Hello"}}')
    return requests


def _request(number: int, row: Any, defaults: SamplingOptions) -> Request:
    if has_half_pair(row):
        shown = json.loads(json.dumps(row, ensure_ascii=False).encode(errors="replace"))  # the answer repeats it
        error = RequestError("the row holds half a surrogate pair, which is no character")
        return Request(number, shown, None, defaults, error=error)
    try:
        if openai_rows.is_openai(row):
            return openai_rows.parse(number, row, defaults)
        return parse(f"line {number}", number, row, defaults)
    except RequestError as error:
        return Request(number, row, None, defaults, error=error)


def options_of(request: Request, model) -> SamplingOptions:
    """The settings of a request: those of a chat that nobody gave are as the model's files recommend."""
    if not request.is_chat:
        return request.options
    left = {name: value for name, value in model.sampling.items() if name not in request.settings}
    return dataclasses.replace(request.options, **left)


def num_logprobs(requests: list[Request]) -> int:
    """The most alternatives that any row asks for."""
    return max(request.options.logprobs or 0 for request in requests)


def job_of(engine, requests: list[Request]) -> dict[str, str]:
    """What tells one job of an engine from another."""
    config = engine.config
    alike = ["max_context", "num_logprobs", "deterministic"]
    if config.deterministic:  # to the bit only with these
        alike += ["slots", "prefill_rows", "token_budget", "page_size"]
    job = _job(engine.model, requests, config.kv_dtype, explain_mixed(config.kernels))
    return job | {"the engine": ", ".join(f"{name} {getattr(config, name)}" for name in alike)}


def _job(
    model, requests: list[Request], kv_dtype, kernels: Any, speculation: Speculation | None = None
) -> dict[str, Any]:
    """What tells one job from another: the requests, and what the answers depend on, as settled for this device.

    Names of models and policies are no part of it: what they stand for may change.
    """
    return (
        requests_of(requests)
        | {
            "the model's files": _digest(_files(model.path)),
            "dtype": jnp.dtype(model.dtype).name,
            "quantization": _digest(Policy.of(model.params).rules),
            "kv_dtype": jnp.dtype(cache_dtype(kv_dtype, model)).name,
            "kernels": kernels,
            "the version of pdx": __version__,
        }
        | ({"speculation": str(speculation)} if speculation else {})
    )


def requests_of(requests: list[Request]) -> dict[str, str]:
    """The part of a job that is known before a model is loaded."""
    return {"the requests or their settings": _digest([dataclasses.asdict(r) for r in requests])}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of what a model is read from."""
    kinds = (".json", ".safetensors", ".model", ".jinja", ".txt", ".gguf")
    inside = (p for p in path.rglob("*") if p.is_file() and (p.suffix in kinds or "params" in p.parts))
    files = sorted(inside) if path.is_dir() else [path]
    return [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


@dataclasses.dataclass
class Tally:
    """What a run of a job did."""

    rows: int = 0
    resumed: int = 0
    failed: int = 0
    tokens: int = 0


def run(
    engine,
    requests: list[Request],
    journal: Journal | InOrder,
    *,
    progress: Callable[[Tally], None] = lambda tally: None,
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


async def _work(engine, left: Iterator[Request], journal: Journal | InOrder, tally: Tally, progress) -> None:
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
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def _answer(engine, request: Request, tally: Tally) -> dict[str, Any]:
    try:
        if request.error:
            raise request.error
        prompt = await asyncio.to_thread(prompt_of, engine.model, request)
        async for output in engine.stream(prompt, options_of(request, engine.model)):
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
    if openai_rows.is_openai(request.row):
        return openai_answers.answered(request, done, fields, engine.model.tokenizer, engine.model.name)
    return request.row | fields


def _failed(request: Request, error: Exception) -> dict[str, Any]:
    if openai_rows.is_openai(request.row):
        return openai_answers.failed(request, error)
    row = request.row if isinstance(request.row, dict) else {"row": request.row}
    return row | {"error": {"code": type(error).__name__, "message": str(error)}}


def check_journal(output: Path, requests: list[Request]) -> None:
    """Raise RequestError where the journal of an output is of other requests: known before a model is loaded."""
    path = path_of(output)
    if is_ordinary(output) and path.exists():
        check_job(path, path.read_bytes(), requests_of(requests))


def run_file(engine, output: Path, requests: list[Request]) -> Tally:
    """The whole job with a progress bar on standard error. The caller holds the lock on `output`."""
    journal = _opened(output, job_of(engine, requests), requests)
    with _progress_bar(journal, requests) as show:
        begin = time.perf_counter()

        def progress(tally: Tally) -> None:
            found, seconds = engine.metrics(), max(time.perf_counter() - begin, 1e-9)
            prefill, decode = found.prefill_tokens / seconds, found.decode_tokens / seconds
            show(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s")

        return run(engine, requests, journal, progress=progress)


def run_offline(
    model,
    source: Path,
    requests: list[Request],
    output: Path,
    *,
    batch_size: int,
    kernels: str,
    kv_dtype: str,
    speculate: Speculation | None = None,
) -> Tally:
    """The same without an engine, in static batches: `pdx generate --prompts`. The caller holds the lock on `output`.

    Raises RequestError or ContextLengthError, before anything runs or is written, for a row that cannot be served, and
    NotFiniteError for one whose logits are NaN or infinite; what is finished is kept.
    """
    prompts = token_ids(model, source, requests)
    journal = _opened(output, _job(model, requests, kv_dtype, explain(kernels), speculate), requests)
    lines = [r.line for r in requests]
    tally = Tally(resumed=len(journal.done))
    left = [(r, ids) for r, ids in zip(requests, prompts, strict=True) if r.line not in journal.done]
    try:
        with _progress_bar(journal, requests) as show:
            settings = {"batch_size": batch_size, "kernels": kernels, "kv_dtype": kv_dtype, "speculate": speculate}
            for piece in stream(model, [ids for _, ids in left], [r.options for r, _ in left], **settings):
                if (done := piece.completion) is None:
                    continue
                request, _ = left[piece.index]
                journal.add(request.line, request.row | completion_fields(done, kernels, model.mesh))
                tally.rows, tally.tokens = tally.rows + 1, tally.tokens + done.completion_tokens
                show(f"requests, {tally.tokens} tokens")
        journal.finish(lines)
    except NotFiniteError as error:
        where = f"{source}, line {left[error.index][0].line}"
        raise NotFiniteError(f"{where}: {error.reason}; {len(journal.done)} answers are in {journal.path}") from error
    finally:
        journal.close()
    return tally


def _opened(output: Path, job: Any, requests: list[Request]) -> Journal | InOrder:
    lines = [r.line for r in requests]
    journal = Journal(output, job, lines) if is_ordinary(output) else InOrder(output, lines)
    if journal.done:
        print(f"going on: {len(journal.done)} of {len(requests)} rows were finished before", file=sys.stderr)
    return journal


@contextmanager
def _progress_bar(journal: Journal | InOrder, requests: list[Request]) -> Iterator[Callable[[str], None]]:
    """A bar on standard error of the rows that are finished; what it gives shows a text beside it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=len(requests), completed=len(journal.done))
        yield lambda said: bar.update(task, completed=len(journal.done), description=said)
