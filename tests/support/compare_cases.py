"""What the tests of `pdx compare` share: small cases, a device whose figures are told, and a clock without noise."""

from __future__ import annotations

from pallas_kernels.analysis import problems
from pallas_kernels.hardware import Chip
from pdx.bench.compare import contestants, expected
from pdx.bench.compare.device_time import Loop

CPU = Chip("cpu", "cpu", ("cpu",), None, 0.2, 20.0, 1.0, 2, 0.0, 0.1)
SMALL = "one KV head of 256"
NAMES = {
    "flash_attention": "whole prompts, ragged",
    "decode_attention": "one query head a KV head",
    "paged_attention": SMALL,
    "quantized_matmul": "W4A16, affine",
}


def case_of(op, name=None):
    return next(c for c in problems.cases(op) if c.name == (name or NAMES[op]))


def contestant(op, arrays=None):
    case = case_of(op)
    problem = problems.OPS[op](case, "xla", "heads_last")
    return next(contestants.library_and_own(op, case, arrays or expected.draw(problem), "cpu"))


really_run = Loop.run


def tell_the_time(monkeypatch) -> None:
    """Loops run, and are said to take 1 ms and 10 us a turn: tests that need times do not depend on the machine."""

    def timed(self, turns):
        really_run(self, turns)
        return 1e-3 + 1e-5 * turns

    monkeypatch.setattr(Loop, "run", timed)
    monkeypatch.setattr("pdx.bench.compare.device_time.LONG_LOOP_S", 1.1e-3)
