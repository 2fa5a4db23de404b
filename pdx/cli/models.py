"""`pdx models`, `pdx convert` and `pdx quantize`: what there is to run, and in what form."""

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
    """List what is built in, what is in the cache, and what can be loaded."""
    from pdx.weights.listing import list_models

    rows = list_models()
    if as_json:
        print(strict_json.dumps({"models": rows}, indent=2))
    else:
        _print_models(rows)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="What to convert; anything --model takes.")],
    directory: Annotated[Path, typer.Argument(help="A new directory, which is a model argument from then on.")],
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Save config, tokenizer and parameters as a checkpoint that loads faster."""
    from pdx.weights.checkpoint import reserved

    with reserved(directory):
        _save(load_model(model, dtype, None), directory, as_json)


@app.command()
def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What to quantize; anything --model takes.")],
    directory: Annotated[Path, typer.Argument(help="A new directory, which is a model argument from then on.")],
    policy: QuantizeOption = "int4",
    method: Annotated[str, typer.Option(help="rtn (to the nearest), awq (activation-aware scaling) or gptq.")] = "gptq",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text that awq and gptq look at; without it, docstrings of the standard library."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Of 512 tokens, taken from that text.", min=1)] = 16,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Quantize a model, with a calibration text if need be, and save it as a checkpoint."""
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
        refuse_without_effect(context, "rtn rounds to the nearest and looks at no text", "calibration", "sequences")
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
    from pdx.weights.progress import still

    with still(f"saving to {directory}"):
        save(model, directory)
    if as_json:
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        print(strict_json.dumps({"model": model.name, "directory": str(directory), "size_bytes": size}))
    else:
        print(f"saved {model.name} to {directory}", file=sys.stderr)


def _print_models(rows: list[dict[str, Any]]) -> None:
    """A table of what `pdx models` knows."""
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
