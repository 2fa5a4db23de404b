"""Resumable batch jobs, from a file of requests to a file of answers.

`pdx batch IN.jsonl OUT.jsonl` uses the engine, `pdx generate --prompts IN.jsonl --output OUT.jsonl` static batches.

While a job runs, each finished row is appended to a journal beside the output (`pdx.clients.journal`). If the job is
interrupted or killed, the same command reads the journal and computes the missing rows. When all rows are finished, the
output is written at once, in the order of the input, and the journal is removed.
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
from pdx.clients.batch_file import Request, has_lone_surrogate, parse, prompt_of, read_rows, token_ids
from pdx.clients.journal import Journal, StreamedOutput, check_job, path_of
from pdx.errors import EngineError, NotFiniteError, RequestError
from pdx.generation import stream
from pdx.generation.completion import Completion
from pdx.generation.generator import cache_dtype
from pdx.generation.results import completion_fields
from pdx.io.outputs import is_ordinary
from pdx.layers.kernels import KernelName, explain, explain_mixed
from pdx.quant import Policy
from pdx.sampling.options import SamplingOptions
from pdx.speculative.options import Speculation

# One request that runs and one that waits per slot of the engine, so that no slot becomes idle.
REQUESTS_PER_SLOT = 2


def read(path: Path, defaults: SamplingOptions, asked: Mapping[str, Any] | None = None) -> list[Request]:
    """Read and check all rows: plain rows with a prompt or messages, or OpenAI's batch rows with custom_id and body.

    `asked`: the settings in `defaults` that the user gave. They override those that the model's files recommend.
    A row that cannot be served becomes a request with an `error`. Raises RequestError for a line that is not JSON, a
    repeated custom_id, and a file without rows.
    """
    requests: list[Request] = []
    seen: dict[str, int] = {}
    for number, row, where in read_rows(path):
        request = _request(number, row, defaults)
        requests.append(dataclasses.replace(request, settings={**(asked or {}), **request.settings}))
        name = row.get("custom_id") if openai_rows.is_openai(row) else None
        if isinstance(name, str) and seen.setdefault(name, number) != number:
            raise RequestError(
                f"{where}: custom_id {name!r} is also in line {seen[name]}: give each row a different one, so that "
                "the answers can be told apart"
            )
    if not requests:
        raise RequestError(f'{path} holds no requests: one JSON object per line, such as {{"prompt": "Hello"}}')
    return requests


def _request(number: int, row: Any, defaults: SamplingOptions) -> Request:
    if has_lone_surrogate(row):
        # The answer repeats the row, so it must be encodable.
        encodable = json.loads(json.dumps(row, ensure_ascii=False).encode(errors="replace"))
        error = RequestError("the row holds half a surrogate pair, which is not a character")
        return Request(number, encodable, None, defaults, error=error)
    try:
        if openai_rows.is_openai(row):
            return openai_rows.parse(number, row, defaults)
        return parse(f"line {number}", number, row, defaults)
    except RequestError as error:
        return Request(number, row, None, defaults, error=error)


def options_of(request: Request, model) -> SamplingOptions:
    """The settings of a request. For a chat, those that nobody gave are the ones that the model's files recommend."""
    if not request.is_chat:
        return request.options
    recommended = {name: value for name, value in model.sampling.items() if name not in request.settings}
    return dataclasses.replace(request.options, **recommended)


def num_logprobs(requests: list[Request]) -> int:
    """The most alternatives (`logprobs`) that any row asks for."""
    return max(request.options.logprobs or 0 for request in requests)


def describe_engine_job(engine, requests: list[Request]) -> dict[str, str]:
    """The description of an engine's job. A journal is resumed only by a job with an equal description."""
    config = engine.config
    names = ["max_context", "num_logprobs", "deterministic"]
    if config.deterministic:  # equal bits require that these are equal too
        names += ["slots", "prefill_rows", "token_budget", "page_size"]
    job = _describe_job(engine.model, requests, config.kv_dtype, explain_mixed(config.kernels))
    if config.drafts is not None:
        job["speculation"] = str(config.drafts)
    return job | {"the engine": ", ".join(f"{name} {getattr(config, name)}" for name in names)}


def _describe_job(
    model, requests: list[Request], kv_dtype, kernels: Any, speculation: Speculation | None = None
) -> dict[str, Any]:
    """The requests, and everything that the answers depend on, with `auto` resolved for this device.

    Names of models and policies are not included, since they may mean something else later.
    """
    described = describe_requests(requests) | {
        "the model's files": _digest(_files(model.path)),
        "dtype": jnp.dtype(model.dtype).name,
        "quantization": _digest(Policy.of(model.params).rules),
        "kv_dtype": jnp.dtype(cache_dtype(kv_dtype, model)).name,
        "kernels": kernels,
        "the version of pdx": __version__,
    }
    return described | ({"speculation": str(speculation)} if speculation else {})


def describe_requests(requests: list[Request]) -> dict[str, str]:
    """The part of a job's description that is known before a model is loaded."""
    return {"the requests or their settings": _digest([dataclasses.asdict(r) for r in requests])}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and modification time of the files that a model is read from."""
    kinds = (".json", ".safetensors", ".model", ".jinja", ".txt", ".gguf")
    inside = (p for p in path.rglob("*") if p.is_file() and (p.suffix in kinds or "params" in p.parts))
    files = sorted(inside) if path.is_dir() else [path]
    return [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


@dataclasses.dataclass
class Tally:
    """The counts of one run of a job."""

    rows: int = 0  # answered in this run
    resumed: int = 0  # found in the journal
    failed: int = 0  # answered with an error
    tokens: int = 0  # generated in this run


def run(
    engine,
    requests: list[Request],
    journal: Journal | StreamedOutput,
    *,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Answer the requests that are not in the journal, and write the output. A row that cannot be served gets an
    `error`.

    Raises EngineError if the engine closes. The journal then stays for another run.
    """
    lines = [r.line for r in requests]
    tally = Tally(resumed=sum(line in journal.done for line in lines))
    left = iter([r for r in requests if r.line not in journal.done])
    try:
        asyncio.run(_answer_all(engine, left, journal, tally, progress))
        tally.failed = sum(bool(json.loads(journal.done[line]).get("error")) for line in lines)
        journal.finish(lines)
    finally:
        journal.close()
    return tally


async def _answer_all(
    engine, left: Iterator[Request], journal: Journal | StreamedOutput, tally: Tally, progress
) -> None:
    async def worker() -> None:
        for request in left:
            row = await _answer(engine, request, tally)
            journal.add(request.line, row)
            tally.rows += 1
            progress(tally)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(REQUESTS_PER_SLOT * engine.config.slots, engine.config.max_queue)):
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
    except Exception as error:  # any error belongs to this row alone, unless the engine is closed
        if engine.is_closed:
            raise EngineError(f"{error}; finished rows are kept: run the same command to resume") from error
        return _error_row(request, error)
    tally.tokens += completion.completion_tokens
    return _answer_row(engine, request, completion)


def _answer_row(engine, request: Request, done: Completion) -> dict[str, Any]:
    fields = completion_fields(done, {"mixed": explain_mixed(engine.config.kernels)}, engine.model.mesh)
    if openai_rows.is_openai(request.row):
        return openai_answers.answer_row(request, done, fields, engine.model.tokenizer, engine.model.name)
    return request.row | fields


def _error_row(request: Request, error: Exception) -> dict[str, Any]:
    if openai_rows.is_openai(request.row):
        return openai_answers.error_row(request, error)
    row = request.row if isinstance(request.row, dict) else {"row": request.row}
    return row | {"error": {"code": type(error).__name__, "message": str(error)}}


def check_journal(output: Path, requests: list[Request]) -> None:
    """Raise RequestError if the journal of an output belongs to other requests. Needs no model."""
    path = path_of(output)
    if is_ordinary(output) and path.exists():
        check_job(path, path.read_bytes(), describe_requests(requests))


def run_file(engine, output: Path, requests: list[Request]) -> Tally:
    """Run or resume a job, with a progress bar on standard error. The caller holds the lock on `output`."""
    journal = _open_journal(output, describe_engine_job(engine, requests), requests)
    with _progress_bar(journal, requests) as show:
        begin = time.perf_counter()

        def progress(tally: Tally) -> None:
            metrics, seconds = engine.metrics(), max(time.perf_counter() - begin, 1e-9)
            prefill, decode = metrics.prefill_tokens / seconds, metrics.decode_tokens / seconds
            show(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s")

        return run(engine, requests, journal, progress=progress)


def run_offline(
    model,
    source: Path,
    requests: list[Request],
    output: Path,
    *,
    batch_size: int,
    kernels: KernelName,
    kv_dtype: str,
    speculate: Speculation | None = None,
) -> Tally:
    """As `run_file`, in static batches without an engine: `pdx generate --prompts`.

    Raises RequestError or ContextLengthError for a row that cannot be served, before anything runs or is written.
    Raises NotFiniteError for a row whose logits are NaN or infinite; finished rows are kept.
    """
    prompts = token_ids(model, source, requests)
    journal = _open_journal(output, _describe_job(model, requests, kv_dtype, explain(kernels), speculate), requests)
    lines = [r.line for r in requests]
    tally = Tally(resumed=len(journal.done))
    left = [(r, ids) for r, ids in zip(requests, prompts, strict=True) if r.line not in journal.done]
    try:
        with _progress_bar(journal, requests) as show:
            settings: dict[str, Any] = {
                "batch_size": batch_size,
                "kernels": kernels,
                "kv_dtype": kv_dtype,
                "speculate": speculate,
            }
            prompts, options = [ids for _, ids in left], [r.options for r, _ in left]
            for piece in stream(model, prompts, options, **settings):
                if (done := piece.completion) is None:
                    continue
                request, _ = left[piece.index]
                journal.add(request.line, request.row | completion_fields(done, kernels, model.mesh))
                tally.rows, tally.tokens = tally.rows + 1, tally.tokens + done.completion_tokens
                show(f"requests, {tally.tokens} tokens")
        journal.finish(lines)
    except NotFiniteError as error:
        where = f"{source}, line {left[error.index or 0][0].line}"
        raise NotFiniteError(f"{where}: {error.reason}; {len(journal.done)} answers are in {journal.path}") from error
    finally:
        journal.close()
    return tally


def _open_journal(output: Path, job: Any, requests: list[Request]) -> Journal | StreamedOutput:
    lines = [r.line for r in requests]
    journal = Journal(output, job, lines) if is_ordinary(output) else StreamedOutput(output, lines)
    if journal.done:
        print(f"resuming: {len(journal.done)} of {len(requests)} rows were finished before", file=sys.stderr)
    return journal


@contextmanager
def _progress_bar(journal: Journal | StreamedOutput, requests: list[Request]) -> Iterator[Callable[[str], None]]:
    """A bar of the finished rows on standard error. Yields a function that updates it and shows a text beside it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=len(requests), completed=len(journal.done))
        yield lambda text: bar.update(task, completed=len(journal.done), description=text)
