"""`pdx calibrate` and `pdx report`: measuring this device, and the table of optimizations on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdx.cli.app import DtypeOption, JsonOption, ModelOption, app, load_model
from pdx.io import strict_json
from pdx.weights.builtin import DEFAULT_MODEL


@app.command()
def calibrate(
    name: Annotated[str | None, typer.Option(help="Name of the chip; default: from the device's name.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: where --chip finds the chip by its name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this device (memory bandwidth, matmul rates, parts of a step) and store it as a chip for --chip."""
    import dataclasses
    import shlex

    from pdx.bench.calibrate import calibrate as measure
    from pdx.bench.device import file_name
    from pdx.cost import chips
    from pdx.installation.compilation_cache import enable_cache
    from pdx.io import outputs
    from pdx.weights.progress import progress_bar

    target = out or chips.file_of(name or file_name())
    if target.parent.is_dir():
        outputs.check_file(target)
    else:
        outputs.check_folder(target.parent)
    enable_cache()
    with progress_bar(unit="measurements") as progress:
        chip = measure(name, progress=progress)
    try:
        file = chips.save(chip, out)
    except OSError:  # such as a full disk: print the measurement instead
        print(strict_json.dumps(dataclasses.asdict(chip)) if as_json else chips.to_toml(chip))
        raise
    if as_json:
        print(strict_json.dumps(dataclasses.asdict(chip) | {"file": str(file)}))
        return
    print(
        f"{chip.name}: reads {chip.hbm_gbps:.1f} GB/s; products of float32 {chip.f32_tflops * 1e3:.0f} GFLOP/s, "
        f"bfloat16 {chip.bf16_tflops * 1e3:.0f}, int8 {chip.int8_tops * 1e3:.0f}\nwritten to {file}: "
        f"pdx plan MODEL --chip {shlex.quote(str(out or chip.name))}"
    )


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json and pictures.")],
    model: ModelOption = DEFAULT_MODEL,
    chip: Annotated[
        str | None,
        typer.Option(
            help="This device as `pdx calibrate` stored it; default: the chip with the device's name, which is "
            "measured now if it does not exist."
        ),
    ] = None,
    predict: Annotated[
        list[str] | None, typer.Option(help="Other chips to predict for; more than one may be given.")
    ] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Measure only this row, and no pitfalls; more than one may be given.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Tiny loads, to test that it runs; the figures mean nothing.")] = False,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure and predict what each optimization gains on this device, in prefill and in decode, and explain it."""
    from pdx.bench import calibrate as calibration
    from pdx.bench import report as reporting
    from pdx.bench.device import file_name
    from pdx.bench.report import page
    from pdx.bench.report.optimizations import QUICK
    from pdx.cost import chips
    from pdx.errors import RequestError
    from pdx.io import outputs
    from pdx.weights.progress import progress_bar

    others = {name: chips.chip(name) for name in predict or ("v5e", "h100")}
    here = chips.chip(chip or file_name()) if chip or (not quick and file_name() in chips.names()) else None
    if here is not None and not isinstance(here, chips.MeasuredChip):
        raise RequestError(f"{here.name} was not measured: the report needs this device as pdx calibrate stores it")
    reporting.chosen(row)
    outputs.check_folder(out)
    loaded = load_model(model, dtype, None)
    with progress_bar(unit="measurements") as progress:
        if here is None:
            here = calibration.calibrate(plan=calibration.TINY if quick else None, progress=progress)
            if not quick:
                chips.save(here)
        found = reporting.run(loaded, here, others, QUICK if quick else None, only=row, progress=progress)
    if not as_json:  # before files are written, so that a full disk loses no result
        page.show(found)
    try:
        files = [str(file) for file in reporting.write(found, out)]
    except OSError:
        if as_json:
            print(strict_json.dumps(found.to_dict()))
        raise
    print(strict_json.dumps(found.to_dict() | {"files": files}) if as_json else f"written: {', '.join(files)}")
