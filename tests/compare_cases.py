"""Small cases for the tests of `pdx compare`, and a device whose figures are told."""

from pallas_kernels import problems
from pallas_kernels.hardware import Chip
from pdx.bench.compare import device_time
from pdx.bench.compare.device_time import Loop

CPU = Chip("cpu", "cpu", ("cpu",), None, 0.2, 20.0, 1.0, 2, 0.0, 0.1)
NAMES = {"flash_attention": "whole prompts, ragged", "decode_attention": "one query head a KV head",
         "paged_attention": "one KV head of 256", "quantized_matmul": "W4A16, affine"}  # fmt: skip


def case_of(op, name=None):
    return next(c for c in problems.cases(op) if c.name == (name or NAMES[op]))


really_run = Loop.run


def tell_the_time(monkeypatch):
    """Loops run, but their seconds are told: a millisecond a turn."""

    def run(self, turns):
        really_run(self, turns)
        return 1e-4 + 1e-3 * turns

    monkeypatch.setattr(device_time, "SECONDS", 1e-3)
    monkeypatch.setattr(Loop, "run", run)
