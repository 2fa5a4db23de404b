"""The results of a report: the grid of loads, the rows, the pitfalls."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from pallas_kernels.hardware import Chip
from pdx.bench.report.optimizations import Outcome
from pdx.bench.report.pitfalls import Pitfalls
from pdx.bench.report.verdicts import Finding
from pdx.bench.report.verification import Verification
from pdx.bench.timing import Timing
from pdx.cost import Phase
from pdx.cost.chips import MeasuredChip

WITHIN = 0.25  # target of the cost model's median error, relative to the measurement


@dataclass(frozen=True)
class Point:
    """A load of the grid: TTFT of a prompt of `tokens`, or TPOT at a context of `tokens`."""

    phase: Phase
    batch: int
    tokens: int
    measured: Timing
    predicted_s: float
    floor_s: float
    flops: int
    bytes: int

    @property
    def error(self) -> float:
        """Predicted over measured, minus one."""
        return self.predicted_s / self.measured.median - 1


@dataclass(frozen=True)
class Report:
    """The results of one run."""

    model: str
    device: str
    dtype: str
    jax: str
    chip: MeasuredChip
    others: dict[str, Chip]
    points: tuple[Point, ...]
    outcomes: tuple[Outcome, ...]
    pitfalls: Pitfalls | None
    verifications: tuple[Verification, ...]
    seconds: float

    def error(self, phase: Phase) -> float:
        """The median of the predictions' relative errors over the grid."""
        return statistics.median(abs(p.error) for p in self.points if p.phase == phase)

    def to_dict(self) -> dict[str, Any]:
        def plain(x: Any) -> Any:
            if isinstance(x, Timing):
                return {"median": x.median, "rounds": list(x.seconds)}
            if isinstance(x, Chip):
                fields = ("name", "platform", "hbm_gbps", "f32_tflops", "bf16_tflops", "int8_tops")
                made = {"made": x.rates.made} if isinstance(x, MeasuredChip) else {}
                return {name: getattr(x, name) for name in fields} | made
            if dataclasses.is_dataclass(x):
                derived = {Point: "error", Finding: "gain"}.get(type(x))
                fields = [f.name for f in dataclasses.fields(x)] + [derived] * (derived is not None)
                return {name: plain(getattr(x, name)) for name in fields}
            if isinstance(x, dict):
                return {k: plain(v) for k, v in x.items()}
            return [plain(v) for v in x] if isinstance(x, list | tuple) else x

        return plain(self) | {"median_error": {"ttft": self.error("prefill"), "tpot": self.error("decode")}}
