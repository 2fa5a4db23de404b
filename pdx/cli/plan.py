"""`pdx plan`: what is predicted without running anything."""

from __future__ import annotations

from typing import Annotated

import typer

from pdx import strict_json
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
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer, for its end-to-end time.")] = 256,
    slo_ttft: Annotated[float | None, typer.Option(help="Milliseconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Milliseconds a token.")] = None,
    compiles: Annotated[bool, typer.Option("--compile", help="Ask the chip's own compiler too, which takes "
                                           "minutes.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Does a model fit a chip, how fast can it be there, and what should be switched on?"""
    from pdx import known
    from pdx import plan as planning
    from pdx.plan.compiled import compiled
    from pdx.plan.text import show

    ttft, tpot = (None if x is None else x / 1e3 for x in (slo_ttft, slo_tpot))
    found = planning.make(model, known.shape(model), on, quantize=quantize, kv_dtype=kv_dtype, dtype=dtype,
                          batch=batch, prompt=prompt, context=context, output_tokens=output_tokens, slo_ttft=ttft,
                          slo_tpot=tpot)  # fmt: skip
    steps = compiled(found) if compiles else []
    if as_json:
        said = found.to_dict() | {"advice": planning.advice(found)}
        print(strict_json.dumps(said | ({"compiled": [x.to_dict() for x in steps]} if compiles else {})))
    else:
        show(found, steps)
