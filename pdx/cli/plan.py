"""`pdx plan`: predictions for a model on a chip, without running it."""

from __future__ import annotations

from typing import Annotated

import typer

from pdx.cli.app import DraftLengthOption, JsonOption, QuantizeOption, app, print_table
from pdx.errors import RequestError
from pdx.io import strict_json


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="A shape of `configs/`, a TOML file, or a model as for --model; reads no weights.")
    ],
    on: Annotated[str, typer.Option("--chip", help="v5e, h100, ...; several as v5e-8.")] = "v5e",
    quantize: QuantizeOption = None,
    kv_dtype: Annotated[
        str, typer.Option(help="Type of the KV cache: auto (as the activations), f32, bf16 or int8.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Activations and unquantized weights: auto, f32 or bf16.")] = "auto",
    batch: Annotated[int, typer.Option(help="Rows that decode together.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    context: Annotated[
        int | None, typer.Option(help="Tokens that a row holds; default: 2048, or what prompt and answer need.")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer, for its E2E time; default: 256, or what --context leaves.")
    ] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="TTFT objective in milliseconds.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="TPOT objective in milliseconds.")] = None,
    compiles: Annotated[
        bool, typer.Option("--compile", help="Also compile the steps with the chip's compiler, which takes minutes.")
    ] = False,
    speculate: Annotated[
        str | None, typer.Option(help="Also what drafts are worth: ngram, self:LAYERS or draft:SHAPE.")
    ] = None,
    draft_length: DraftLengthOption = "auto",
    acceptance: Annotated[
        list[float] | None, typer.Option(help="Share of drafted tokens that is kept; more than one may be given.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict whether a model fits a chip, how fast it can be there, and which optimizations pay."""
    from pdx import plan as planning
    from pdx.plan import published, speculation
    from pdx.plan.compiled import compiled
    from pdx.plan.text import show
    from pdx.speculative.options import asked
    from pdx.weights.progress import slow_notice

    drafts = asked(speculate, draft_length)
    if drafts is None and acceptance:
        raise RequestError("--acceptance has no effect without --speculate")
    ttft, tpot = (None if x is None else x / 1e3 for x in (slo_ttft, slo_tpot))
    found = planning.make(
        model,
        published.shape(model),
        on,
        quantize=quantize,
        kv_dtype=kv_dtype,
        dtype=dtype,
        batch=batch,
        prompt=prompt,
        context=context,
        output_tokens=output_tokens,
        slo_ttft=ttft,
        slo_tpot=tpot,
    )
    worth = speculation.predict(found, drafts, acceptance or ()) if drafts else []
    with slow_notice(f"compiling prefill and decode for {found.chip.name}"):
        steps = compiled(found) if compiles else []
    if as_json:
        fields = found.to_dict() | {"advice": planning.advice(found)}
        if worth:
            fields["speculation"] = [p.to_dict() for p in worth]
        print(strict_json.dumps(fields | ({"compiled": [x.to_dict() for x in steps]} if compiles else {})))
    else:
        show(found, steps)
        if worth:
            print_table(speculation.table(worth), False)
