"""`Row`, one line of a comparison, whether measured or only compiled; and `Comparison`, all rows of a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pallas_kernels.hardware import Chip
from pdx.io import outputs

XLA, PALLAS = "xla", "pallas"
# The largest tolerated relative error, by operand type.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2, "int8": 3e-2}
# The source of a row's figures.
MEASURED, INTERPRETED, COMPILED, COUNTED, NOT_RUN = "measured", "interpreted", "compiled", "counted", "not run"


@dataclass(frozen=True)
class Row:
    """One path of one case on one device. A figure that does not exist is None.

    Attributes:
      op, case: an op and one of its cases, or `prefill` or `decode` and their shape.
      path: xla, pallas, or the name of another implementation.
      device: this process's device, or a target that was compiled for.
      rung: `measured`: with times; `interpreted`: with an error only; `compiled`, `counted`: static figures with and
        without the compiler; `not run`: the reason is in `note`.
      ran: what the compiled program contains.
      auto: whether `auto` takes this path on the device.
      dtype: the operand type.
      bytes, flops: what the case needs at least, for any path.
      seconds, low, high: device time of a call: median and quartiles.
      dispatch_seconds: the host's launch of a call, not part of `seconds`.
      compile_seconds: of the program.
      roofline_seconds, bound: the device's floor for the case, and whether compute or memory sets it.
      max_error, relative_error: the largest difference from the f32 reference; the same over the largest right value.
      moved_bytes, done_flops: of a kernel, counted from grid, index maps and DMAs.
      temp_bytes, vmem_bytes, shared_bytes, registers, spill_bytes, cycles: the compiler's figures.
      cycle_seconds: the static cycles at the chip's clock. It is not a measured time.
    """

    op: str
    case: str
    path: str
    device: str
    rung: str
    ran: str = ""
    auto: bool = False
    dtype: str = ""
    bytes: int | None = None
    flops: int | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    dispatch_seconds: float | None = None
    compile_seconds: float | None = None
    roofline_seconds: float | None = None
    bound: str = ""
    max_error: float | None = None
    relative_error: float | None = None
    moved_bytes: int | None = None
    done_flops: int | None = None
    temp_bytes: int | None = None
    vmem_bytes: int | None = None
    shared_bytes: int | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    cycles: int | None = None
    cycle_seconds: float | None = None
    note: str = ""

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes / self.seconds / 1e9 if self.seconds else None

    @property
    def tflop_per_s(self) -> float | None:
        return self.flops / self.seconds / 1e12 if self.seconds else None

    @property
    def of_roofline(self) -> float | None:
        """The share of the roofline that was reached; above 1 if operands stay in a cache between calls."""
        return self.roofline_seconds / self.seconds if self.seconds else None

    @property
    def wrong(self) -> bool:
        """Whether the error is too large to be rounding."""
        return self.relative_error is not None and not self.relative_error <= TOLERANCE.get(self.dtype, 3e-2)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json` and `--csv`. A NaN error is None there, and `wrong` is true."""
        values = asdict(self) | {name: getattr(self, name) for name in DERIVED}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


DERIVED = ("gb_per_s", "tflop_per_s", "of_roofline", "wrong")
COLUMNS = (*(f.name for f in fields(Row)), *DERIVED)


def limits(chip: Chip, flops: float, nbytes: float, dtype: str) -> dict[str, Any]:
    """`roofline_seconds` and `bound` of a case with these FLOPs and bytes."""
    compute = flops / (chip.tflops(dtype) * 1e12)
    bound = "compute" if compute > nbytes / (chip.hbm_gbps * 1e9) else "memory"
    return {"roofline_seconds": chip.seconds(flops, nbytes, dtype), "bound": bound}


@dataclass
class Comparison:
    """The results of one run."""

    device: str
    chip: Chip  # the device; its figures give the roofline
    ceiling: str  # the source of these figures
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cases(self) -> Iterator[tuple[str, str, list[Row]]]:
        """(op, case, its rows), in the order of the first rows."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.op, row.case), []).append(row)
        for (op, case), rows in found.items():
            yield op, case, rows

    def verdicts(self) -> list[dict[str, Any]]:
        """The speed of each path relative to XLA, by device time. Paths with wrong results are left out if XLA's is."""
        found = []
        for op, case, rows in self.cases():
            base = next((r for r in rows if r.path == XLA and r.seconds and not r.wrong), None)
            for row in rows:
                if base is not None and row is not base and row.seconds:
                    found.append(
                        {
                            "op": op,
                            "case": case,
                            "path": row.path,
                            "over_xla": base.seconds / row.seconds,
                            "verdict": verdict(row, base),
                        }
                    )
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "ceiling": asdict(self.chip) | {"from": self.ceiling},
            "versions": self.versions,
            "rows": [r.to_dict() for r in self.rows],
            "verdicts": self.verdicts(),
            "notes": self.notes,
        }

    def write_csv(self, file: Path) -> None:
        """Write one line per row, with a column for each field of `Row`."""
        with outputs.opened(file, newline="") as out:
            writer = csv.DictWriter(out, COLUMNS)
            writer.writeheader()
            writer.writerows(row.to_dict() for row in self.rows)


def verdict(row: Row, base: Row) -> str:
    """`faster`, `slower`, `same` (the quartiles overlap), or `wrong`."""
    if row.wrong:
        return "wrong"
    if row.low <= base.high and base.low <= row.high:
        return "same"
    return "faster" if row.seconds < base.seconds else "slower"
