"""Static figures of cases and steps for chips that are not here: bytes and FLOPs of kernels, memory from compilers.

A target's compiler runs in a separate process (`compile_process`), since it may crash. Without the compiler, bytes and
FLOPs are counted from grids and index maps. Nothing here is a measured time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from typing import Any

from pallas_kernels.analysis import problems, static, targets
from pallas_kernels.analysis.targets import Target
from pdx.bench.compare.measure import reason, start_row
from pdx.bench.compare.paths import PHASES, Path, runnable_paths
from pdx.bench.compare.rows import COMPILED, COUNTED, PALLAS, XLA, Row
from pdx.bench.compare.steps import Shape, Subject, step_row
from pdx.errors import RequestError
from pdx.weights.progress import Report, silent

MARK = "COMPARE "  # prefix of the process's output lines that hold a row

Case = tuple[str, Any]


def rows(
    name: str,
    cases: Sequence[Case],
    subject: Subject | None,
    shapes: Sequence[Shape],
    cycles: bool,
    progress: Report = silent,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """The rows of one target. Without its compiler, kernels are counted and steps have the cost model's figures.

    Args:
      name: the target.
      cases: (op, case) pairs.
      subject, shapes: a model and the steps of it to compile; None: no steps.
      cycles: also get the compiler's static cycles, which takes a process and a compilation per kernel.
      progress: called after each measurement and compilation.
      extra: the user's implementations by op and label. Another process must be able to import them.

    Raises:
      RequestError: the compiler ended before it returned anything.
    """
    target, extra = Target.get(name), extra or {}
    kernels = [(op, case, path) for op, case in cases for path in _kernels(op, target, extra)]
    if (why := targets.missing(name)) is not None:
        report = _counting(name, len(kernels), progress)
        return [
            *(counted(*kernel, target, why, report) for kernel in kernels),
            *(
                replace(step_row(subject, shape, target.chip, name), path=PALLAS, rung=COUNTED, note=why)
                for shape in (shapes if subject else ())
            ),
        ]
    own = [(op, p.name, p.reference) for op in extra for p in _kernels(op, target, extra) if p.name in extra[op]]
    wanted = [
        (op, case.name, path.name, path.reference)
        for op, case in cases
        for path in (*_kernels(op, target, extra), Path(XLA, "xla"))
        if path.reference
    ]
    request = {
        "own": [x for x in own if x[2]],
        "target": name,
        "ops": wanted,
        "steps": [asdict(s) for s in shapes] if subject else [],
        "subject": asdict(subject) if subject else None,
    }
    steps = sum(2 + sum(PHASES.get(op) == s.phase for op, _, _ in request["own"]) for s in shapes if subject)
    report = _counting(name, len(wanted) + steps + len(kernels) * cycles, progress)
    found = list(_compile_in_process(request, report))
    missing = len(wanted) + steps - len(found)
    if missing and not found:
        raise RequestError(f"the compiler for {name} ended without a result: leave {name} out of --targets")
    if missing:
        found[-1] = replace(
            found[-1], note=f"{found[-1].note} The compiler ended here: {missing} more are missing.".strip()
        )
    found += _not_importable(cases, target, extra)
    return with_cycles(found, kernels, target, report) if cycles else found


def _counting(target: str, total: int, progress: Report) -> Callable[[str], None]:
    """A function that reports one thing more as done each time that it is called."""
    done = count(1)
    progress(f"compiling for {target}", 0, total)
    return lambda what: progress(f"compiling for {target}", min(next(done), total), total)


def _kernels(op: str, target: Target, extra: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """The kernels of an op that run on a target: the library's and the user's."""
    return [path for path in runnable_paths(op, target.chip.platform, extra.get(op, {})) if path.name != XLA]


def _not_importable(cases: Sequence[Case], target: Target, extra: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Rows that say why a user's kernel is not compiled."""
    note = "the compiler's process cannot import this kernel: give it as package.module:function"
    return [
        replace(start_row(problems.OPS[op](case, "xla"), target.chip, target.name), path=path.name, note=note)
        for op, case in cases
        for path in _kernels(op, target, extra)
        if not path.reference
    ]


def counted(op: str, case: Any, path: Path, target: Target, why: str, report: Callable[[str], None]) -> Row:
    """A kernel's row, counted from its grid and index maps without a compiler; `why` there is none."""
    report(f"{target.name}: {op}, {case.name}")
    problem = path.problem(op, case, target.chip.platform)
    row = replace(start_row(problem, target.chip, target.name), path=path.name)
    try:
        with target.tracing():
            if refused := problem.unsupported:
                return replace(row, note=refused)
        facts = static.facts(problem, target, compile=False)
    except Exception as error:
        return replace(row, note=reason(error))
    return replace(row, rung=COUNTED, moved_bytes=facts["bytes"], done_flops=facts["flops"], note=why)


def with_cycles(
    rows: Sequence[Row], kernels: Sequence[tuple[str, Any, Path]], target: Target, report: Callable[[str], None]
) -> list[Row]:
    """The rows with the compiler's static cycles: of each kernel that compiled and has no loops of dynamic length.

    XLA's paths have none. The compiler profiles custom calls only.
    """
    problems_of = {
        (op, case.name, path.name): path.problem(op, case, target.chip.platform) for op, case, path in kernels
    }
    found = []
    for row in rows:
        problem = problems_of.get((row.op, row.case, row.path))
        if problem is not None and row.rung == COMPILED and not row.note:
            report(f"{target.name}: cycles of {row.op}, {row.case}, {row.path}")
            if cycles := static.cycles(problem, target):
                seconds = cycles / target.chip.devices / (target.chip.clock_ghz * 1e9)
                row = replace(row, cycles=cycles, cycle_seconds=seconds)
        found.append(row)
    return found


def _compile_in_process(request: dict[str, Any], report: Callable[[str], None]) -> Iterator[Row]:
    command = [sys.executable, "-m", "pdx.bench.compare.compile_process"]
    environment = os.environ | targets.environment() | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        child.stdin.write(json.dumps(request))
        child.stdin.close()
        for line in child.stdout:
            if line.startswith(MARK):
                row = Row(**json.loads(line.removeprefix(MARK)))
                report(f"{row.device}: {row.op}, {row.case}, {row.path}")
                yield row
