"""What the Pallas kernels of a compiled program issue on a TPU: bundles, beside the cycles of the memory.

    counted = traffic.count(fn, *arguments)
    for kernel in issued(counted.calls, compiled, target.chip): print(kernel.name, kernel.bundles, kernel.loops)

A kernel is bound by its own instructions where it issues more bundles than the memory takes cycles for its bytes. The
bytes that it moves do not show that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pallas_kernels.analysis import bundle_runs, bundles
from pallas_kernels.analysis.targets import Compiled
from pallas_kernels.analysis.traffic import Call
from pallas_kernels.hardware import Chip


@dataclass(frozen=True)
class LoopIssued:
    """A loop of a kernel: how often it turns, what one turn issues, and how deep it is; 1: the grid's loop."""

    depth: int
    turns: int
    bundles: int
    counts: dict[str, int]


@dataclass(frozen=True)
class Issued:
    """What one kernel issues in one run.

    Attributes:
      bundles: of each core of the device; None: a branch depends on values that are not given.
      static: bundles of the program, each counted once.
      counts: instructions issued by the busiest core, by the names of `bundles.KINDS`.
      loops: as the busiest core runs them; with 0 turns where they are not known.
    """

    name: str
    bundles: tuple[int, ...] | None
    static: int
    counts: dict[str, int]
    loops: tuple[LoopIssued, ...]


def issued(calls: Sequence[Call], compiled: Compiled, chip: Chip) -> list[Issued]:
    """The kernels of a program, compiled for a TPU by a process that was started with a dump folder.

    Args:
      calls: the program's, as `traffic.count` finds them.

    Raises:
      ValueError: the compiler left no schedules, or not those of these calls.
    """
    if not compiled.schedules:
        raise ValueError("no schedules: start the process with targets.environment(dump=FOLDER)")
    named = sorted(compiled.schedules.items(), key=lambda item: _number(item[0]))
    left, found = {name: bundles.read(text) for name, text in named}, []
    for call in calls:
        shapes = [_shape(x) for _, x in call.given]
        # The compiler may leave operands out that nothing reads, but renames none.
        fits = (name for name, x in left.items() if all(shapes[o.index] == o.shape for o in x.operands))
        if (name := next(fits, None)) is None:
            raise ValueError(f"the compiler's schedules {list(left)} have none with the operands of {call.name}")
        values = {i: v for i, (v, _) in enumerate(call.given) if v is not None and v.dtype.kind == "i"}
        found.append(_issued(name, left.pop(name), values, chip.device_cores))
    return found


def _issued(name: str, schedule: bundles.Schedule, values: dict[int, np.ndarray], cores: int) -> Issued:
    try:
        runs = [bundle_runs.run(schedule, values, core) for core in range(cores)]
    except bundle_runs.UnknownBranch:
        loops = tuple(LoopIssued(x.depth, 0, x.bundles, dict(x.counts)) for x in schedule.loops)
        return Issued(name, None, len(schedule.bundles), {}, loops)
    most = max(runs, key=lambda run: run.bundles)
    loops = tuple(
        LoopIssued(x.depth, turns, x.bundles, dict(x.counts))
        for x, turns in zip(schedule.loops, most.turns, strict=True)
    )
    return Issued(name, tuple(run.bundles for run in runs), len(schedule.bundles), dict(most.counts), loops)


def memory_cycles(chip: Chip, nbytes: float) -> float:
    """Cycles of one device of a chip in which its memory moves `nbytes`, at the published bandwidth."""
    return nbytes * chip.devices * chip.clock_ghz / chip.hbm_gbps


def _number(name: str) -> int:
    """The number behind a kernel's name: `paged_attention.2` is called before `paged_attention.3`."""
    found = re.search(r"\.(\d+)$", name)
    return int(found[1]) if found else 0


def _shape(x: Any) -> str:
    """A shape as the compiler writes it, such as `bf16[8,128]`."""
    dtype = str(x.dtype)
    short = {"bfloat16": "bf16", "bool": "pred"}.get(dtype)
    if short is None:
        kind, bits = re.fullmatch(r"([a-z]+?)(\d+)(?:_\w+)?", dtype).groups()  # type: ignore[union-attr]
        short = {"float": "f", "int": "s", "uint": "u"}[kind] + bits
    return f"{short}[{','.join(map(str, x.shape))}]"
