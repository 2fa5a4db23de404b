"""Prints a comparison: a table per op of the measurements, and tables per target of the static figures."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from pdx.bench.compare.rows import MEASURED, Comparison, Row
from pdx.io.tables import Table, screen


def show(found: Comparison, console: Console | None = None) -> None:
    """Print everything."""
    console = console or Console(width=screen())
    chip = found.chip
    versions = ", ".join(f"{k} {v}" for k, v in found.versions.items())
    _say(
        console,
        f"[bold]{found.device}[/bold], {versions}; roofline: {chip.hbm_gbps:.1f} GB/s, "
        + ", ".join(f"{chip.tflops(t):.3g} TFLOP/s {t}" for t in ("float32", "bfloat16", "int8"))
        + f" ({found.ceiling})",
    )
    for note in found.notes:
        _say(console, escape(note))
    here = [r for r in found.rows if r.device == found.device]
    for op in dict.fromkeys(r.op for r in here):
        _measured(found, op, [r for r in here if r.op == op], console)
    if here:
        _say(console, EXPLAINED)
    for target in dict.fromkeys(r.device for r in found.rows if r.device != found.device):
        _static(target, [r for r in found.rows if r.device == target], console)


EXPLAINED = """\
[dim]time: device time of one call, the median and half its interquartile range, from a loop in which each call needs \
the previous result. host: a launch without work, not included. roof: the share of the device's roofline, and what \
bounds it; above 100% if operands stay in a cache. error: the largest difference from f32 over the largest value. \
* the path that implementation="auto" takes here.[/dim]"""


def _measured(found: Comparison, op: str, rows: list[Row], console: Console) -> None:
    over = {(v["case"], v["path"]): v for v in found.verdicts() if v["op"] == op}
    lines: list[list[str]] = []
    for case in dict.fromkeys(r.case for r in rows):
        lines.append([escape(case)])
        for r in (r for r in rows if r.case == case):
            lines.append(
                [f"  {r.path}{'*' if r.auto else ''}", *_times(r), _against(r, over.get((case, r.path))), escape(r.ran)]
            )
    Table([f"[bold]{op}[/bold]", *TIMES], lines, left=("ran",)).show(console)
    _notes(rows, console)


def _times(r: Row) -> list[str]:
    error = "" if r.relative_error is None else f"{r.relative_error:.0e}"
    error = f"[red]{error}[/red]" if r.wrong else error
    if r.rung != MEASURED or r.seconds is None:
        return ["-", "", "", "", "", "", error, _s(r.compile_seconds)]
    spread = (r.high - r.low) / 2 / r.seconds
    return [
        _time(r.seconds),
        f"{spread:.0%}",
        _time(r.dispatch_seconds),
        f"{r.gb_per_s:.1f}",
        f"{r.tflop_per_s:.3g}",
        f"{r.of_roofline:.0%} {r.bound[:3]}",
        error,
        _s(r.compile_seconds),
    ]


def _against(r: Row, said: dict | None) -> str:
    if r.wrong:
        return "[red]WRONG[/red]"
    if said is None:
        return ""
    colour = {"faster": "green", "slower": "red"}.get(said["verdict"])
    text = f"{said['over_xla']:.2f}x {said['verdict']}"
    return f"[{colour}]{text}[/{colour}]" if colour else text


def _static(target: str, rows: list[Row], console: Console) -> None:
    _say(console, f"\n[bold]{target}[/bold], static figures from its compiler and by counting, not measured")
    for op in dict.fromkeys(r.op for r in rows):
        lines: list[list[str]] = []
        for case in dict.fromkeys(r.case for r in rows if r.op == op):
            lines.append([escape(case)])
            lines += [[f"  {r.path}", *_figures(r)] for r in rows if (r.op, r.case) == (op, case)]
        Table([f"[bold]{op}[/bold]", *STATIC], lines, left=("ran",)).show(console)
    _notes(rows, console)


TIMES = ("time", "+-", "host", "GB/s", "TFLOP/s", "roof", "error", "compile", "against XLA", "ran")
STATIC = ("MB moved", "/need", "GFLOP", "/need", "roofline", "bound", "memory", "temp MB", "cycles", "compile", "ran")


def _figures(r: Row) -> list[str]:
    moved = [_mega(r.moved_bytes), _over(r.moved_bytes, r.bytes)]
    done = ["" if r.done_flops is None else f"{r.done_flops / 1e9:.2f}", _over(r.done_flops, r.flops)]
    if r.shared_bytes is not None:
        memory = f"{r.shared_bytes / 1024:.0f} KiB, {r.registers} regs"
    else:
        memory = "" if r.vmem_bytes is None else f"{r.vmem_bytes / 2**20:.1f} MiB"
    cycles = "" if r.cycles is None else f"{r.cycles:,}"
    return [
        *moved,
        *done,
        _time(r.roofline_seconds),
        r.bound[:3],
        memory,
        _mega(r.temp_bytes),
        cycles,
        _s(r.compile_seconds),
        escape(r.ran),
    ]


def _notes(rows: list[Row], console: Console) -> None:
    """Print each note once, with its cases."""
    cases: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if r.note:
            cases.setdefault((r.path, r.note), []).append(r.case)
    for (path, note), names in cases.items():
        every = len(names) > 1 and len(set(names)) == len({r.case for r in rows})
        where = "" if every else f" ({'; '.join(dict.fromkeys(names))})"
        _say(console, escape(f"  {path}: {note}{where}"))


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=False)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 100 else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _s(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _mega(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def _over(count: int | None, needed: int | None) -> str:
    return "" if count is None or not needed else f"{count / needed:.2f}"
