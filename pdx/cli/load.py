"""`pdx bench load` and `pdx bench engine`: the engine under load."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pdx.cli.app import DtypeOption, JsonOption, ModelOption, QuantizeOption, bench_app, load_model
from pdx.weights.builtin import DEFAULT_MODEL


@bench_app.command("engine")
def bench_engine(
    model: ModelOption = DEFAULT_MODEL,
    only: Annotated[list[str] | None, typer.Option(help="throughput, gap, prefix or overhead; more than one may be "
                                                   "given. Without it, all.")] = None,
    peer: Annotated[bool, typer.Option(help="Also run transformers on the same weights, if it is installed.")] = True,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the engine is held to: throughput, stalls, prefix reuse and overhead, each as a ratio beside its target."""
    from pdx.bench import engine_figures as figures

    found, notes = figures.run(load_model(model, dtype, None, quantize), only or (), peer=peer)
    if as_json:
        print(json.dumps({"figures": [f.to_dict() for f in found], "notes": notes}))
    else:
        print("\n".join([figures.table(found), *notes]))
