"""Measures ops on this process's device: the implementations of a case in turn, for several rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from pallas_kernels import hardware, implementation
from pallas_kernels.analysis import hlo, problems
from pallas_kernels.analysis.problem import Problem, op_of
from pallas_kernels.analysis.timing_loop import chained, start
from pallas_kernels.hardware import Chip
from pdx.bench.compare import paths
from pdx.bench.compare.contestants import Contestant, from_problem, library_and_own, peers
from pdx.bench.compare.device_time import Loop
from pdx.bench.compare.expected import answer, draw, errors
from pdx.bench.compare.paths import Path
from pdx.bench.compare.rows import INTERPRETED, MEASURED, NOT_RUN, Row, limits
from pdx.bench.timing import Timing, interleaved
from pdx.cache.layer import default_layout

# The largest case that is interpreted, which takes a few seconds.
INTERPRETED_FLOPS, INTERPRETED_BYTES = 2e8, 1 << 24
FRESH = 4  # different queries that are used in turn


def case_rows(
    op: str,
    case: Any,
    chip: Chip,
    device: str,
    rounds: int,
    targets: tuple[str, ...] = (),
    extra: Mapping[str, Any] | None = None,
) -> list[Row]:
    """The rows of one case: times, errors, and what really ran.

    Args:
      op, case: what is measured.
      chip, device: this device, for the roofline, and its name.
      rounds: how often each implementation is timed.
      targets: the chips that this run compiles for, named in the note of a kernel that does not run here.
      extra: the user's implementations by label.
    """
    platform = chip.platform
    problem = problems.OPS[op](case, "xla", "heads_last")
    arrays = draw(problem)
    right = answer(problem, arrays)
    base = start_row(problem, chip, device)
    found = [*library_and_own(op, case, arrays, platform, extra), *peers(op, case, arrays, platform)]
    rows = compete(found, base, right, rounds)
    auto = chosen_by_auto(op, problems.OPS[op](case, "xla", default_layout(platform)), platform)
    rows = [replace(r, auto=r.path == auto) for r in rows]
    at = len(paths.library(op, platform)) + 1
    own = set(extra or ())
    for path in paths.other_platforms(op, platform, extra or {}):
        if platform == "cpu" or path.name in own:  # an accelerator's table leaves out the other platform's kernels
            rows.insert(at, interpreted(op, case, arrays, right, replace(base, path=path.name), path, targets))
            at += 1
    return rows


def start_row(problem: Problem, chip: Chip, device: str) -> Row:
    """The row of a case before anything has run."""
    needed = problem.flops_needed, problem.bytes_needed
    return Row(
        problem.op,
        problem.name,
        "",
        device,
        NOT_RUN,
        dtype=problem.multiplied,
        flops=needed[0],
        bytes=needed[1],
        **limits(chip, *needed, problem.multiplied),
    )


def platform() -> str:
    """The platform of this process's device: cpu, gpu or tpu."""
    return hardware.platform_of()


def chosen_by_auto(op: str, problem: Problem, platform: str) -> str:
    """The path that implementation="auto" takes on a platform."""
    name = op_of(op).explain("auto", platform, problem.call).implementation
    by_name = {path.implementation: path.name for path in paths.runnable_paths(op, platform, {})}
    return by_name[name]


def compete(found: list[Contestant], base: Row, right: tuple[np.ndarray, np.ndarray], rounds: int) -> list[Row]:
    """Compile, check and time the implementations in turn. If one fails, its row has the reason."""
    rows, loops = {}, {}
    for c in found:
        row = replace(base, path=c.path)
        try:
            loop = make_loop(c)
            loop.run(1)
            worst, relative = errors(c.result(loop.state[1]), *right)
        except Exception as error:  # kernels refuse cases with errors of any type: note it and continue
            rows[c.path] = replace(row, note=reason(error))
            continue
        rows[c.path] = replace(
            row,
            rung=MEASURED,
            ran=what_ran(loop.text),
            max_error=worst,
            relative_error=relative,
            compile_seconds=loop.compile_seconds,
        )
        loops[c.path] = loop
    for path, row in timed(loops, rounds).items():
        rows[path] = replace(rows[path], **row)
    return list(rows.values())


def make_loop(c: Contestant) -> Loop:
    """A loop of calls, each of which uses a value of the previous result. The first run's queries are `c.x`."""
    others = [c.x[::-1], -c.x, -c.x[::-1]] if c.x.ndim else []
    fresh = [jax.block_until_ready(x) for x in (c.x, *others)][:FRESH]
    return Loop(chained(c.fn), start(c.fn, c.x, *c.held), fresh, c.held)


def timed(loops: Mapping[str, Callable[[], Timing]], rounds: int) -> dict[str, dict[str, Any]]:
    """The times of a row, by path: a dict of fields of `Row`."""
    found = {}
    for name, timing in interleaved(loops, rounds).items():
        if timing.median <= 0:
            found[name] = {"note": "too short to be measured on this machine"}
            continue
        low, high = timing.quartiles
        found[name] = {
            "seconds": timing.median,
            "low": max(low, 0.0),
            "high": high,
            "dispatch_seconds": loops[name].dispatch.median,
        }
    return found


def what_ran(text: str) -> str:
    """`XLA`, or the number of Pallas kernels that a compiled program calls."""
    return describe_kernels(len(hlo.pallas_calls(text)))


def describe_kernels(count: int) -> str:
    return f"{count} Pallas kernel{'s' * (count > 1)}" if count else "XLA"


def reason(error: Exception) -> str:
    """The first line of an error, with its type unless it is NotImplementedError, which pdx raises on purpose."""
    said = (str(error).splitlines() or [""])[0][:300]
    return said if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {said}"


def why_not_measured(targets: tuple[str, ...]) -> str:
    """The note of a Pallas kernel that does not run on this process's device."""
    instead = f"static figures for {', '.join(targets)} below" if targets else "--targets gives static figures"
    return f"not on {jax.default_backend()}: {instead}"


def interpreted(op: str, case: Any, arrays, right, row: Row, path: Path, targets: tuple[str, ...]) -> Row:
    """The row of a kernel of another platform: its error from the interpreter, no time."""
    row = replace(row, note=why_not_measured(targets))
    try:
        problem = path.problem(op, case, implementation.platforms_of(path.of(op))[0])
        if why := problem.unsupported:
            return replace(row, note=f"{row.note}; the kernel refuses this case: {why}")
        if problem.flops_needed > INTERPRETED_FLOPS or sum(x.nbytes for x in arrays.values()) > INTERPRETED_BYTES:
            return row
        c = from_problem(row.path, problem, arrays, interpret=True)
        worst, relative = errors(jax.jit(c.fn)(c.x, *c.held), *right)
    except Exception as error:  # a user's kernel may fail in any way: note it and continue
        return replace(row, note=reason(error))
    return replace(row, rung=INTERPRETED, ran="interpreted", max_error=worst, relative_error=relative)
