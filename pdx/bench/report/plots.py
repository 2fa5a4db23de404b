"""The report's plots: measured and predicted times of both phases, and the roofline."""

from __future__ import annotations

from pathlib import Path

from pdx.bench.report.data import Point, Report

# The colours of the phases in all plots.
COLOURS = {"prefill": "tab:red", "decode": "tab:blue"}


def draw(report: Report, out: Path) -> list[Path]:
    """Write the plots into a folder; returns their files in the order of `page.CAPTIONS`."""
    from matplotlib.figure import Figure

    files = []
    for name, plot in (
        ("ttft", _ttft),
        ("tpot_batch", _tpot_batch),
        ("tpot_context", _tpot_context),
        ("roofline", _roofline),
    ):
        figure = Figure(figsize=(6, 4), layout="constrained")  # not pyplot: no display, and nothing to close
        plot(report, figure.subplots())
        figure.savefig(out / f"{name}.png", dpi=80)
        files.append(out / f"{name}.png")
    return files


def _pair(axes, points: list[Point], x: list[int], label: str, colour) -> None:
    """Plot measured times with their range, and predicted times."""
    middle = [p.measured.median * 1e3 for p in points]
    low = [m - p.measured.best * 1e3 for m, p in zip(middle, points, strict=True)]
    high = [max(p.measured.seconds) * 1e3 - m for m, p in zip(middle, points, strict=True)]
    axes.errorbar(x, middle, [low, high], fmt="o-", capsize=3, color=colour, label=f"{label}, measured")
    axes.plot(x, [p.predicted_s * 1e3 for p in points], "x--", color=colour, label=f"{label}, predicted")


def _ttft(report: Report, axes) -> None:
    points = [p for p in report.points if p.phase == "prefill" and p.batch == 1]
    _pair(axes, points, [p.tokens for p in points], "one prompt", COLOURS["prefill"])
    axes.plot([p.tokens for p in points], [p.floor_s * 1e3 for p in points], ":", color="grey", label="roofline floor")
    _finish(axes, "prompt, tokens", "TTFT, ms", sorted({p.tokens for p in points}), "log")


def _tpot_batch(report: Report, axes) -> None:
    decode = [p for p in report.points if p.phase == "decode"]
    contexts = sorted({p.tokens for p in decode})
    for i, context in enumerate(contexts):
        points = [p for p in decode if p.tokens == context]
        _pair(axes, points, [p.batch for p in points], f"context {context}", f"C{i}")
    _finish(axes, "batch", "TPOT, ms", sorted({p.batch for p in decode}), "linear")


def _tpot_context(report: Report, axes) -> None:
    decode = [p for p in report.points if p.phase == "decode"]
    batches = sorted({p.batch for p in decode})
    for i, batch in enumerate(batches):
        points = [p for p in decode if p.batch == batch]
        _pair(axes, points, [p.tokens for p in points], f"batch {batch}", f"C{i}")
    _finish(axes, "context, tokens", "TPOT, ms", sorted({p.tokens for p in decode}), "linear")


def _finish(axes, x: str, y: str, ticks: list[int], scale: str) -> None:
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale=scale)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    if scale == "linear":
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _roofline(report: Report, axes) -> None:
    chip = report.chip
    peak, rate = chip.tflops(report.dtype) * 1e3, chip.hbm_gbps
    intensity = [p.flops / p.bytes for p in report.points]
    ends = [min(*intensity, 0.3 * peak / rate) / 2, max(*intensity, peak / rate) * 2]
    axes.plot([ends[0], peak / rate, ends[1]], [ends[0] * rate, peak, peak], "k-", lw=1)
    axes.annotate(f"{rate:.1f} GB/s", (ends[0] * 1.2, ends[0] * rate * 1.5), fontsize=8)
    axes.annotate(f"{peak:.0f} GFLOP/s in {report.dtype}", (peak / rate * 1.3, peak * 1.08), fontsize=8)
    for phase, colour in COLOURS.items():
        points = [p for p in report.points if p.phase == phase]
        axes.scatter(
            [p.flops / p.bytes for p in points],
            [p.flops / p.measured.median / 1e9 for p in points],
            s=[20 + 8 * p.batch for p in points],
            color=colour,
            alpha=0.6,
            label=phase,
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s")
    axes.legend(fontsize=8)
