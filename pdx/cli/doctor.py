"""`pdx doctor`: checks the installation."""

from __future__ import annotations

import json
import sys

import typer

from pdx.cli.app import JsonOption, app


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check versions, devices, kernels, memory and caches, and compare Pallas with XLA on the device."""
    from pdx.installation.doctor import examine, text

    if not as_json and sys.stderr.isatty():
        print("asking the device, which takes about ten seconds", file=sys.stderr)
    found = examine()
    print(json.dumps(found) if as_json else text(found))
    if not found["ok"]:
        raise typer.Exit(1)
