"""The cases, steps and targets of a comparison: defaults, and checks of the user's choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pallas_kernels.analysis import problems, targets
from pdx.errors import RequestError

STEPS = "steps"
# Default cases on a CPU: for each op one that is small enough to interpret its Pallas kernel, and realistic ones that
# two cores run in less than a second.
ON_CPU = {
    "flash_attention": ("SmolLM2 135M, float32", "SmolLM2 135M, bf16"),
    "decode_attention": ("SmolLM2 135M, float32", "SmolLM2 135M, f32"),
    "paged_attention": ("one KV head of 256", "smollm2 mixed"),
    "quantized_matmul": ("W8A16, groups of 32", "llama gate, W8A16, f32", "llama gate, W8A8, decode"),
}
# Default targets if there is no accelerator: Colab's TPU.
TARGETS = ("v5e",)


def ops(named: Sequence[str]) -> list[str]:
    """The named ops, which may include `steps`; all if none is named. Raises RequestError for an unknown one."""
    known = [*problems.ops(), STEPS]
    for name in named:
        if name not in known:
            raise RequestError(f"no op {name!r} to compare; there are {', '.join(known)}")
    return list(dict.fromkeys(named)) or known


def cases(op: str, shapes: str | None, platform: str) -> list[Any]:
    """Cases of an op. `shapes`: `all`, or a part of a name; None: a few on a CPU, elsewhere all realistic ones."""
    if shapes is None and platform == "cpu":
        return [c for c in problems.cases(op) if c.name in ON_CPU[op]]
    if shapes is None:
        return problems.cases(op, large_only=True)
    return [c for c in problems.cases(op) if shapes == "all" or shapes in c.name]


def chosen(named: Sequence[str], shapes: str | None, platform: str) -> list[tuple[str, Any]]:
    """All (op, case) pairs to compare.

    Raises:
      RequestError: no case's name contains `shapes`; the message lists the names.
    """
    found = [(op, case) for op in named if op != STEPS for case in cases(op, shapes, platform)]
    if not found and shapes is not None and any(op != STEPS for op in named):
        known = [c.name for op in named if op != STEPS for c in problems.cases(op)]
        raise RequestError(f"no case has {shapes!r} in its name; there are: {'; '.join(known)}")
    return found


def check_targets(named: Sequence[str]) -> list[str]:
    """The named targets without repetitions. Raises RequestError for an unknown one."""
    for name in named:
        try:
            targets.Target.get(name)
        except ValueError as error:
            raise RequestError(f"target {name!r}: {error}; targets are {', '.join(targets.NAMES)}") from None
    return list(dict.fromkeys(named))
