"""Compiles cases and steps for one target and prints one JSON object per line. `absent_chips` starts this process.

`python -m pdx.bench.compare.compile_process` reads from standard input what to compile, and needs the environment that
`pallas_kernels.analysis.targets.environment` returns. The figures are those of `pallas_kernels.analysis.static` and
`pdx.aot`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from pallas_kernels import implementation
from pallas_kernels.analysis import hlo, problems, static
from pallas_kernels.analysis.targets import Target
from pdx import aot
from pdx.bench.compare.absent_chips import MARK
from pdx.bench.compare.measure import describe_kernels, reason, start_row, what_ran
from pdx.bench.compare.paths import Path, step_kernels
from pdx.bench.compare.rows import COMPILED, NOT_RUN, PALLAS, XLA, Row
from pdx.bench.compare.steps import Shape, Subject, step_row
from pdx.layers.kernels import Kernels

DYNAMIC = "loops of dynamic length: no static cycles"


def compiled(op: str, case: Any, path: Path, target: Target) -> Row:
    """The row of one path of a case, compiled in this process."""
    chip = target.chip
    problem = path.problem(op, case, chip.platform)
    row = replace(start_row(problem, chip, target.name), path=path.name)
    if path.implementation == XLA:
        problem = problem.as_projected()  # as `static.facts` compiles the kernel
        c = target.compile(problem.fn(), *problem.arguments(), donate_argnums=problem.donate_argnums)
        flops = None if " while(" in c.text else c.cost.get("flops")  # XLA counts a loop's body only once
        return replace(
            row,
            rung=COMPILED,
            ran=what_ran(c.text),
            compile_seconds=c.seconds,
            temp_bytes=c.memory["temp"],
            moved_bytes=xla_bytes(c.text),
            done_flops=None if flops is None else int(flops),
        )
    with target.tracing():
        if refused := problem.unsupported:
            return replace(row, note=refused)
    facts = static.facts(problem, target)
    kernels = facts["kernels"]
    return replace(
        row,
        rung=COMPILED,
        ran=describe_kernels(facts["pallas_calls"]),
        compile_seconds=facts["seconds"],
        temp_bytes=facts["temp"],
        moved_bytes=facts["bytes"],
        done_flops=facts["flops"],
        vmem_bytes=facts["vmem_bytes"] if chip.platform == "tpu" else None,
        shared_bytes=max((k["shared_bytes"] for k in kernels), default=None),
        registers=max((k["registers"] for k in kernels), default=None),
        spill_bytes=sum(k["spill_bytes"] for k in kernels) if kernels else None,
        note="" if not facts["dynamic"] else DYNAMIC,
    )


# Instructions that move no bytes themselves.
_NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done")


def xla_bytes(text: str) -> int | None:
    """Bytes that a program's instructions read and write in HBM, with a fusion as one instruction; None for a program
    with loops, whose length is not known. XLA's own "bytes accessed" also counts values inside a fusion."""
    module = hlo.Module(text)
    body = module.computations[module.entry]
    if any(i.opcode in ("while", "conditional", "call") for i in module.instructions()):
        return None

    def size(i: hlo.Instruction) -> int:
        shapes = i.shapes[:1] if i.opcode.endswith("-start") else i.shapes
        return sum(s.bytes for s in shapes if s.memory_space == 0)

    found = 0
    for i in body.values():
        if i.opcode not in _NAMES:
            found += size(i) + sum(size(body[name]) for name in i.operands if name in body)
    return found


def compiled_step(subject: Subject, shape: Shape, kernels: Kernels, target: str, row: Row) -> Row:
    """The row of a whole step, compiled in this process; `row` has the figures that are known before."""
    cfg, layers = subject.compiled_config(), subject.config().num_layers
    c = aot.compile_step(
        "prefill" if shape.phase == "prefill" else "decode_step",
        cfg,
        target,
        batch=shape.batch,
        capacity=shape.capacity,
        tokens=shape.tokens,
        dtype=subject.dtype,
        kernels=kernels,
    )
    return replace(
        row,
        rung=COMPILED,
        ran=what_ran(c.text) + (f" in {cfg.num_layers} of {layers} layers" if cfg.num_layers < layers else ""),
        compile_seconds=c.seconds,
        temp_bytes=c.memory["temp"],
        vmem_bytes=c.vmem_bytes if Target.get(target).chip.platform == "tpu" else None,
    )


def _child(request: dict[str, Any]) -> None:
    target = Target.get(request["target"])
    for op, name, label, reference in request["ops"]:
        case = next(c for c in problems.cases(op) if c.name == name)
        path = Path(label, problems.named(op, target.chip.platform, reference))
        empty = replace(start_row(problems.OPS[op](case, "xla"), target.chip, target.name), path=label)
        _print_row(lambda op=op, case=case, path=path: compiled(op, case, path, target), empty)
    extra: dict[str, dict[str, Any]] = {}
    for op, label, reference in request["own"]:
        extra.setdefault(op, {})[label] = implementation.load(reference)
    for values in request["steps"]:
        subject, shape = Subject(**request["subject"]), Shape(**values)
        own = step_kernels(shape.phase, extra, target.chip.platform)
        for label, kernels in (*((path, path) for path in (PALLAS, XLA)), *own.items()):
            row = replace(step_row(subject, shape, target.chip, target.name), path=label)
            _print_row(lambda a=subject, b=shape, k=kernels, row=row: compiled_step(a, b, k, target.name, row), row)


def _print_row(make: Callable[[], Row], empty: Row) -> None:
    try:
        row = make()
    except Exception as error:  # refused by the compiler: continue with the next row
        row = replace(empty, rung=NOT_RUN, note=reason(error))
    print(MARK + json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    _child(json.load(sys.stdin))
