"""The one place that chooses an implementation.

`auto` takes the best one that exists for the device and can say which and why; a named implementation
never falls back: what it cannot do raises NotImplementedError with the reason and what to use instead.

For experiments, the environment variable PDX_KERNELS, or `with use("xla"):` around the call, says what `auto`
means; a name that the caller gives stands. Both are read while a function is traced: a function that was jitted
before keeps the path that it was traced with. An op that has kernels only where XLA needs help (the page write) takes
the device's own way where the one asked for does not exist.
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

import pallas_kernels.compat  # noqa: F401 (it imports what must be there before anything is traced)
from pallas_kernels.attention.call import Call
from pallas_kernels.hardware import platform_of, without_pallas

Implementation = Literal["auto", "xla", "tpu", "gpu"]
ENVIRONMENT = "PDX_KERNELS"
NAMED = "named by the caller"
USE_XLA = "use implementation='xla', which takes every call on every device"
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
    *,
    helper: bool = False,
) -> Choice:
    """Decide for one op.

    Args:
      op: its name, for messages.
      implementation: what the caller asked for.
      modules: the implementations this op has; `xla` is always among them.
      call: the static facts of the call, to ask each implementation whether it can do it. None: what
        a call without rarer features would take.
      platform: `cpu`, `gpu` or `tpu`; None: that of the device traced for.
      helper: the op has kernels only where XLA needs help: what `auto` was made to mean binds it where that exists.

    Raises:
      ValueError: `implementation` (or PDX_KERNELS) is not a known name.
      NotImplementedError: a named implementation that this op does not have, or that cannot do this call.
    """
    why = NAMED
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
        if not reason:
            return Choice(op, implementation, why)
        if not helper or why == NAMED:
            raise NotImplementedError(f"{op} has no {implementation} implementation for this call: {reason}; {USE_XLA}")
    here = platform or platform_of()
    here = "gpu" if here in ("cuda", "rocm") else here
    if here not in modules:
        return Choice(op, "xla", f"no Pallas kernel of {op} for {here}")
    reason = (platform is None and without_pallas()) or (call and modules[here].supported(call))
    return Choice(op, "xla", reason) if reason else Choice(op, here, f"Pallas kernel for {here}")


def select(
    op: str,
    implementation: Implementation,
    modules: Mapping[str, ModuleType],
    call: Call,
    interpret,
    *,
    helper: bool = False,
) -> str:
    """The name of the implementation that a call runs: what `choose` says, held against the device traced for.

    Raises:
      ValueError, NotImplementedError: as `choose`; a kernel for another platform that is not to be interpreted.
    """
    choice = choose(op, implementation, modules, call, helper=helper)
    name, here = choice.implementation, platform_of()
    if name == "xla" or interpret:
        return name
    reason = without_pallas() if name == here else f"it is a kernel for {name}, and this is traced for {here}"
    if reason:
        raise NotImplementedError(
            f"{op}: the {name} implementation ({choice.reason}) cannot run here: {reason}; "
            f"interpret=True runs it on a CPU for checking; {USE_XLA}"
        )
    return name


def _known(name: str, where: str) -> str:
    if name not in get_args(Implementation):
        raise ValueError(f"{where} {name!r} is not one of {', '.join(get_args(Implementation))}")
    return name
