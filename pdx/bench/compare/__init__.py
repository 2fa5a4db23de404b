"""`pdx compare`: XLA's paths against the Pallas kernels and against other people's, op by op and for whole steps.

What is here is measured; chips that are not are compiled for. Which is which stands in every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pdx.bench.compare import absent_chips, ceiling, contestants, measure, paths, selection, steps
from pdx.bench.compare.rows import Comparison, Row
from pdx.bench.compare.steps import Subject
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
    """Measure on this process' device, and compile for those asked for.

    Args:
      ops: of `pallas_kernels.analysis.problems`, and `steps` for prefill and decode of a whole model; none: all.
      shapes: `all`, or part of a case's name; None: `selection`'s default.
      targets: chips to give static figures for, as `pallas_kernels.analysis.targets` names them; None:
        `selection.TARGETS` where there is no accelerator, else none.
      model: whose steps: anything that `pdx.load` takes, or a shape of `configs/`, which gets random weights.
      rounds: how often each contestant of a case is timed; they take turns.
      cycles: the compilers' static cycles too: a process and a compilation a kernel.
      all_layers: compile steps for `targets` with all layers of the model; else with the first of each kind.
      extra: implementations of one's own by the name that they get in the table: a module or function as
        `pallas_kernels.implementation` describes it, or `package.module:name` of one. It is for the one op named, or
        for its OP; with `steps` it also runs in the step that its op is part of.
      progress: told of what is done.

    Raises:
      RequestError: an op, a shape or a target that does not exist; the message lists those that do.
      ModelNotFoundError: no such model.

    Example, XLA beside one's own function `mine(q, k, v, ...)`:
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
    chip, source = ceiling.of_this_device()
    notes = [*contestants.absent(), *(paths.for_steps(own) if subject else ())]
    found = Comparison(device_name(every=False), chip, source, {"jax": jax.__version__}, notes=notes)
    if platform not in ACCELERATORS:
        found.notes.insert(
            0,
            f"No accelerator here: on {found.device} the Pallas kernels have no times, only errors, "
            "interpreted, where a case is small enough.",
        )
    if jax.config.jax_compilation_cache_dir:
        found.notes.append(
            f"Compiled programs are kept in {jax.config.jax_compilation_cache_dir}: one that is found "
            "there takes less than compile says."
        )
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
