"""`pdx report`: measures what each optimization gains on this device, and compares it with the cost model."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.hardware import Chip
from pdx.bench.device import machine
from pdx.bench.report import optimizations, page, pitfalls, plots, verification
from pdx.bench.report.data import Point, Report
from pdx.bench.report.optimizations import Experiment, Sizes
from pdx.bench.timed_work import TimedWork
from pdx.bench.timing import interleaved
from pdx.cost import Phase
from pdx.cost.chips import MeasuredChip
from pdx.errors import RequestError
from pdx.io import outputs, strict_json
from pdx.weights.load import Model
from pdx.weights.progress import Report as Progress
from pdx.weights.progress import silent


def run(
    model: Model,
    chip: MeasuredChip,
    others: dict[str, Chip],
    sizes: Sizes | None = None,
    *,
    only: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Report:
    """Measure the grid of loads, the rows (optimizations) and the pitfalls.

    Args:
      chip: this device, as `pdx.bench.calibrate` measured it.
      others: published chips that gains are predicted for, by name.
      sizes: of the loads; None: the defaults.
      only: names of the rows to measure, and nothing but them; None: everything.
      progress: called after each measurement.
    """
    begin = time.monotonic()
    sizes = (sizes or Sizes()).within(model.config.max_context)
    asked = chosen(only)
    experiment, grid = Experiment(model, chip, sizes), list(loads(sizes))
    plain = experiment.plain
    total, points, outcomes = len(grid) + len(asked) + 1, [], []
    for phase, batch, tokens in grid:
        progress("measuring", len(points), total)
        points.append(
            _point(
                plain.prefill(batch, tokens) if phase == "prefill" else plain.decode(batch, tokens),
                batch,
                tokens,
                chip,
                sizes.rounds,
            )
        )
        gc.collect()
    for row in asked:
        progress("measuring", len(points) + len(outcomes), total)
        outcomes.append(optimizations.measure(row, experiment, {chip.name: chip} | others))
        gc.collect()
    progress("measuring", total - 1, total)
    seen, verified = (pitfalls.run(experiment), verification.measure(experiment)) if only is None else (None, ())
    progress("measuring", total, total)
    return Report(
        model.name,
        machine(),
        str(jax.numpy.dtype(model.dtype)),
        jax.__version__,
        chip,
        others,
        tuple(points),
        tuple(outcomes),
        seen,
        verified,
        time.monotonic() - begin,
    )


def chosen(only: Sequence[str] | None) -> list[optimizations.Row]:
    """The rows of these names; None: all. Raises RequestError for an unknown name."""
    found = [r for r in optimizations.ROWS if only is None or r.name in only]
    if only is not None and (unknown := set(only) - {r.name for r in found}):
        raise RequestError(f"no row {sorted(unknown)[0]!r}; there are {', '.join(r.name for r in optimizations.ROWS)}")
    return found


def loads(sizes: Sizes) -> list[tuple[Phase, int, int]]:
    """(phase, batch, tokens) of the grid on which predictions are tested: single prompts, batches of prompts, and
    decode batches at several contexts."""
    found: list[tuple[Phase, int, int]] = [("prefill", 1, p) for p in sizes.prompts]
    found += [("prefill", b, sizes.prompt) for b in sizes.batches if b > 1]
    return found + [("decode", b, c) for c in sizes.contexts for b in sizes.batches]


def _point(timed: TimedWork, batch: int, tokens: int, chip: MeasuredChip, rounds: int) -> Point:
    seen = interleaved({"step": timed.work}, rounds)["step"]
    costs = timed.costs()
    return Point(
        timed.phase,
        batch,
        tokens,
        seen,
        timed.seconds(chip),
        timed.floor(chip),
        sum(c.flops for c in costs),
        sum(c.bytes for c in costs),
    )


def write(report: Report, out: Path) -> list[Path]:
    """Write `report.json`, `report.md` and its plots into a folder. Returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    # The figures first, since they cannot be computed again.
    outputs.write_text(out / "report.json", strict_json.dumps(_rounded(report.to_dict()), indent=1) + "\n")
    pictures = plots.draw(report, out)
    text = page.to_markdown(report, [p.name for p in pictures])
    outputs.write_text(out / "report.md", text)
    return [out / "report.md", out / "report.json", *pictures]


def _rounded(x: Any) -> Any:
    """A JSON value with floats rounded to five digits."""
    if isinstance(x, float):
        return float(f"{x:.5g}")
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    return [_rounded(v) for v in x] if isinstance(x, list) else x
