"""`pdx bench memory`: the host memory of a model, measured in a separate process for each quantization."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pdx.errors import PdxError
from pdx.io.tables import Table


@dataclass(frozen=True)
class Memory:
    """Memory in bytes of a model quantized by `policy`.

    Attributes:
      parameters: size of the parameters.
      before, peak, after: of the process: before loading, at its peak while loading, and after generating four tokens.
    """

    policy: str
    parameters: int
    before: int
    peak: int
    after: int

    def to_dict(self) -> dict[str, Any]:
        sizes = asdict(self)
        return {"weights": sizes.pop("policy"), **{f"{name}_bytes": size for name, size in sizes.items()}}


def measure(model: str, policies: Sequence[str]) -> list[Memory]:
    """Measure each policy in a new process. Raises PdxError if one fails, and on systems without /proc."""
    if not Path("/proc/self/status").exists():
        raise PdxError("memory is read from /proc, which this system does not have")
    return [Memory(policy, **_run(model, policy)) for policy in policies]


def table(found: Sequence[Memory]) -> Table:
    """The results as a table, in megabytes."""
    head = ("weights", "parameters, MB", "process before", "at the peak of loading", "after four tokens")
    return Table(
        head, [(x.policy, *(f"{n / 1e6:.0f}" for n in (x.parameters, x.before, x.peak, x.after))) for x in found]
    )


def _run(model: str, policy: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "pdx.bench.memory", model, policy],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    if done.returncode:
        raise PdxError(f"measuring {model} with --quantize {policy} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> int:
    """A field of this process's status in bytes: VmRSS (its memory) or VmHWM (its peak)."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{field}:\s*(\d+) kB", text).group(1)) << 10


def _child(model: str, policy: str) -> dict[str, int]:
    import jax

    from pdx.generation import generate
    from pdx.weights.load import load

    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    before = _status("VmRSS")
    loaded = load(model, quantize=None if policy == "none" else policy)
    peak = _status("VmHWM")
    generate(loaded, "Hello", max_tokens=4, ignore_eos=True)
    leaves = jax.tree.leaves(loaded.params)
    # The size in memory: a CPU stores an int4 value in one byte.
    return {
        "parameters": sum(x.on_device_size_in_bytes() for x in leaves),
        "before": before,
        "peak": peak,
        "after": _status("VmRSS"),
    }


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:])))
