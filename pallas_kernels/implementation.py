"""Implementations of an op: what they declare, how the library finds its own, how a user's function becomes one.

An implementation is a module, or any other object, with

    run(arrays, call, config, interpret)

It returns what the op returns. `arrays` holds the arrays of the call by the names of the op's arguments, `call` the
checked static facts, `config` the tiles; `interpret` asks for Pallas' interpreter. An implementation may declare

    NAME                      its name for `implementation=`
    PLATFORM                  where it runs natively: tpu, gpu, or a tuple of these; default: any
    LAYOUTS                   the layouts of K and V that it reads; default: all
    supported(call)           None, or why it cannot do the call
    preferred(call)           None, or why `auto` takes it before the others on the chip traced for: a measurement
    Config                    a frozen dataclass of tiles, with
    heuristic(call, chip)     the Config of a call
    misfit(call, config)      None, or why these tiles do not suit the call
    candidates(call, chip)    Configs for the tuner to try

A module in an op's folder that declares NAME is found without being listed anywhere. A function is an implementation
too: it takes those of the op's public arguments that its signature names (`FromFunction`).
"""

from __future__ import annotations

import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ANY = "any"
# A function need not take these: settings that only a folded cache needs, and hints for speed.
_DERIVED, _HINTS = ("kv_heads", "value_dim"), ("decode_rows", "decode_queries", "max_queries")


class InFolder(Mapping[str, ModuleType]):
    """The implementations in an op's package by name: `xla`, then those named like their platform, then the others.

    Listing them reads the files' text only. A module is imported when it is asked for, since Pallas imports slowly.
    """

    def __init__(self, package: str):
        self._package = package

    @property
    def _declared(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        return declared(self._package)

    def __getitem__(self, name: str) -> ModuleType:
        return import_module(f"{self._package}.{self._declared[name][0]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._declared)

    def __len__(self) -> int:
        return len(self._declared)

    def platforms(self, name: str) -> tuple[str, ...]:
        """The platforms that an implementation declares, without importing it."""
        return self._declared[name][1]


@cache
def declared(package: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> (module, platforms) of the implementations in a package."""
    found = {}
    for path in sorted(Path(find_spec(package).origin).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if name := re.search(r'^NAME = "(\w+)"', text, re.MULTILINE):
            platform = re.search(r"^PLATFORM = (.+)$", text, re.MULTILINE)
            found[name[1]] = path.stem, _platforms(literal_eval(platform[1]) if platform else ANY)
    order = ("xla", "tpu", "gpu")
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0]) if item[0] in order else 3, item[0])))


def _platforms(declared: str | tuple[str, ...]) -> tuple[str, ...]:
    return (declared,) if isinstance(declared, str) else tuple(declared)


@cache
def names() -> tuple[str, ...]:
    """All names that `implementation=` takes, over all ops; `auto` first."""
    folders = (path.parent.name for path in sorted(Path(__file__).parent.glob("*/api.py")))
    known = (name for folder in folders for name in declared(f"{__package__}.{folder}"))
    return tuple(dict.fromkeys(("auto", "xla", "tpu", "gpu", *known)))


def platforms_of(implementation: Any) -> tuple[str, ...]:
    """The platforms an implementation runs on: `tpu`, `gpu` or both; `("any",)` if it runs everywhere."""
    return _platforms(getattr(implementation, "PLATFORM", ANY))


def runs_on(implementation: Any, platform: str) -> bool:
    """Whether an implementation runs natively on `cpu`, `gpu` or `tpu`."""
    platforms = platforms_of(implementation)
    return ANY in platforms or platform in platforms


def refusal(implementation: Any, call: Any) -> str | None:
    """None, or why an implementation cannot do a call."""
    layouts, layout = getattr(implementation, "LAYOUTS", None), getattr(call, "layout", None)
    if layouts and layout and layout not in layouts:
        return f"it reads K and V in the layout {' or '.join(map(repr, layouts))}, not {layout!r}"
    if ANY not in platforms_of(implementation) and getattr(call, "scale", 1.0) is None:
        return "it takes a scale that is a number, not one that is traced"
    supported = getattr(implementation, "supported", None)
    return supported(call) if supported else None


def own(given: Any, public: Callable) -> Any:
    """A user's module, object or function as an implementation; `public` is the op's function.

    Raises:
      ValueError: it has no `run` and is not a function.
    """
    if hasattr(given, "run"):
        return given
    if not callable(given):
        raise ValueError(
            f"{public.__name__}: implementation {given!r} is neither one of {', '.join(names())}, nor a module with "
            "run(arrays, call, config, interpret), nor a function"
        )
    return _adapted(given, public)


@lru_cache(maxsize=64)  # a step asks each time that it is called, and reading signatures takes 100 us
def _adapted(function: Callable, public: Callable) -> FromFunction:
    return FromFunction(function, public)


def name_of(implementation: Any) -> str:
    """The name of a user's implementation in messages and tables."""
    name = getattr(implementation, "NAME", None) or getattr(implementation, "__qualname__", None)
    return name or getattr(implementation, "__name__", None) or type(implementation).__name__


def load(reference: str) -> Any:
    """Import `package.module:name`, or `package.module` alone.

    Raises:
      ValueError: there is no such module, or it has no such name.
    """
    module, _, name = reference.partition(":")
    try:
        found = import_module(module)
    except ImportError as error:
        raise ValueError(f"{reference!r}: {error}; give package.module:function, importable from here") from error
    if name and not hasattr(found, name):
        raise ValueError(f"{reference!r}: the module {module} has no {name!r}")
    return getattr(found, name) if name else found


def reference_of(implementation: Any) -> str | None:
    """How another process names an implementation: its name, or what `load` takes. None: it was made in a notebook."""
    if isinstance(implementation, str):
        return implementation
    if isinstance(implementation, ModuleType):
        return implementation.__name__
    module, name = getattr(implementation, "__module__", None), getattr(implementation, "__qualname__", "")
    found = module not in (None, "__main__") and name.isidentifier()
    return f"{module}:{name}" if found and getattr(import_module(module), name, None) is implementation else None


class FromFunction:
    """A function of an op's public arguments, as an implementation of the op.

    It gets the arguments that its signature names; those that the op takes by position, by position. A call that
    needs another argument is refused with that argument's name: without `window`, say, the result would be wrong.

    The function declares things by attributes: `mine.LAYOUTS = ("heads_last",)`.

    Attributes:
      LAYOUTS: the function's own; by default all if it takes a `layout`, else only the op's default layout.
    """

    def __init__(self, function: Callable, public: Callable):
        self.function, self.public = function, public
        self.NAME, self.PLATFORM = name_of(function), platforms_of(function)
        self._takes = inspect.signature(function).parameters
        self._open = any(p.kind is p.VAR_KEYWORD for p in self._takes.values())
        self._of_op = {
            name: p
            for name, p in inspect.signature(public).parameters.items()
            if name not in ("implementation", "interpret", "config")
        }
        default = self._of_op["layout"].default if "layout" in self._of_op else inspect.Parameter.empty
        alone = None if self._knows("layout") or default is inspect.Parameter.empty else (default,)
        self.LAYOUTS = getattr(function, "LAYOUTS", alone)

    def _knows(self, name: str) -> bool:
        return self._open or name in self._takes

    def _needed(self, call: Any) -> Iterator[str]:
        """Names of the keyword arguments that a function must take to do this call."""
        for name, p in self._of_op.items():
            if p.kind is not p.KEYWORD_ONLY or name in (*_HINTS, "layout"):
                continue
            value = getattr(call, name, None)
            if name in _DERIVED:
                needed = getattr(call, "layout", "") == "folded"
            elif name in ("k_scale", "v_scale"):
                needed = getattr(call, "kv_dtype", call.dtype) == "int8"
            elif p.default is None:  # a call says only whether it has such an array
                needed = value not in (None, False)
            else:
                needed = p.default is p.empty or value != p.default
            if needed:
                yield name

    def supported(self, call: Any) -> str | None:
        """None, or the argument that the call needs and the function does not take."""
        missing = [name for name in self._needed(call) if not self._knows(name)]
        if missing:
            return f"{self.NAME} takes no {' and no '.join(missing)}, which this call needs"
        supported = getattr(self.function, "supported", None)
        return supported(call) if supported else None

    def run(self, arrays: Mapping[str, Any], call: Any, config: Any = None, interpret: Any = False) -> Any:
        """Call the function with the arrays, and with the settings that the call holds; see the class."""
        # Of arrays such as sinks a call only says, as a bool, whether there are any: for none the function gets None.
        held = {n: getattr(call, n, None) for n, p in self._of_op.items() if p.kind is p.KEYWORD_ONLY}
        flags = [n for n, x in held.items() if isinstance(x, bool) and not isinstance(self._of_op[n].default, bool)]
        named = held | dict.fromkeys(flags) | {"config": config, "interpret": interpret}
        named |= {n: x for n, x in arrays.items() if n in held}
        first = (arrays[n] for n, p in self._of_op.items() if p.kind is not p.KEYWORD_ONLY)
        return self.function(*first, **{n: x for n, x in named.items() if self._knows(n)})
