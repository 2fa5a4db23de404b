"""`pdx generate`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pdx.cli import streams
from pdx.cli.app import (
    DtypeOption,
    JsonOption,
    KernelsOption,
    KvDtypeOption,
    MeshOption,
    ModelOption,
    QuantizeOption,
    app,
    check_names,
    load_model,
    refuse_without_effect,
)
from pdx.errors import RequestError
from pdx.io import strict_json
from pdx.weights.builtin import DEFAULT_MODEL


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads standard input without its last newline.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of tokens with this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best one's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides the logits of tokens seen; 1: off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted once from the logits of generated tokens.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Subtracted for each time a token was generated.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after an end token.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Report log-probabilities with this many alternatives.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of requests: prompt or messages, and settings.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of answers, in the order of --prompts.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests of --prompts that run together.", min=1)] = 8,
    dtype: DtypeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    quantize: QuantizeOption = None,
    kernels: KernelsOption = "auto",
    speculate: Annotated[
        str | None,
        typer.Option(help="Draft tokens, verify them together: none, ngram, draft[:MODEL], eagle[:PATH], self:LAYERS."),
    ] = None,
    draft_length: Annotated[
        str, typer.Option(help="The most drafted tokens of a step; auto: as many as pay, by step.")
    ] = "auto",
    mesh: MeshOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text; report TTFT, TPOT and E2E separately."""
    from pdx.sampling.options import SamplingOptions
    from pdx.speculative.options import asked

    # The options of the command that have the name of a sampling setting.
    names = {f.name for f in dataclasses.fields(SamplingOptions)}
    settings = {name: value for name, value in context.params.items() if name in names and value is not None}
    options = SamplingOptions(**settings)  # checked before a model is loaded
    _check_combination(context, context.params)
    run: dict[str, Any] = {"kernels": kernels, "kv_dtype": kv_dtype}
    if speculation := asked(speculate, draft_length):
        run["speculate"] = speculation
    if prompts is not None and output is not None:
        from pdx.clients.batch_file import check_output, read

        requests = read(prompts, options)
        check_output(output, prompts)
        check_names(kernels, kv_dtype, quantize)
        load = partial(load_model, model, dtype, mesh, quantize)
        _generate_file(load, prompts, requests, output, run | {"batch_size": batch_size})
        return
    text = streams.read_prompt() if prompt == "-" else prompt
    if not text:
        raise RequestError('there is no prompt: pdx generate "The capital of France is"')
    for name, given in (("the prompt", text), ("--system", system), *(("--stop", s) for s in stop or ())):
        streams.check_argument(name, given)
    check_names(kernels, kv_dtype, quantize)
    messages = [{"role": "system", "content": system}] if system is not None else []
    request: Any = [*messages, {"role": "user", "content": text}] if chat or system is not None else text
    _generate_one(load_model(model, dtype, mesh, quantize), request, options, as_json, run)


def _check_combination(context: typer.Context, given: Mapping[str, Any]) -> None:
    """Raise RequestError for options that exclude each other, and for those without effect."""
    from pdx.sampling.options import FILTERS

    if (given["prompts"] is None) != (given["output"] is None):
        raise RequestError("--prompts and --output go together")
    if given["prompts"] is not None:
        if given["prompt"] is not None:
            raise RequestError("give a PROMPT or --prompts, not both")
        if given["chat"] or given["system"] is not None:
            raise RequestError('--chat and --system are for a PROMPT: in --prompts, rows with "messages" are chats')
        refuse_without_effect(context, "the answers to --prompts are JSON already, in --output", "as_json")
        return
    refuse_without_effect(context, "it is for the requests of --prompts", "batch_size")
    if given["temperature"] == 0:
        refuse_without_effect(
            context, "a temperature of 0 always takes the best token; add --temperature", *FILTERS, "seed"
        )
    if given["logprobs"] is not None and not given["as_json"]:
        raise RequestError("--logprobs are reported in the object that --json prints: add --json")


def _generate_file(load, source: Path, requests, output: Path, run: dict) -> None:
    from pdx.clients import batch_job
    from pdx.io.outputs import is_ordinary, locked

    with locked(output, "pdx generate --prompts") if is_ordinary(output) else nullcontext():
        batch_job.check_journal(output, requests)
        tally = batch_job.run_offline(load(), source, requests, output, **run)
    print(f"{len(requests)} answers in {output}, {tally.tokens} tokens", file=sys.stderr)


def _generate_one(model, request, options, as_json: bool, run: dict) -> None:
    from pdx.generation import results, stream
    from pdx.weights.progress import notify_if_slow

    completion, held = None, ""
    pieces = notify_if_slow(stream(model, request, options, **run), "compiling programs for this shape")
    try:
        for number, piece in enumerate(pieces):
            held += piece.text
            # The first piece is printed together with the second, because the notice of a compilation may come between.
            if not as_json and (number or piece.completion):
                sys.stdout.write(held)
                sys.stdout.flush()
                held = ""
            completion = piece.completion or completion
    finally:
        if not as_json:  # the first piece, if an error followed it
            sys.stdout.write(held)
            sys.stdout.flush()
    if as_json:
        fields = results.completion_fields(completion, run["kernels"], model.mesh)
        print(strict_json.dumps(fields, ensure_ascii=False))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    print(results.summary(completion, run["kernels"], model.mesh), file=sys.stderr)
