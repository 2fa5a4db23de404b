"""`pdx tune`: the kernels by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdx.cli.app import app
from pdx.errors import RequestError


@app.command()
def tune(
    op: Annotated[str, typer.Argument(help="A kernel: flash_attention, decode_attention, paged_attention, "
                                           "quantized_matmul.")],
    target: Annotated[str | None, typer.Option(help="Rank for this chip (v5e, h100, ...) by static figures; without "
                                               "it, measure on this device.")] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose name holds this.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Keep the best tiles for the kernels to take.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Of the tables; else $PDX_TUNED, else the package's.")] = None,
) -> None:
    """Choose a kernel's tiles: measured on a real device, else ranked by what its compiler says."""
    from pallas_kernels import targets, tuning

    try:
        tuning.run(op, target, case, write, folder)
    except (ValueError, targets.CompilerMissing) as error:
        raise RequestError(str(error)) from error
