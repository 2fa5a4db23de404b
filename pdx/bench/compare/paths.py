"""The implementations ("paths") of an op that are compared: XLA's, the platform's Pallas kernels, the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels import implementation
from pallas_kernels.analysis import problems
from pallas_kernels.analysis.problem import Problem, op_of
from pdx.bench.compare.rows import PALLAS, XLA
from pdx.cache.layer import default_layout
from pdx.errors import RequestError

PLATFORMS = ("tpu", "gpu")
PHASES = {"flash_attention": "prefill", "decode_attention": "decode"}  # op -> the step over a dense cache that uses it


@dataclass(frozen=True)
class Path:
    """One path of an op: its name in tables, and an implementation by name or object."""

    name: str
    implementation: Any

    def of(self, op: str) -> Any:
        """The implementation itself."""
        return op_of(op).find(self.implementation)

    @property
    def reference(self) -> str | None:
        """The name by which another process can import the implementation; None if it cannot."""
        return implementation.reference_of(self.implementation)

    def problem(self, op: str, case: Any, platform: str) -> Problem:
        """A case for this path, in a cache layout that the path reads: the platform's own, if it can."""
        declared = getattr(self.of(op), "LAYOUTS", None)
        here = default_layout(platform)
        return problems.OPS[op](case, self.implementation, here if not declared or here in declared else declared[0])


def library(op: str, platform: str) -> list[Path]:
    """The library's kernels of an op for a platform. The one that `auto` tries first is named `pallas`."""
    names = problems.for_platform(op, platform)
    return [Path(PALLAS if i == 0 else name, name) for i, name in enumerate(names)]


def runnable_paths(op: str, platform: str, extra: Mapping[str, Any]) -> list[Path]:
    """The paths that run on a device of this platform."""
    own = [Path(label, x) for label, x in extra.items()]
    return [Path(XLA, "xla"), *library(op, platform), *(p for p in own if implementation.runs_on(p.of(op), platform))]


def other_platforms(op: str, platform: str, extra: Mapping[str, Any]) -> list[Path]:
    """The paths that run on other platforms only. Here they can be interpreted."""
    native, kernels = problems.for_platform(op, platform), {}
    for other in PLATFORMS:
        for i, name in enumerate(problems.for_platform(op, other)):
            kernels.setdefault(name, name if i else f"{PALLAS} {name}")
    own = [Path(label, x) for label, x in extra.items()]
    library = [Path(label, name) for name, label in kernels.items() if name not in native]
    return [*library, *(p for p in own if not implementation.runs_on(p.of(op), platform))]


def step_kernels(phase: str, extra: Mapping[str, Mapping[str, Any]], platform: str) -> dict[str, Mapping[str, Any]]:
    """Label -> `kernels=` of a step, for the user's implementations of the phase's op that run on the platform."""
    return {
        label: {op: x}
        for op, by_label in extra.items()
        if PHASES.get(op) == phase
        for label, x in by_label.items()
        if implementation.runs_on(op_of(op).find(x), platform)
    }


def own(extra: Mapping[str, Any] | None, named: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The user's implementations by op and label.

    Args:
      extra: label -> a module, object or function, or `package.module:name` of one.
      named: the ops to compare.

    Raises:
      RequestError: a label that pdx uses itself, an invalid implementation, or one whose op is not known.
    """
    found: dict[str, dict[str, Any]] = {}
    ops = [op for op in named if op in problems.OPS]
    for label, given in (extra or {}).items():
        if label in (XLA, PALLAS):
            raise RequestError(f"{label!r} is the name of one of pdx's own paths: choose another")
        try:
            mine = implementation.load(given) if isinstance(given, str) else given
            op = getattr(mine, "OP", None) or (ops[0] if len(ops) == 1 else None)
            if op not in problems.OPS:
                known = ", ".join(problems.OPS)
                raise RequestError(
                    f"{label}: its op is not known: name one op, alone or with steps, or set its OP to one of {known}"
                )
            op_of(op).implementation(mine)
        except ValueError as error:
            raise RequestError(str(error)) from None
        found.setdefault(op, {})[label] = mine
    return found


def notes_on_steps(extra: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence about the user's implementations whose op is not part of a compared step."""
    absent = [label for op, by_label in extra.items() if op not in PHASES for label in by_label]
    return [f"{', '.join(absent)}: not in the steps, which are compared over dense caches only"] if absent else []
