"""The paths of an op that stand beside one another: XLA's, the Pallas kernels of a platform, and a user's own."""

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
PHASES = {"flash_attention": "prefill", "decode_attention": "decode"}  # the step that an op of a dense cache is part of


@dataclass(frozen=True)
class Path:
    """One path of an op: its name in tables, and a name of the library's or a user's own implementation."""

    name: str
    implementation: Any

    def of(self, op: str) -> Any:
        """The implementation itself."""
        return op_of(op).find(self.implementation)

    @property
    def reference(self) -> str | None:
        """How another process names the implementation; None if it cannot."""
        return implementation.reference_of(self.implementation)

    def problem(self, op: str, case: Any, platform: str) -> Problem:
        """A case for this path, its cache lying as the path reads it; as the platform's caches lie if it reads all."""
        declared = getattr(self.of(op), "LAYOUTS", None)
        here = default_layout(platform)
        return problems.OPS[op](case, self.implementation, here if not declared or here in declared else declared[0])


def library(op: str, platform: str) -> list[Path]:
    """The library's kernels of an op for a platform: the one that `auto` takes first is called `pallas`."""
    names = problems.for_platform(op, platform)
    return [Path(PALLAS if i == 0 else name, name) for i, name in enumerate(names)]


def here(op: str, platform: str, extra: Mapping[str, Any]) -> list[Path]:
    """What runs on a device of this platform."""
    own = [Path(label, x) for label, x in extra.items()]
    return [Path(XLA, "xla"), *library(op, platform), *(p for p in own if implementation.runs_on(p.of(op), platform))]


def elsewhere(op: str, platform: str, extra: Mapping[str, Any]) -> list[Path]:
    """What only runs on devices of other platforms, and can be interpreted."""
    native, kernels = problems.for_platform(op, platform), {}
    for other in PLATFORMS:
        for i, name in enumerate(problems.for_platform(op, other)):
            kernels.setdefault(name, name if i else f"{PALLAS} {name}")
    own = [Path(label, x) for label, x in extra.items()]
    library = [Path(label, name) for name, label in kernels.items() if name not in native]
    return [*library, *(p for p in own if not implementation.runs_on(p.of(op), platform))]


def step_kernels(phase: str, extra: Mapping[str, Mapping[str, Any]], platform: str) -> dict[str, Mapping[str, Any]]:
    """What `kernels=` of a step is, by label, for those of one's own that are part of the phase and run here."""
    return {
        label: {op: x}
        for op, by_label in extra.items()
        if PHASES.get(op) == phase
        for label, x in by_label.items()
        if implementation.runs_on(op_of(op).find(x), platform)
    }


def own(extra: Mapping[str, Any] | None, named: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Implementations of one's own by op and label.

    Args:
      extra: by label: a module, object or function, or `package.module:name` of one.
      named: the ops asked for.

    Raises:
      RequestError: a label that is taken, what is no implementation, or one whose op is not told.
    """
    found: dict[str, dict[str, Any]] = {}
    ops = [op for op in named if op in problems.OPS]
    for label, given in (extra or {}).items():
        if label in (XLA, PALLAS):
            raise RequestError(f"{label!r} is the name of one of pdx's own paths: give yours another")
        try:
            mine = implementation.load(given) if isinstance(given, str) else given
            op = getattr(mine, "OP", None) or (ops[0] if len(ops) == 1 else None)
            if op not in problems.OPS:
                known = ", ".join(problems.OPS)
                raise RequestError(
                    f"{label}: for which op is it? Name one op, alone or with steps, or set its OP to one of {known}"
                )
            op_of(op).implementation(mine)
        except ValueError as error:
            raise RequestError(str(error)) from None
        found.setdefault(op, {})[label] = mine
    return found


def for_steps(extra: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on those that no compared step has a place for."""
    absent = [label for op, by_label in extra.items() if op not in PHASES for label in by_label]
    return [f"{', '.join(absent)}: prefill and decode steps are compared over dense caches only"] if absent else []
