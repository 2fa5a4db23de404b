"""The report in Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pdx.bench.report.data import WITHIN, Report
from pdx.bench.report.optimizations import ACCEPTANCE
from pdx.bench.report.verdicts import CLAIMS, Finding
from pdx.bench.report.verification import Verification
from pdx.io.tables import Table, screen

CAPTIONS = {
    "ttft": "TTFT against the prompt's length: prefill.",
    "tpot_batch": "TPOT against the batch: decode.",
    "tpot_context": "TPOT against the context: decode.",
    "roofline": "The roofline: prefill and decode as two clouds; larger dots are larger batches.",
}


GRID = ("phase", "batch", "tokens", "measured", "best", "predicted", "error", "floor")


def table(report: Report) -> Table:
    """The table of optimizations: one line per phase of each row."""
    others = list(report.others)
    head = ["optimization", "phase", "claim", "load", "off", "on", "gain here", "predicted here", *others, "verdict"]
    lines = []
    for row in report.outcomes:
        for phase, claim in row.claims.items():
            found = next((f for f in row.findings if f.phase == phase), None)
            lines.append(
                [
                    row.name,
                    phase,
                    claim,
                    *(_cells(found, report.chip.name, others) if found else [""] * (5 + len(others)) + [row.verdict]),
                ]
            )
    return Table(head, lines, keys=2, left=("claim", "load", "verdict"))


def _cells(found: Finding, here: str, others: Sequence[str]) -> list[str]:
    spread = f"{found.gain:.2f}x ({min(found.gains):.2f} to {max(found.gains):.2f})"
    return [
        found.load,
        _ms(found.off_s.median),
        _ms(found.on_s.median),
        spread,
        f"{found.predicted[here]:.2f}x",
        *(f"{found.predicted[name]:.2f}x" for name in others),
        found.verdict,
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def reasons(report: Report) -> list[str]:
    """For each phase of each row, a sentence that explains its gain."""
    found = []
    for row in report.outcomes:
        found += [f"{row.name}, {f.phase}: {f.verdict}. {f.why}" for f in row.findings]
        if row.verdict:
            found.append(f"{row.name}: {row.verdict}: {row.why}.")
    return found


def errors(report: Report) -> str:
    """A sentence about the errors of the predictions."""
    parts = []
    for name, phase in (("TTFT", "prefill"), ("TPOT", "decode")):
        points = [p for p in report.points if p.phase == phase]
        good = sum(abs(p.error) <= WITHIN for p in points)
        parts.append(
            f"{name} {report.error(phase):.0%} off (median of {len(points)} loads; {good} of them within "
            f"{WITHIN:.0%}, the worst {max((p.error for p in points), key=abs):+.0%})"
        )
    return "Predicted by the cost model at the calibrated chip's rates: " + ", ".join(parts) + "."


def pitfalls(report: Report) -> list[str]:
    """The pitfalls, one paragraph each."""
    seen = report.pitfalls
    if seen is None:
        return []
    first, *rest = seen.requests
    single = "; ".join(
        f"{r.prompt} tokens in, {r.output} out took {r.measured_s:.2f} s: one number says {r.one_number_s:.2f} s "
        f"({r.error(r.one_number_s):+.0%}), TTFT + (n - 1) TPOT says {r.two_phases_s:.2f} s "
        f"({r.error(r.two_phases_s):+.0%})"
        for r in rest
    )
    each = first.measured_s / (first.prompt + first.output)
    said = [
        f"**One number for both phases misleads.** A request of {first.prompt} tokens in and {first.output} out "
        f"took {first.measured_s:.2f} s, {each * 1e3:.1f} ms a token. {single}."
    ]
    for rows, tpot, found in zip(seen.rows, seen.tpot_s, seen.speculation, strict=True):
        lines = []
        for s in found:
            even = "at no acceptance" if s.break_even is None else f"from an acceptance of {s.break_even:.2f} on"
            short = (
                "no answer is long enough"
                if s.shortest is None
                else f"answers shorter than {s.shortest:.0f} tokens lose"
                if rows == 1
                else f"decoding is {s.speed:.2f}x as fast"
            )
            lines.append(
                f"drafted by {s.draft}, decoding gains {even}; at {ACCEPTANCE} it is {s.speed:.2f}x, and {short}"
            )
        said.append(
            f"**Speculation on short answers loses** (batch {rows}, a prompt of {seen.prompt} tokens, TPOT "
            f"{_ms(tpot)}, {seen.draft} tokens drafted): a verification takes {found[0].verify_steps:.2f} "
            f"decode steps; {'; '.join(lines)}."
        )
    stall = next(
        (f for o in report.outcomes if o.name == "chunked prefill" for f in o.findings if f.phase == "decode"), None
    )
    if stall is not None:
        said.append(
            f"**A long prefill stalls the others.** {stall.load}: {_ms(stall.off_s.median)} without chunks, "
            f"{_ms(stall.on_s.median)} with them."
        )
    return said


def to_markdown(report: Report, pictures: Sequence[str]) -> str:
    """The content of `report.md`. `pictures`: names of the plots beside it."""
    chip = report.chip
    peaks = f"reads {chip.hbm_gbps:.1f} GB/s, {chip.f32_tflops * 1e3:.0f} GFLOP/s in float32"
    claims = "; ".join(f"*{name}* {_range(*bounds)}" for name, bounds in CLAIMS.items())
    grid = [
        [
            p.phase,
            str(p.batch),
            str(p.tokens),
            _ms(p.measured.median),
            _ms(p.measured.best),
            _ms(p.predicted_s),
            f"{p.error:+.0%}",
            _ms(p.floor_s),
        ]
        for p in report.points
    ]
    parts = [
        f"# {report.model} on {report.device}",
        f"Made by `pdx report --model {report.model}` in {report.seconds:.0f} s; {report.dtype}, JAX {report.jax}. "
        f"Chip `{chip.name}` of `pdx calibrate`: {peaks} ({chip.rates.made}).",
        errors(report),
        "## What pays where",
        f"Gain: tokens a second with over without, median and range of {len(report.points[0].measured.seconds)} rounds "
        "in turn. Predicted here at the calibrated rates; for other chips floors in bf16 from published peaks. A claim "
        f"holds if the middle half of the rounds reaches into its range: {claims}.",
        table(report).markdown(),
        "\n".join(f"- {text}" for text in reasons(report)),
        "## Predicted and measured",
        Table(GRID, grid).markdown(),
        *(f"![{caption}]({name})\n\n{caption}" for name in pictures if (caption := CAPTIONS[name.partition(".")[0]])),
        *_verifications(report),
        *(["## Pitfalls", *said] if (said := pitfalls(report)) else []),
    ]
    return "\n\n".join(parts) + "\n"


def _verifications(report: Report) -> list[str]:
    if not report.verifications:
        return []
    said = (
        f"A step that verifies a draft in each row, behind {report.verifications[0].context} tokens, and its "
        "prediction by parts. It reads the weights once, whatever is drafted, and multiplies every token with them."
    )
    return ["## What a verification costs", said, verified(report.verifications).markdown()]


def verified(found: Sequence[Verification]) -> Table:
    """A line for each number of rows and drafted tokens, also in decode steps of those rows."""
    plain = {v.rows: v for v in found if not v.drafted}
    lines = []
    for v in found:
        predicted, base = sum(v.predicted_s.values()), plain[v.rows]
        cells = [_ms(v.measured.median), f"{v.measured.median / base.measured.median:.2f}", _ms(predicted)]
        cells += [f"{predicted / sum(base.predicted_s.values()):.2f}", *map(_ms, v.predicted_s.values())]
        lines.append([str(v.rows), str(v.drafted), *cells])
    head = ("rows", "drafted", "measured", "in steps", "predicted", "predicted in steps", *found[0].predicted_s)
    return Table(head, lines, keys=2)


def _range(low: float, high: float) -> str:
    return f"from {low}x on" if high == float("inf") else f"{low} to {high}x"


def show(report: Report) -> None:
    """Print the table, the reasons, the errors and the pitfalls."""
    from rich.console import Console

    console = Console(width=screen())
    colours = {"holds": "green", "does not hold": "red"}
    plain = table(report)
    rows = [[*cells, f"[{colours.get(verdict, 'yellow')}]{verdict}[/]"] for *cells, verdict in plain.rows]
    replace(plain, rows=rows).show(console)
    if report.verifications:
        verified(report.verifications).show(console)
    for text in (*reasons(report), errors(report), *pitfalls(report)):
        console.print(f"- {text.replace('**', '')}", highlight=False, markup=False)
