"""`pdx distill`: making a draft model or an EAGLE head for a target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdx.cli.app import JsonOption, app, load_model
from pdx.io import strict_json


@app.command()
def distill(
    target: Annotated[str, typer.Argument(help="The model to draft for, as for --model.")],
    out: Annotated[Path, typer.Argument(help="A folder for data, checkpoints and the result; a run goes on there.")],
    config: Annotated[
        Path | None, typer.Option(help="TOML with tables [data], [draft], [eagle] and [train]; default: as shipped.")
    ] = None,
    head: Annotated[
        str, typer.Option(help="draft: a small model. eagle: a head on the target's hidden states.")
    ] = "draft",
    as_json: JsonOption = False,
) -> None:
    """Train a draft model, or an EAGLE head, on the target's own outputs, for --speculate."""
    from pdx.io import outputs
    from pdx.train.config import DistillConfig, check_kind
    from pdx.weights.progress import progress_bar

    check_kind(head)
    settings = DistillConfig.from_toml(config)
    outputs.check_folder(out)
    model = load_model(target, "auto", None)

    from pdx.train.distill import distill as make

    with progress_bar(unit="items") as bar:
        made = make(model, out, settings, kind=head, progress=bar)
    if as_json:
        print(strict_json.dumps(made.to_dict()))
        return
    kept = ", ".join(f"{name} {c.acceptance or 0:.0%}" for name, c in made.accepted.items())
    print(
        f"{made.parameters:,} parameters, {made.size_bytes / 1e6:.1f} MB; of its drafts are kept: {kept}\n"
        f"saved to {made.path}: pdx generate --model {target} --speculate {head}:{made.path}"
    )
