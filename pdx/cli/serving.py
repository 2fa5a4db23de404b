"""`pdx chat` and `pdx batch`, which use the engine."""

from __future__ import annotations

import dataclasses
import io
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pdx.cli import streams
from pdx.cli.app import (
    DraftLengthOption,
    DtypeOption,
    JsonOption,
    KernelsOption,
    KvDtypeOption,
    MeshOption,
    ModelOption,
    QuantizeOption,
    SpeculateOption,
    app,
    check_names,
    load_model,
)
from pdx.errors import RequestError
from pdx.io import strict_json
from pdx.weights.builtin import DEFAULT_MODEL

ProfileOption = Annotated[str | None, typer.Option("--engine", help="A profile of configs/engines/ or a TOML file.")]
SlotsOption = Annotated[int | None, typer.Option(help="Requests that decode together.", min=1)]
TokenBudgetOption = Annotated[int | None, typer.Option(help="The most tokens of a step, decode rows included.", min=1)]
MaxTokensOption = Annotated[int, typer.Option(help="Stop an answer after this many tokens.")]
TemperatureOption = Annotated[
    float | None, typer.Option(help="0 is greedy. Default: greedy; for chats, what the model's files recommend.")
]
TopPOption = Annotated[float | None, typer.Option(help="Keep the smallest set of tokens with this total probability.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]


def engine_config(profile: str | None, **settings):
    """A profile's `EngineConfig` with the given settings; None and `auto` leave the profile's value."""
    from pdx.engine.config import EngineConfig

    given = {name: value for name, value in settings.items() if value not in (None, "auto")}
    return EngineConfig.from_toml(profile, **given) if profile else EngineConfig(**given)


def drafts_of(speculate: str | None, draft_length: str, *, is_varied: bool = False) -> dict[str, str | None]:
    """The settings of an engine for these options. Raises RequestError; `is_varied`: `--vary` gives one of them."""
    from pdx.speculative.options import asked

    if not is_varied and (speculate is not None or draft_length != "auto"):
        asked(speculate, draft_length)
    return {"speculate": speculate, "draft_length": draft_length}


def _asked(**settings):
    """The settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def start_engine(model, config):
    """A started engine. A progress bar is shown while it compiles."""
    from pdx import Engine
    from pdx.weights.progress import progress_bar

    engine = Engine(model, config)
    with progress_bar(unit="programs") as bar:
        engine.start(bar)
    return engine


@app.command()
def chat(
    model: ModelOption = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    profile: ProfileOption = None,
    dtype: DtypeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    quantize: QuantizeOption = None,
    kernels: KernelsOption = "auto",
    speculate: SpeculateOption = None,
    draft_length: DraftLengthOption = "auto",
    mesh: MeshOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the conversation as one JSON object, at its end.")
    ] = False,
) -> None:
    """Talk to a model. Its KV cache is kept between turns, so that only new tokens are prefilled."""
    from pdx.clients.chat import Chat, check_template, converse, input_lines
    from pdx.generation.results import completion_fields
    from pdx.layers.kernels import explain_mixed
    from pdx.sampling.options import SamplingOptions

    asked = _asked(temperature=temperature, top_p=top_p)
    options = SamplingOptions(max_tokens=max_tokens, seed=seed, **asked)
    streams.check_argument("--system", system)
    drafts = drafts_of(speculate, draft_length)
    config = engine_config(profile, slots=1, prefill_rows=1, kv_dtype=kv_dtype, kernels=kernels, **drafts)
    if not config.prefix_cache:
        raise RequestError(
            f"profile {profile} has prefix_cache = false: a chat would prefill the whole conversation in every turn"
        )
    check_names(config.kernels, config.kv_dtype, quantize)
    loaded = load_model(model, dtype, mesh, quantize)
    check_template(loaded.tokenizer, system)  # before anything is compiled
    options = dataclasses.replace(options, **{**loaded.sampling, **asked})
    with start_engine(loaded, config) as engine:
        talk = Chat(engine, options, system)
        turns = converse(talk, input_lines(encoding=streams.encoding()), out=io.StringIO() if as_json else None)
    if as_json:
        print(
            strict_json.dumps(
                {
                    "model": loaded.name,
                    "messages": talk.messages,
                    "turns": [
                        completion_fields(done, {"mixed": explain_mixed(engine.config.kernels)}, loaded.mesh)
                        for done in turns
                    ],
                },
                ensure_ascii=False,
            )
        )


@app.command()
def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl", help="Requests: rows with prompt or messages and settings, or OpenAI's batch rows."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Answers, in the same order.")],
    model: ModelOption = DEFAULT_MODEL,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    profile: ProfileOption = None,
    slots: SlotsOption = None,
    token_budget: TokenBudgetOption = None,
    dtype: DtypeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    quantize: QuantizeOption = None,
    kernels: KernelsOption = "auto",
    speculate: SpeculateOption = None,
    draft_length: DraftLengthOption = "auto",
    mesh: MeshOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of requests with continuous batching. After an interruption, the same command resumes."""
    from pdx.clients import batch_job
    from pdx.clients.batch_file import check_output, ignored_names
    from pdx.io.outputs import is_ordinary, locked
    from pdx.sampling.options import SamplingOptions

    asked = _asked(temperature=temperature, top_p=top_p)
    options = SamplingOptions(max_tokens=max_tokens, seed=seed, **asked)
    drafts = drafts_of(speculate, draft_length)
    config = engine_config(
        profile, slots=slots, token_budget=token_budget, kv_dtype=kv_dtype, kernels=kernels, **drafts
    )
    requests = batch_job.read(source, options, asked)
    config = dataclasses.replace(config, num_logprobs=max(config.num_logprobs, batch_job.num_logprobs(requests)))
    check_output(output, source)
    check_names(config.kernels, config.kv_dtype, quantize)
    with locked(output, "pdx batch") if is_ordinary(output) else nullcontext():
        batch_job.check_journal(output, requests)
        loaded = load_model(model, dtype, mesh, quantize)
        if unread := ignored_names(loaded, requests):
            print(f"note: the chat template does not read {', '.join(unread)}: ignored", file=sys.stderr)
        with start_engine(loaded, config) as engine:
            tally = batch_job.run_file(engine, output, requests)
    if as_json:
        print(
            strict_json.dumps(
                {
                    "output": str(output),
                    "rows": len(requests),
                    "resumed_rows": tally.resumed,
                    "failed_rows": tally.failed,
                    "completion_tokens": tally.tokens,
                }
            )
        )
    else:
        print(
            f"{len(requests)} answers in {output}, {tally.tokens} tokens; {tally.resumed} rows were finished before",
            file=sys.stderr,
        )
    if tally.failed:
        raise RequestError(f"{tally.failed} of {len(requests)} requests failed: see `error` in their rows of {output}")
