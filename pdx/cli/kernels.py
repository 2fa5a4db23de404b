"""`pdx tune` and `pdx compare`: choosing tiles of kernels, and comparing implementations."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pdx.cli.app import JsonOption, ModelOption, app, refuse_without_effect
from pdx.errors import RequestError
from pdx.io import outputs, strict_json
from pdx.weights.builtin import DEFAULT_MODEL


@app.command()
def tune(
    context: typer.Context,
    op: Annotated[
        str, typer.Argument(help="A kernel: flash_attention, decode_attention, paged_attention, quantized_matmul.")
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Rank for this chip (v5e, h100, ...) by static figures; without it, measure on this device."),
    ] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose name contains this.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Store the best tiles, so that kernels use them.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the tables; default: $PDX_TUNED, else the package's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose a kernel's tiles, by measurement on this device or by static figures of the compiler."""
    from pallas_kernels import tiles
    from pallas_kernels.analysis import targets, tuning

    if not write:
        refuse_without_effect(context, "tables are written with --write", "folder")
    else:
        outputs.check_folder(tiles.folder_of(folder))
    try:
        found = tuning.run(op, target, case, write, folder, say=(lambda text: None) if as_json else print)
    except (ValueError, targets.CompilerMissing) as error:
        raise RequestError(str(error)) from error
    if as_json:
        print(strict_json.dumps({"op": op, "cases": found}))


@app.command()
def compare(
    context: typer.Context,
    op: Annotated[
        list[str] | None,
        typer.Argument(
            help="flash_attention, decode_attention, paged_attention, "
            "quantized_matmul, or steps (prefill and decode); default: all."
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="all, or a part of a case's name; default: a few cases on a CPU, all of realistic size elsewhere."
        ),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Other chips for which to report static figures: v5e,h100, or none.")
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="Also compare your own kernel, package.module:function (importable from this folder), for the single "
            "OP given or for the kernel's own OP. May be given more than once.",
        ),
    ] = None,
    cycles: Annotated[bool, typer.Option("--cycles", help="Also report the compilers' static cycles; slow.")] = False,
    all_layers: Annotated[
        bool,
        typer.Option(
            "--all-layers",
            help="Compile steps for --targets with all layers, not only the first of each kind; minutes a step.",
        ),
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option(help="How often each implementation is timed.", min=1)] = 5,
    csv: Annotated[Path | None, typer.Option(help="Write every row to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the measurements against the roofline.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare XLA, Pallas and other kernels: each op by itself, and the whole prefill and decode steps."""
    from pdx.bench import compare as comparing
    from pdx.bench.compare import plot as plotting
    from pdx.bench.compare.terminal import show
    from pdx.weights.progress import progress_bar

    if op and "steps" not in op:
        refuse_without_effect(context, "only `steps` run a model", "model", "all_layers")
    if targets == "none":
        refuse_without_effect(context, "static cycles are for --targets", "cycles")
        refuse_without_effect(context, "it is for the steps of --targets", "all_layers")
    if csv is not None:
        outputs.check_file(csv)
    if plot is not None:
        plotting.check(plot)
    chips = None if targets is None else [t for t in targets.split(",") if t not in ("", "none")]
    with progress_bar(unit="cases") as bar:
        found = comparing.compare(
            op or (),
            shapes=shapes,
            targets=chips,
            model=model,
            rounds=rounds,
            cycles=cycles,
            all_layers=all_layers,
            extra=_importable(own or ()),
            progress=bar,
        )
    if as_json:
        print(strict_json.dumps(found.to_dict()))
    else:
        show(found)
    if csv is not None:  # after printing, so that a full disk loses no result
        found.write_csv(csv)
    if plot is not None:
        plotting.save(found, plot)


def _importable(references: Sequence[str]) -> dict[str, str]:
    """Last part of a reference -> reference. Adds the working folder to the import path, like `python -m`."""
    if references and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    return {reference.replace(":", ".").rpartition(".")[2]: reference for reference in references}
