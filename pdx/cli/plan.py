"""`pdx plan`: what is predicted without running anything."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pdx.cli.app import JsonOption, QuantizeOption, app


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A shape of `configs/`, a TOML file, or anything --model takes; weights "
                                         "are not read.")],
    on: Annotated[str, typer.Option("--chip", help="v5e, h100, ...; several as v5e-8.")] = "v5e",
    quantize: QuantizeOption = None,
    kv_dtype: Annotated[str | None, typer.Option(help="KV-cache: bfloat16, int8; without it as the weights.")] = None,
    dtype: Annotated[str, typer.Option(help="Of activations and unquantized weights.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Rows that decode together.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    context: Annotated[int, typer.Option(help="Tokens that a row holds.")] = 2048,
    slo_ttft: Annotated[float | None, typer.Option(help="Milliseconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Milliseconds a token.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Does a model fit a chip, how fast can it be there, and what should be switched on?"""
    from pdx import known
    from pdx import plan as planning

    seconds = [None if x is None else x / 1e3 for x in (slo_ttft, slo_tpot)]
    found = planning.make(model, known.config(model), on, quantize=quantize, kv_dtype=kv_dtype, dtype=dtype,
                          batch=batch, prompt=prompt, context=context, slo_ttft=seconds[0],
                          slo_tpot=seconds[1])  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        planning.show(found)
