"""The one place that chooses an implementation.

`auto` takes the best one that exists for the device and can say which and why; a named implementation
never falls back: what it cannot do raises NotImplementedError with the reason and what to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import jax

Implementation = Literal["auto", "xla", "tpu", "gpu"]


@dataclass(frozen=True)
class Choice:
    """Which implementation a call takes, and why."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.reason})"


def choose(op: str, implementation: str, available: Mapping[str, object], platform: str | None = None) -> Choice:
    """Decide for one op.

    Args:
      op: its name, for messages.
      implementation: what the caller asked for.
      available: the implementations this op has; `xla` is always among them.
      platform: `cpu`, `gpu` or `tpu`; None asks JAX for its default backend.

    Raises:
      ValueError: `implementation` is not a known name.
      NotImplementedError: a named implementation that this op does not have.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation {implementation!r} is not one of {', '.join(get_args(Implementation))}")
    if implementation != "auto":
        if implementation not in available:
            raise NotImplementedError(
                f"{op} has no {implementation} implementation; it has {', '.join(available)}: "
                f"use implementation='xla', which runs on every device"
            )
        return Choice(op, implementation, "named by the caller")
    platform = platform or jax.default_backend()
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    if platform in available:
        return Choice(op, platform, f"Pallas kernel for {platform}")
    return Choice(op, "xla", f"no Pallas kernel of {op} for {platform}")
