"""`pdx chat` and `pdx batch`: what stands on the engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pdx.cli.app import (
    DtypeOption,
    KernelsOption,
    KvDtypeOption,
    MeshOption,
    ModelOption,
    QuantizeOption,
    app,
    load_model,
)
from pdx.errors import RequestError
from pdx.weights.builtin import DEFAULT_MODEL

ProfileOption = Annotated[str | None, typer.Option("--engine", help="A profile of configs/engines/ or a TOML file.")]
SlotsOption = Annotated[int | None, typer.Option(help="Requests that decode together.", min=1)]
TokenBudgetOption = Annotated[int | None, typer.Option(help="Tokens of a step, decode rows included.", min=1)]
MaxTokensOption = Annotated[int, typer.Option(help="Stop an answer after this many tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option(help="Keep the smallest set of this probability.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]


def engine_config(profile: str | None, **settings):
    """A profile with those settings that say something: not None, and not auto, which leaves it to the profile."""
    from pdx.engine.config import EngineConfig

    given = {name: value for name, value in settings.items() if value not in (None, "auto")}
    return EngineConfig.from_toml(profile, **given) if profile else EngineConfig(**given)


def start_engine(model, config):
    """A compiled engine, with a bar while it compiles."""
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
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    profile: ProfileOption = None,
    dtype: DtypeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    quantize: QuantizeOption = None,
    kernels: KernelsOption = "auto",
    mesh: MeshOption = None,
) -> None:
    """Talk to a model; its cache lives from turn to turn, so that only new tokens are prefilled."""
    from pdx.chat import Chat, converse, typed
    from pdx.sampling_options import SamplingOptions

    options = SamplingOptions(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config = engine_config(profile, slots=1, prefill_rows=1, kv_dtype=kv_dtype, kernels=kernels)
    if not config.prefix_cache:
        raise RequestError(f"profile {profile} has prefix_cache = false: a chat would prefill every turn anew")
    loaded = load_model(model, dtype, mesh, quantize)
    loaded.tokenizer.encode_chat([{"role": "user", "content": "Hello"}])  # a model without a template says so now
    with start_engine(loaded, config) as engine:
        converse(Chat(engine, options, system), typed())


@app.command()
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests: prompt or messages and settings a row, "
                                           "or OpenAI's batch rows.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Answers, in the same order.")],
    model: ModelOption = DEFAULT_MODEL,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    profile: ProfileOption = None,
    slots: SlotsOption = None,
    token_budget: TokenBudgetOption = None,
    dtype: DtypeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    quantize: QuantizeOption = None,
    kernels: KernelsOption = "auto",
    mesh: MeshOption = None,
) -> None:
    """Answer a file of requests with continuous batching. Interrupted, the same command goes on where it was."""
    from pdx import batch_job
    from pdx.batch_file import check_output
    from pdx.sampling_options import SamplingOptions

    options = SamplingOptions(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config = engine_config(profile, slots=slots, token_budget=token_budget, kv_dtype=kv_dtype, kernels=kernels)
    requests = batch_job.read(source, options)
    check_output(output, source)
    with start_engine(load_model(model, dtype, mesh, quantize), config) as engine:
        tally = batch_job.run_file(engine, source, output, requests, model, dtype, kv_dtype, quantize, options)
    print(f"{len(requests)} answers in {output}, {tally.tokens} tokens; {tally.resumed} rows were there before",
          file=sys.stderr)  # fmt: skip
    if tally.failed:
        raise RequestError(f"{tally.failed} of {len(requests)} requests failed: see `error` in their rows of {output}")
