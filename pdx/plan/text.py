"""Prints a plan as tables on one screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from pdx import cost
from pdx.io.tables import Table, screen
from pdx.plan.advice import advice
from pdx.plan.compiled import CompiledStep
from pdx.plan.figures import Plan

GIB = 2**30


def show(plan: Plan, compiled: Sequence[CompiledStep] = ()) -> None:
    """Print a plan; `compiled`: the compiler's results for the same steps."""
    console = Console(width=screen())
    figures = "estimates, at measured rates" if plan.is_measured else "floors, from its peaks"
    console.print(
        f"[bold]{plan.model}[/bold] on {plan.chips} x {plan.chip.name}: batch {plan.batch}, prompt "
        f"{plan.prompt}, context {plan.context}; figures are {figures}",
        highlight=False,
    )
    _memory(plan).show(console)
    _phases(plan).show(console)
    line = (
        f"{plan.output_tokens} tokens end to end {plan.e2e:.2f} s; critical batch "
        f"{cost.critical_batch(plan.setup, plan.chip):.0f}, largest batch "
        f"{cost.largest_batch(plan.setup, plan.chip, plan.context, plan.chips)}, largest context "
        f"{cost.largest_context(plan.setup, plan.chip, plan.batch, plan.chips)}"
    )
    if plan.within_slo is not None:
        line += f", largest batch within the TPOT objective {plan.within_slo}"
    console.print(line, highlight=False)
    if compiled:
        _compiled(compiled).show(console)
        for step in compiled:
            if step.error:
                console.print(f"{step.name}: {step.error}", highlight=False, markup=False)
    for sentence in advice(plan):
        console.print(f"- {sentence}", highlight=False)


def _memory(plan: Plan) -> Table:
    sizes = {f"weights: {part}": size for part, size in plan.setup.weights.items() if size}
    sizes["cache"] = plan.setup.cache_bytes(plan.batch, plan.context)
    sizes["left" if plan.fits else "[red]missing[/red]"] = abs(plan.usable - plan.needed)
    return Table(("memory", "GiB"), [(name, f"{size / GIB:.2f}") for name, size in sizes.items()])


def _phases(plan: Plan) -> Table:
    head = (
        "phase",
        "GFLOP",
        "GB",
        "FLOP/B",
        "bound",
        "takes" if plan.is_measured else "at least",
        "of peak",
        "of bandwidth",
    )
    rows = []
    for step, name in ((plan.prefill, "prefill (TTFT)"), (plan.decode, "decode (TPOT)")):
        compute, memory = step.shares(plan.chip, plan.chips)
        rows.append(
            (
                name,
                f"{step.flops / 1e9:.1f}",
                f"{step.bytes / 1e9:.2f}",
                f"{step.intensity:.1f}",
                step.bound(plan.chip),
                f"{plan.seconds(step) * 1e3:.2f} ms",
                f"{compute:.0%}",
                f"{memory:.0%}",
            )
        )
    return Table(head, rows, left=("bound",))


def _compiled(compiled: Sequence[CompiledStep]) -> Table:
    """The plan's figures and the compiler's, per device."""
    rows: list[tuple[str, ...]] = []

    def row(name: str, say: Callable[[CompiledStep], str]) -> None:
        rows.append((name, *map(say, compiled)))

    def size(n: int | None) -> str:
        return "-" if n is None else f"{n / GIB:.2f} GiB"

    row("fits, according to the compiler", lambda x: {True: "yes", False: "no", None: "failed"}[x.fits])
    row("weights and cache, planned", lambda x: size(x.planned))
    for part, name in (
        ("argument", "arguments"),
        ("temp", "temporaries"),
        ("output", "results"),
        ("alias", "results that alias an argument"),
    ):
        row(f"{name}, compiled", lambda x, part=part: size(x.memory and x.memory[part]))
    if any(x.wanted for x in compiled):
        row("memory it would take", lambda x: size(x.wanted))
    row("traffic, planned", lambda x: f"{x.planned_accessed / 1e9:.2f} GB")
    row(
        "traffic, XLA's count",
        lambda x: "-" if x.accessed is None else f"{x.accessed / 1e9:.2f} GB, {x.accessed / x.planned_accessed:.2f}x",
    )
    row("compile time here", lambda x: "-" if x.seconds is None else f"{x.seconds:.0f} s")
    return Table(("compiled", *(step.name for step in compiled)), rows)
