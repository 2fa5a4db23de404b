"""The one place that chooses an implementation.

`auto` takes the best one that exists for the device and can say which and why; a named implementation
never falls back: what it cannot do raises NotImplementedError with the reason and what to use instead.

For experiments, the environment variable PDX_KERNELS, or `with use("xla"):` around the call, says what `auto`
means; a name that the caller gives stands. Both are read while a function is traced: a function that was jitted
before keeps the path that it was traced with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

from pallas_kernels.checks import Call
from pallas_kernels.hardware import platform_of

Implementation = Literal["auto", "xla", "tpu", "gpu"]
ENVIRONMENT = "PDX_KERNELS"
_override: ContextVar[str | None] = ContextVar("pallas_kernels_override", default=None)


@dataclass(frozen=True)
class Choice:
    """Which implementation a call takes, and why."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.reason})"


class Implementations(Mapping[str, ModuleType]):
    """The modules of an op's package by name, imported when one is asked for: Pallas itself takes a while."""

    def __init__(self, package: str, names: tuple[str, ...]):
        self._package, self._names = package, names

    def __getitem__(self, name: str) -> ModuleType:
        if name not in self._names:
            raise KeyError(name)
        return import_module(f"{self._package}.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """Inside, `auto` means this implementation."""
    token = _override.set(_known(implementation, "implementation"))
    try:
        yield
    finally:
        _override.reset(token)


def choose(
    op: str,
    implementation: Implementation,
    modules: Mapping[str, ModuleType],
    call: Call | None = None,
    platform: str | None = None,
) -> Choice:
    """Decide for one op.

    Args:
      op: its name, for messages.
      implementation: what the caller asked for.
      modules: the implementations this op has; `xla` is always among them.
      call: the static facts of the call, to ask each implementation whether it can do it. None: what
        a call without rarer features would take.
      platform: `cpu`, `gpu` or `tpu`; None: that of the device traced for.

    Raises:
      ValueError: `implementation` (or PDX_KERNELS) is not a known name.
      NotImplementedError: a named implementation that this op does not have, or that cannot do this call.
    """
    why = "named by the caller"
    if _known(implementation, "implementation") == "auto":
        if _override.get():
            implementation, why = _override.get(), "chosen by use()"
        elif os.environ.get(ENVIRONMENT):
            implementation, why = _known(os.environ[ENVIRONMENT], ENVIRONMENT), f"chosen by {ENVIRONMENT}"
    if implementation != "auto":
        if implementation not in modules:
            reason = f"it has {', '.join(modules)}"
        else:
            reason = call and modules[implementation].supported(call)
        if reason:
            raise NotImplementedError(f"{op} has no {implementation} implementation for this call: {reason}; "
                                      f"use implementation='xla', which takes every call on every device")
        return Choice(op, implementation, why)
    platform = platform or platform_of()
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    if platform not in modules:
        return Choice(op, "xla", f"no Pallas kernel of {op} for {platform}")
    reason = call and modules[platform].supported(call)
    return Choice(op, "xla", reason) if reason else Choice(op, platform, f"Pallas kernel for {platform}")


def _known(name: str, where: str) -> str:
    if name not in get_args(Implementation):
        raise ValueError(f"{where} {name!r} is not one of {', '.join(get_args(Implementation))}")
    return name
