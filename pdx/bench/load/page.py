"""The results of a load benchmark as a table, as notes, and as a plot of latency against throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pdx.bench.load import LoadResult
from pdx.bench.pictures import check as check_plot
from pdx.errors import RequestError
from pdx.io.tables import Table
from pdx.metrics import Spread

__all__ = ["check_plot", "notes", "plot", "table"]

HEAD = (
    "settings",
    "load",
    "done",
    "out tok/s",
    "in tok/s",
    "TTFT ms p50 / p99",
    "TPOT ms p50 / p99",
    "ITL ms p99 / worst",
    "E2E s p50 / p99",
    "goodput req/s",
    "slots taken",
)


def table(results: Sequence[LoadResult]) -> Table:
    """One row per load and settings. The column of settings is left out if there is only one."""
    has_settings = any(r.settings for r in results)
    head, *rows = [line if has_settings else line[1:] for line in (HEAD, *map(_cells, results))]
    return Table(head, rows, keys=1 + has_settings)


def _cells(r: LoadResult) -> tuple[str, ...]:
    spread = r.spreads()
    return (
        r.settings,
        r.load,
        f"{len(r.timings)}/{len(r.served)}",
        f"{r.output_tokens_per_s:.1f}",
        f"{r.input_tokens_per_s:.1f}",
        _pair(spread["ttft"], 1e3),
        _pair(spread["tpot"], 1e3),
        f"{spread['itl'].p99 * 1e3:.0f} / {spread['itl'].largest * 1e3:.0f}",
        _pair(spread["e2e"], 1),
        f"{r.goodput:.2f} ({r.good_share:.0%})",
        f"{r.counted.get('occupancy', float('nan')):.0%}",
    )


def _pair(spread: Spread, scale: float) -> str:
    digits = 0 if scale > 1 else 2
    return f"{spread.p50 * scale:.{digits}f} / {spread.p99 * scale:.{digits}f}"


def notes(results: Sequence[LoadResult]) -> list[str]:
    """Sentences about failures, a late load generator, compilations, prefix hits and preemptions."""
    said = []
    for r in results:
        name = f"{r.settings + ', ' if r.settings else ''}{r.load}"
        for error in sorted({s.error for s in r.served if s.error}):
            count = sum(s.error == error for s in r.served)
            said.append(f"{name}: {count} of {len(r.served)} requests failed: {error}")
        if (late := max((s.late_s for s in r.served), default=0.0)) > 0.05:
            said.append(
                f"{name}: requests were sent up to {late * 1e3:.0f} ms late: this machine is too busy for the rate"
            )
        if compiles := r.counted.get("compiles"):
            said.append(f"{name}: {compiles:.0f} programs were compiled during the load: do not trust the figures")
        if drafted := r.counted.get("drafted_tokens"):
            kept, steps = r.counted["kept_tokens"], r.counted["steps"]
            share = f"{kept:.0f} of {drafted:.0f} drafted tokens were kept = {kept / drafted:.0%}"
            said.append(f"{name}: {share}, in {steps:.0f} steps")
        if hits := r.counted.get("hit_tokens"):
            said.append(f"{name}: {hits:.0f} prompt tokens were found in the prefix cache")
        if preempted := r.counted.get("preemptions"):
            said.append(f"{name}: requests were preempted {preempted:.0f} times")
    return said


def plot(results: Sequence[LoadResult], file: Path, title: str = "") -> None:
    """Plot median and 99th percentile of TTFT and TPOT against output tokens per second, and goodput against the load.

    Each settings has a colour. Raises RequestError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    ttft, tpot, good = figure.subplots(1, 3)
    for number, settings in enumerate(dict.fromkeys(r.settings for r in results)):
        points = sorted((r for r in results if r.settings == settings), key=lambda r: r.pressure)
        colour, rate = f"C{number}", [r.output_tokens_per_s for r in points]
        for axes, name in ((ttft, "ttft"), (tpot, "tpot")):
            spreads = [r.spreads()[name] for r in points]
            axes.plot(rate, [s.p50 * 1e3 for s in spreads], "o-", color=colour, label=f"{settings} median".strip())
            axes.plot(rate, [s.p99 * 1e3 for s in spreads], "^:", color=colour, label=f"{settings} 99%".strip())
            for r, s in zip(points, spreads, strict=True):
                axes.annotate(r.load, (r.output_tokens_per_s, s.p50 * 1e3), fontsize=7, color=colour)
        good.plot(
            [r.pressure for r in points], [r.goodput for r in points], "o-", color=colour, label=settings or "engine"
        )
    for axes, name, limit in (
        (ttft, "TTFT", results[0].objectives.ttft_s),
        (tpot, "TPOT", results[0].objectives.tpot_s),
    ):
        axes.set(xlabel="output tokens/s", ylabel=f"{name}, ms", title=f"{name} against throughput", yscale="log")
        if limit is not None:
            axes.axhline(limit * 1e3, color="black", linewidth=0.8, linestyle="--", label="objective")
    unit = "clients" if results[0].load.endswith("clients") else "requests per second offered"
    good.set(xlabel=unit, ylabel="requests/s within the objectives", title="goodput", ylim=(0, None))
    for axes in (ttft, tpot, good):
        axes.legend(fontsize=8)
    figure.suptitle(title)
    try:
        figure.savefig(file, dpi=100)
    except OSError as error:
        raise RequestError(f"{file}: the plot could not be written ({error})") from None
