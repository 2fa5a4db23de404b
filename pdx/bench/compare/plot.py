"""Plots the measured points of a comparison against the device's roofline."""

from __future__ import annotations

from pathlib import Path

from pdx.bench.compare.rows import Comparison, Row
from pdx.bench.pictures import check, require
from pdx.errors import RequestError

__all__ = ["check", "picture", "require", "save"]

MARKERS = "os^Dv<>P*X"


def save(found: Comparison, file: Path) -> None:
    """Write the plot; the file's ending sets its format.

    Raises:
      RequestError: matplotlib is not installed, or does not know the ending.
    """
    require()
    try:
        picture(found).savefig(file, dpi=150)
    except ValueError as error:
        raise RequestError(f"--plot {file}: {error}") from None


def picture(found: Comparison):
    """A matplotlib figure of TFLOP/s against FLOPs per byte, both logarithmic.

    It has a roof for each operand type, and a point for each row with a time: one colour per op, one marker per path.
    """
    from matplotlib.figure import Figure

    points = [r for r in found.rows if r.seconds]
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    _roofs(axes, found, points)
    ops, paths = (list(dict.fromkeys(getattr(r, name) for r in points)) for name in ("op", "path"))
    for r in points:
        axes.plot(
            r.flops / r.bytes,
            r.tflop_per_s,
            MARKERS[paths.index(r.path) % len(MARKERS)],
            color=f"C{ops.index(r.op) % 10}",
            markersize=8,
            alpha=0.8,
        )
    for i, op in enumerate(ops):
        axes.plot([], [], "s", color=f"C{i % 10}", label=op)
    for i, path in enumerate(paths):
        axes.plot([], [], MARKERS[i % len(MARKERS)], color="grey", label=path)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs per byte that the case needs",
        ylabel="TFLOP/s",
        title=f"{found.device}: measured, under its roofline ({found.ceiling})",
    )
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(True, which="major", alpha=0.3)
    return figure


def _roofs(axes, found: Comparison, points: list[Row]) -> None:
    rate = found.chip.hbm_gbps / 1e3  # TFLOP/s at one FLOP per byte
    peaks: dict[float, list[str]] = {}
    for dtype in dict.fromkeys(r.dtype for r in points):
        peaks.setdefault(found.chip.tflops(dtype), []).append(dtype)
    intensities = [r.flops / r.bytes for r in points] or [1.0]
    ridge = [peak / rate for peak in peaks]
    low, high = min(*intensities, *ridge, 1.0) / 2, max(*intensities, *ridge, 1.0) * 4
    for peak, dtypes in peaks.items():
        axes.plot([low, peak / rate, high], [low * rate, peak, peak], "k-", linewidth=1)
        axes.annotate(f"{peak:.3g} TFLOP/s, {', '.join(dtypes)}", (high, peak), ha="right", va="bottom", fontsize=8)
    axes.annotate(f"{found.chip.hbm_gbps:.3g} GB/s", (low, low * rate), ha="left", va="bottom", fontsize=8)
