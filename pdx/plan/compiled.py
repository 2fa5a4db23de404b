"""Compiles a plan's steps with the chip's own compiler, to compare its memory and traffic with the plan.

Each step is compiled in its own process, `python -m pdx.plan.compiled` with a request on standard input, because a
compiler can crash its process, and libtpu reads its environment only once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pallas_kernels.analysis import targets
from pallas_kernels.hardware import Chip
from pdx import aot
from pdx.config import ModelConfig
from pdx.errors import RequestError, UnsupportedModelError
from pdx.plan.figures import Plan
from pdx.shapes import DEFAULT_CHUNK

# Axes of a TPU's slices -> number of chips -> shape of the slice.
SLICES = {
    2: {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class CompiledStep:
    """One step as planned and as compiled, in bytes per device.

    Attributes:
      planned: weights and cache.
      planned_accessed: bytes that the step moves.
      fits: None if the compiler failed for another reason, which is in `error`.
      memory: argument, temp, output, alias and code; None if it did not compile.
      accessed: the bytes that XLA counts; for a Pallas call, those of its `CostEstimate`.
      seconds: compile time on this machine.
      wanted: the memory that the compiler asked for, if the step does not fit.
      error: the compiler's message.
    """

    name: str
    planned: int
    planned_accessed: float
    fits: bool | None
    memory: Mapping[str, int] | None = None
    accessed: float | None = None
    seconds: float | None = None
    wanted: int | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        units = {
            "planned": "planned_bytes",
            "planned_accessed": "planned_accessed_bytes",
            "memory": "memory_bytes",
            "accessed": "accessed_bytes",
            "seconds": "compile_s",
            "wanted": "wanted_bytes",
        }
        return {units.get(name, name): value for name, value in asdict(self).items()}


def target(chip: Chip, chips: int) -> str:
    """The name of a slice of `chips` chips in `pallas_kernels.analysis.targets`.

    Raises RequestError if there is no such slice.
    """
    if chips == 1:
        return chip.name
    if chip.platform == "gpu":
        return f"{chip.name}:{chips}"
    shapes = SLICES[chip.axes]
    if chips not in shapes:
        raise RequestError(f"--compile: {chip.name} has slices of 1, {', '.join(map(str, shapes))} chips, not {chips}")
    return f"{chip.name}:{shapes[chips]}"


def compiled(plan: Plan) -> list[CompiledStep]:
    """Prefill of one prompt and decode of the batch, as planned and as compiled.

    Raises:
      RequestError: there is no compiler for the chip, or it is not installed; the message says what to do.
      UnsupportedModelError: pdx can plan the model but not run it.
    """
    setup = plan.setup
    if setup.experts or setup.latent:
        raise UnsupportedModelError(
            f"--compile: pdx can plan {plan.model}, but it cannot run "
            f"{'experts' if setup.experts else 'latent attention'} yet"
        )
    on = target(plan.chip, plan.chips)
    try:
        why = targets.missing(on)
    except ValueError as error:
        raise RequestError(f"--compile: {error}") from None
    if why:
        raise RequestError(f"--compile: {why}")
    devices = plan.chips * plan.chip.devices
    shared = {
        "config": setup.cfg.to_json(),
        "target": on,
        "capacity": max(plan.context, plan.prompt),
        "dtype": setup.dtype,
        "kv_dtype": setup.kv_dtype,
        "mesh": {"model": devices} if devices > 1 else None,
        "quantize": None if setup.quantize is None else str(setup.quantize),
    }
    weights = sum(setup.weights.values())
    asked = (("prefill", 1, plan.prompt, plan.prefill), ("decode_step", plan.batch, DEFAULT_CHUNK, plan.decode))
    found = []
    for step, batch, tokens, predicted in asked:
        planned = (weights + setup.cache_bytes(batch, shared["capacity"])) // devices
        said = _run(shared | {"step": step, "batch": batch, "tokens": min(tokens, shared["capacity"])})
        found.append(_read(step, planned, predicted.bytes / devices, said))
    return found


def _run(request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "pdx.plan.compiled"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | targets.environment() | {"XLA_FLAGS": ""},
        check=False,
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"the compiler's process ended with {done.returncode}: {done.stderr.strip()[-500:]}"}


def _read(step: str, planned: int, planned_accessed: float, said: dict[str, Any]) -> CompiledStep:
    found = {"name": step, "planned": planned, "planned_accessed": planned_accessed}
    if "error" not in said:
        return CompiledStep(
            fits=True, memory=said["memory"], accessed=said["accessed"], seconds=said["seconds"], **found
        )
    error = said["error"]
    if "RESOURCE_EXHAUSTED" not in error:
        return CompiledStep(fits=None, error=error, **found)
    sizes = re.search(r"\(?([\d.]+)([KMGT])\)? exceeds available", error) or re.search(r"Used ([\d.]+)([KMGT])", error)
    wanted = int(float(sizes.group(1)) * UNITS[sizes.group(2)]) if sizes else None
    return CompiledStep(fits=False, wanted=wanted, error=error.splitlines()[0], **found)


def _child() -> None:
    """Compile the step that standard input describes, and print the result."""
    asked = json.load(sys.stdin)
    step, cfg, target = asked.pop("step"), ModelConfig.from_json(asked.pop("config")), asked.pop("target")
    try:
        made = aot.compile_step(step, cfg, target, **asked)
        said = {"memory": dict(made.memory), "accessed": made.cost.get("bytes accessed"), "seconds": made.seconds}
    except Exception as error:  # any error of the compiler is a result
        said = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(said))


if __name__ == "__main__":
    _child()
