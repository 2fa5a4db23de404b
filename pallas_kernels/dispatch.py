"""Chooses the implementation of a call, and runs it. No other module does.

`auto` takes the implementation that was measured to be the fastest (`preferred`), else the first for the device that
supports the call, XLA's where there is none; `explain` says which and why. A named implementation, or a user's own
(`pallas_kernels.implementation`), never falls back: a call that it cannot do raises NotImplementedError with the reason
and what to use instead.

For experiments, the environment variable PDX_KERNELS, or `with use("xla"):`, redefines `auto`; a name that the caller
gives is not affected. Both are read at trace time: a function that is already jitted keeps its path. The page write has
kernels only where XLA needs help: it ignores an override that it lacks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pallas_kernels.compat  # noqa: F401 (imports what must be loaded before anything is traced)
from pallas_kernels import hardware
from pallas_kernels.gradients import has_derivative, raising_under_grad
from pallas_kernels.implementation import ANY, InFolder, name_of, names, own, platforms_of, refusal, runs_on
from pallas_kernels.tiles import resolve

Implementation = Any  # a name, or a module, object or function of one's own
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


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Within this context, `auto` means `implementation`: `xla`, `tpu`, `gpu` or `auto`. Read at trace time.

    Raises:
      ValueError: not a known name.

    Example:
      >>> from pallas_kernels.decode_attention.api import explain
      >>> from pallas_kernels.dispatch import use
      >>> with use("xla"):
      ...     print(explain(platform="tpu"))
      decode_attention: xla (chosen by use())
    """
    token = _override.set(_known(implementation, "implementation"))
    try:
        yield
    finally:
        _override.reset(token)


def choose(
    op: str,
    implementation: Implementation,
    modules: Mapping[str, Any],
    call: Any = None,
    platform: str | None = None,
    *,
    helper: bool = False,
) -> Choice:
    """Choose the implementation of one call.

    Args:
      op: its name, for messages.
      implementation: what the caller asked for: a name, or an implementation of their own.
      modules: the op's implementations by name; `xla` is always among them.
      call: the static facts that each implementation is asked about. None: assume that all support the call.
      platform: `cpu`, `gpu` or `tpu`; None: that of the device traced for.
      helper: the op has kernels only where XLA needs help: it ignores an override that it lacks.

    Raises:
      ValueError: `implementation` (or PDX_KERNELS) is not a known name.
      NotImplementedError: a named implementation that this op does not have, or that cannot do this call.
    """
    if not isinstance(implementation, str):
        if reason := call and refusal(implementation, call):
            raise NotImplementedError(f"{op}: {name_of(implementation)} cannot do this call: {reason}; {USE_XLA}")
        return Choice(op, name_of(implementation), "given by the caller")
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
            reason = call and refusal(modules[implementation], call)
        if not reason:
            return Choice(op, implementation, why)
        if not helper or why == NAMED:
            raise NotImplementedError(f"{op} has no {implementation} implementation for this call: {reason}; {USE_XLA}")
    return _automatic(op, modules, call, platform)


def _automatic(op: str, modules: Mapping[str, Any], call: Any, platform: str | None) -> Choice:
    """The preferred implementation, else the first for the platform that supports the call; XLA where none does."""
    here = platform or hardware.platform_of()
    here = "gpu" if here in ("cuda", "rocm") else here
    reason = f"no Pallas kernel of {op} for {here}"
    # Measurements are of chips: they say nothing about a platform that is only assumed.
    if call is not None and here == hardware.platform_of() and (found := _measured(op, modules, call, here)):
        return found
    for name in [n for n in modules if here in _platforms(modules, n)]:
        refused = (platform is None and hardware.without_pallas()) or (call and refusal(modules[name], call))
        if not refused:
            return Choice(op, name, f"Pallas kernel for {here}")
        reason = reason if reason == refused or not reason.startswith("no Pallas") else refused
    return Choice(op, "xla", reason)


def _measured(op: str, modules: Mapping[str, Any], call: Any, here: str) -> Choice | None:
    """The implementation that was measured to be the fastest for such calls on the chip traced for, if one was."""
    for name in [n for n in modules if {here, ANY} & set(_platforms(modules, n))]:
        preferred = getattr(modules[name], "preferred", None)
        if preferred and (reason := preferred(call)) and not refusal(modules[name], call):
            return Choice(op, name, reason)
    return None


def _platforms(modules: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The platform of a named implementation; one in a folder is not imported for it."""
    if isinstance(modules, InFolder):
        return modules.platforms(name)
    return platforms_of(modules[name]) if hasattr(modules[name], "PLATFORM") else (name,)


def _known(name: str, where: str) -> str:
    if name not in names():
        raise ValueError(f"{where} {name!r} is not one of {', '.join(names())}")
    return name


class Op:
    """An op: its implementations, the choice among them, and the run of the chosen one.

    Args:
      name: the name of its public function.
      package: the op's folder in this package; None: the same name.
      helper: see `choose`.
    """

    def __init__(self, name: str, package: str | None = None, *, helper: bool = False):
        self.name, self._helper = name, helper
        self._package = f"{__package__}.{package or name}"
        self.implementations = InFolder(self._package)

    @property
    def public(self) -> Callable:
        """The public function of the op."""
        return getattr(import_module(f"{self._package}.api"), self.name)

    def implementation(self, given: Implementation) -> Implementation:
        """A name unchanged; a user's module, object or function as an implementation."""
        return given if isinstance(given, str) else own(given, self.public)

    def find(self, given: Implementation) -> Any:
        """The implementation itself: the library's of that name, or a user's own. Raises KeyError for `auto`."""
        return self.implementations[given] if isinstance(given, str) else self.implementation(given)

    def explain(self, implementation: Implementation = "auto", platform: str | None = None, call: Any = None) -> Choice:
        """Say which implementation a call takes, and why. Raises as the op does.

        Args:
          implementation: as the op's caller gives it.
          platform: `cpu`, `gpu` or `tpu`; None: that of the device traced for.
          call: the call's static facts; None: assume that all implementations support it.

        Example:
          >>> from pallas_kernels.decode_attention.api import explain
          >>> print(explain(platform="tpu"))
          decode_attention: tpu (Pallas kernel for tpu)
          >>> print(explain("xla"))
          decode_attention: xla (named by the caller)
        """
        given = self.implementation(implementation)
        return choose(self.name, given, self.implementations, call, platform, helper=self._helper)

    def select(self, implementation: Implementation, call: Any, interpret: Any = False) -> Any:
        """The implementation that a call runs, if it can run on the device traced for.

        Raises:
          ValueError, NotImplementedError: as `choose`. Also for a kernel for another platform without `interpret`.
        """
        given = self.implementation(implementation)
        choice = choose(self.name, given, self.implementations, call, helper=self._helper)
        chosen = self.find(choice.implementation if isinstance(given, str) else given)
        platforms, here = platforms_of(chosen), hardware.platform_of()
        if ANY in platforms or interpret:
            return chosen
        reason = f"it is a kernel for {' or '.join(platforms)}, and this is traced for {here}"
        if runs_on(chosen, here):
            reason = hardware.without_pallas()
        if reason:
            raise NotImplementedError(
                f"{self.name}: the {choice.implementation} implementation ({choice.reason}) cannot run here: {reason}; "
                f"interpret=True runs it on a CPU for checking; {USE_XLA}"
            )
        return chosen

    def run(
        self,
        implementation: Implementation,
        arrays: Mapping[str, Any],
        call: Any,
        config: Any = None,
        interpret: Any = False,
    ) -> Any:
        """Choose an implementation, resolve its tiles, and run it.

        Args:
          implementation, config, interpret: as the op's caller gave them.
          arrays: the op's checked arrays by name; None: this call has no such array.
          call: its static facts.

        Raises:
          ValueError: a config for an implementation without tiles, or one that does not suit the call.
          NotImplementedError: see `select`; also a derivative that does not exist.
        """
        chosen = self.select(implementation, call, interpret)
        if hasattr(chosen, "heuristic"):
            config, _ = resolve(self.name, call, config, chosen)
        elif config is not None and not hasattr(chosen, "Config"):
            raise ValueError(f"{self.name}: the {name_of(chosen)} implementation takes no config")

        def run(arrays):
            return chosen.run(arrays, call, config, interpret)

        if not has_derivative(self.name, platforms_of(chosen)):
            run = raising_under_grad(run, self.name)
        return run({name: x for name, x in arrays.items() if x is not None})
