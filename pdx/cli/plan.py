"""`pdx plan`: what is predicted without running anything."""

from __future__ import annotations

from typing import Annotated

import typer

from pdx.cli.app import JsonOption, QuantizeOption, app
from pdx.io import strict_json


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="A shape of `configs/`, a TOML file, or anything --model takes; weights are not read.")
    ],
    on: Annotated[str, typer.Option("--chip", help="v5e, h100, ...; several as v5e-8.")] = "v5e",
    quantize: QuantizeOption = None,
    kv_dtype: Annotated[str, typer.Option(help="KV-cache: auto (as the activations), f32, bf16 or int8.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Activations and unquantized weights: auto, f32 or bf16.")] = "auto",
    batch: Annotated[int, typer.Option(help="Rows that decode together.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    context: Annotated[
        int | None, typer.Option(help="Tokens that a row holds; without it 2048, or what prompt and answer need.")
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of an answer, for its end-to-end time; without it 256, or what --context leaves."),
    ] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Milliseconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Milliseconds a token.")] = None,
    compiles: Annotated[
        bool, typer.Option("--compile", help="Ask the chip's own compiler too, which takes minutes.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Does a model fit a chip, how fast can it be there, and what should be switched on?"""
    from pdx import plan as planning
    from pdx.plan import published
    from pdx.plan.compiled import compiled
    from pdx.plan.text import show
    from pdx.weights.progress import still

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
    with still(f"compiling prefill and decode for {found.chip.name}"):
        steps = compiled(found) if compiles else []
    if as_json:
        said = found.to_dict() | {"advice": planning.advice(found)}
        print(strict_json.dumps(said | ({"compiled": [x.to_dict() for x in steps]} if compiles else {})))
    else:
        show(found, steps)
