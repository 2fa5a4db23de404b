"""One line of the comparison, the same for what was measured and for what was only compiled, and all of them."""

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
# Largest error over the largest right value, by the types that are multiplied and stored.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2, "int8": 3e-2}
# What a row's figures rest on.
MEASURED, INTERPRETED, COMPILED, COUNTED, NOT_RUN = "measured", "interpreted", "compiled", "counted", "not run"


@dataclass(frozen=True)
class Row:
    """One path of one case on one device; None where there is no figure.

    Attributes:
      op, case: an op and a case of its list, or `prefill` and `decode` with their shape.
      path: xla, pallas, or a peer by its name.
      device: this process' device, or a target that was compiled for.
      rung: `measured` is the only one with times; `interpreted` has an error only; `compiled` and `counted` are
        static figures, with a compiler and without; `not run` says why in `note`.
      ran: what is in the program, read from its text.
      auto: whether this is the path that `auto` takes on the device.
      bytes, flops: what the case needs, whatever a path does.
      seconds, low, high: of a call on the device: median and quartiles. dispatch_seconds: of the host, apart.
      roofline_seconds, bound: what the device needs at least, and which of its limits that is.
      max_error, relative_error: the largest difference to f32, and that over the largest right value.
      moved_bytes, done_flops: of a kernel, counted from grid, index maps and DMAs.
      temp_bytes, vmem_bytes, shared_bytes, registers, spill_bytes, cycles: what the compiler says.
      cycle_seconds: the static cycles at the chip's clock: not a time that was measured.
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
        """Share of the device's limit; above 1 where operands stayed in a cache from one call to the next."""
        return self.roofline_seconds / self.seconds if self.seconds else None

    @property
    def wrong(self) -> bool:
        """Whether the error is larger than rounding explains."""
        return self.relative_error is not None and not self.relative_error <= TOLERANCE.get(self.dtype, 3e-2)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` and `--csv` give of it; an error that is no number (NaN in a result) is None, and `wrong`."""
        values = asdict(self) | {name: getattr(self, name) for name in DERIVED}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


DERIVED = ("gb_per_s", "tflop_per_s", "of_roofline", "wrong")
COLUMNS = (*(f.name for f in fields(Row)), *DERIVED)


def limits(chip: Chip, flops: float, nbytes: float, dtype: str) -> dict[str, Any]:
    """`roofline_seconds` and `bound` of what needs so much."""
    compute = flops / (chip.tflops(dtype) * 1e12)
    bound = "compute" if compute > nbytes / (chip.hbm_gbps * 1e9) else "memory"
    return {"roofline_seconds": chip.seconds(flops, nbytes, dtype), "bound": bound}


@dataclass
class Comparison:
    """Everything that one run found."""

    device: str
    chip: Chip  # the device's, with the figures that rooflines are made of
    ceiling: str  # where these are from
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cases(self) -> Iterator[tuple[str, str, list[Row]]]:
        """(op, case, its rows), in the order of their first row."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.op, row.case), []).append(row)
        for (op, case), rows in found.items():
            yield op, case, rows

    def verdicts(self) -> list[dict[str, Any]]:
        """What each path takes against XLA's, by device time; one that computes something else gets none."""
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
        """One line a row, every field of `Row` a column."""
        with outputs.opened(file, newline="") as out:
            writer = csv.DictWriter(out, COLUMNS)
            writer.writeheader()
            writer.writerows(row.to_dict() for row in self.rows)


def verdict(row: Row, base: Row) -> str:
    """`faster`, `slower`, `same` within what runs differ by, or `wrong`."""
    if row.wrong:
        return "wrong"
    if row.low <= base.high and base.low <= row.high:
        return "same"
    return "faster" if row.seconds < base.seconds else "slower"
