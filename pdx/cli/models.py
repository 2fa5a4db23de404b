"""`pdx models`, `pdx convert` and `pdx quantize`: listing models and making checkpoints."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pdx.cli.app import DtypeOption, JsonOption, QuantizeOption, app, load_model, refuse_without_effect
from pdx.errors import RequestError
from pdx.io import strict_json


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the models that can be loaded by name."""
    from pdx.weights.listing import list_models

    rows = list_models()
    if as_json:
        print(strict_json.dumps({"models": rows}, indent=2))
    else:
        _print_models(rows)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="The model to convert, as for --model.")],
    directory: Annotated[Path, typer.Argument(help="A new directory for the checkpoint; --model accepts it.")],
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Save configuration, tokenizer and parameters as a checkpoint that loads faster."""
    from pdx.weights.checkpoint import reserved

    with reserved(directory):
        _save(load_model(model, dtype, None), directory, as_json)


@app.command()
def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model to quantize, as for --model.")],
    directory: Annotated[Path, typer.Argument(help="A new directory for the checkpoint; --model accepts it.")],
    policy: QuantizeOption = "int4",
    method: Annotated[
        str, typer.Option(help="rtn (round to nearest), awq (activation-aware scaling) or gptq.")
    ] = "gptq",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Calibration text for awq and gptq; default: docstrings of the standard library."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of 512 tokens taken from that text.", min=1)] = 16,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Quantize a model, with a calibration text for awq and gptq, and save it as a checkpoint."""
    from pdx import calibration as calibrating
    from pdx.calibration import stdlib_texts
    from pdx.io import inputs
    from pdx.quant import Policy
    from pdx.weights.checkpoint import reserved
    from pdx.weights.progress import progress_bar

    if not Policy.parse(policy):
        raise RequestError(f"--quantize {policy} quantizes nothing: `pdx convert` saves a model as it is")
    calibrating.check_method(method)
    if method == "rtn":
        refuse_without_effect(context, "rtn rounds to nearest and uses no text", "calibration", "sequences")
    text = inputs.read(calibration, stdlib_texts.calibration) if method != "rtn" else ""
    with reserved(directory):
        if method == "rtn":
            done = load_model(model, dtype, None, policy)
        else:
            loaded = load_model(model, dtype, None)
            with progress_bar(unit="layers") as bar:
                done = calibrating.quantize_model(
                    loaded, policy, text, method, sequences=sequences, progress=partial(bar, method)
                )
        _save(done, directory, as_json)


def _save(model, directory: Path, as_json: bool) -> None:
    from pdx.weights.checkpoint import save
    from pdx.weights.progress import slow_notice

    with slow_notice(f"saving to {directory}"):
        save(model, directory)
    if as_json:
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        print(strict_json.dumps({"model": model.name, "directory": str(directory), "size_bytes": size}))
    else:
        print(f"saved {model.name} to {directory}", file=sys.stderr)


def _print_models(rows: list[dict[str, Any]]) -> None:
    """Print the models as a table."""
    from rich.markup import escape

    from pdx.io.tables import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[escape(_cell(row.get(column))) for column in columns] for row in rows]
    Table(columns, cells, left=set(columns) - {"size_mb"}).show()
    print("also: a .gguf file, a Hugging Face directory (safetensors), a hub id,\nor a checkpoint of `pdx convert`")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
