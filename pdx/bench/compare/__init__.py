"""`pdx compare`: XLA against pdx's Pallas kernels and against other kernels, op by op and for whole steps.

This process's device is measured. Other chips get figures from their compilers. Each row says which it is (`rung`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pdx.bench.compare import absent_chips, ceiling, contestants, measure, paths, selection, steps
from pdx.bench.compare.rows import Comparison, Row
from pdx.bench.compare.steps import Subject
from pdx.installation.compilation_cache import folder_in_use
from pdx.installation.devices import device_name
from pdx.weights.load import default_dtype
from pdx.weights.progress import Report, silent

__all__ = ["Comparison", "Row", "compare"]

ROUNDS = 5
ACCELERATORS = ("tpu", "gpu")


def compare(
    ops: Sequence[str] = (),
    *,
    shapes: str | None = None,
    targets: Sequence[str] | None = None,
    model: str = "smollm2-135m-instruct",
    rounds: int = ROUNDS,
    cycles: bool = False,
    all_layers: bool = False,
    extra: Mapping[str, Any] | None = None,
    progress: Report = silent,
) -> Comparison:
    """Measure implementations on this process's device, and compile them for other chips.

    Args:
      ops: names of `pallas_kernels.analysis.problems`, and `steps` for prefill and decode of a whole model; none: all.
      shapes: `all`, or a part of a case's name; None: the default of `selection.cases`.
      targets: chips to report static figures for, as named in `pallas_kernels.analysis.targets`; None:
        `selection.TARGETS` if there is no accelerator, else none.
      model: the model of the steps: a model argument of `pdx.load`, or a shape of `configs/` (random weights).
      rounds: how often each implementation of a case is timed, in turn with the others.
      cycles: also report the compilers' static cycles, which takes a process and a compilation per kernel.
      all_layers: compile steps for `targets` with all layers of the model; else with the first of each kind.
      extra: your own implementations, by their name in the table: a module or function as in
        `pallas_kernels.implementation`, or `package.module:name` of one. It is compared for the single op in `ops`, or
        for its own `OP`; with `steps`, also in the step that the op is part of.
      progress: called after each measurement and compilation.

    Raises:
      RequestError: an op, a shape or a target that does not exist; the message lists those that do.
      ModelNotFoundError: no such model.

    Example, comparing XLA with your own function `mine(q, k, v, ...)`:
      >>> found = pdx.compare(["decode_attention"], extra={"mine": mine}, targets=[])  # doctest: +SKIP
      >>> [(row.path, row.seconds) for row in found.rows]  # doctest: +SKIP
    """
    named = selection.ops(ops)
    own = paths.own(extra, named)
    platform = measure.platform()
    cases = selection.chosen(named, shapes, platform)
    wanted = selection.check_targets(
        targets if targets is not None else () if platform in ACCELERATORS else selection.TARGETS
    )
    subject = Subject(model, jnp.dtype(default_dtype(jax.devices()[0])).name) if selection.STEPS in named else None
    phases = steps.shapes_for(platform, subject.config()) if subject else []
    progress("measuring the device", 0, 1)
    chip, source = ceiling.device_roofline()
    found = Comparison(device_name(every=False), chip, source, {"jax": jax.__version__})
    found.notes += _notes(found.device, platform, own if subject else {})
    total = len(cases) + len(phases)
    for i, (op, case) in enumerate(cases):
        progress("measuring", i, total)
        found.rows += measure.case_rows(op, case, chip, found.device, rounds, tuple(wanted), own.get(op))
    if subject:
        params = steps.parameters(subject)
        for i, shape in enumerate(phases, len(cases)):
            progress("measuring", i, total)
            found.rows += steps.rows(subject, params, shape, chip, found.device, rounds, tuple(wanted), own)
        del params
    progress("measuring", total, total)
    absent = subject and Subject(model, "bfloat16", all_layers)
    for target in wanted:
        found.rows += absent_chips.rows(target, cases, absent, phases, cycles, progress, own)
    return found


def _notes(device: str, platform: str, in_steps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences about what this run cannot compare. `in_steps`: the user's kernels, if steps are compared."""
    notes = [*contestants.missing_peers(), *paths.notes_on_steps(in_steps)]
    if platform not in ACCELERATORS:
        notes.insert(
            0,
            f"No accelerator here: on {device} the Pallas kernels have no times. Small cases are interpreted, "
            "which gives their errors.",
        )
    if folder := folder_in_use():
        notes.append(
            f"Compiled programs are cached in {folder}: the compile time of a cached one is only that of loading it."
        )
    return notes
