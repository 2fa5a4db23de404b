"""Runs a program for its scalars: known values are computed, everything else is skipped.

Scalars (program ids, lengths, page tables) decide which blocks a Pallas kernel fetches, which loops it runs and which
dots it does. This interpreter runs a jaxpr in numpy. A value is `Known` or None (unknown), refs are `Ref`s, and a
listener gets every equation that moves data or multiplies matrices. Control flow that depends on an unknown value
raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import numpy as np
from jax import tree_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pallas_kernels import compat
from pallas_kernels.analysis.equations import evaluator

LISTENED = ("dma_start", "dot_general", "masked_load", "masked_swap", "get", "swap", "addupdate", "pallas_call")
NOTHING = frozenset()


class Known:
    """A value, and the grid axes whose program ids it depends on."""

    __slots__ = ("axes", "value")

    def __init__(self, value: Any, axes: frozenset[int] = NOTHING):
        self.value, self.axes = value, axes


@dataclass
class Ref:
    """Memory. Its contents are tracked if `value` is an array."""

    shape: tuple[int, ...]
    dtype: Any
    space: str  # any, hbm, vmem, smem, semaphore_mem, default
    value: np.ndarray | None = None
    axes: frozenset[int] = NOTHING
    name: str = ""


class UnknownControl(ValueError):
    """A branch or a loop bound depends on an unknown value."""


@dataclass
class Interpreter:
    """Runs jaxprs; `listen(equation, operands)` is called for the primitives in LISTENED."""

    listen: Callable[[Any, list], Any]
    limit: int = 1 << 20  # elements; larger values are not tracked
    kernel: bool = False
    program: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    # The grid axes that decided anything so far: programs with equal ids on them take the same path.
    decided: set[int] = field(default_factory=set)
    _busy: dict[int, bool] = field(default_factory=dict)
    _ways: dict[int, Callable] = field(default_factory=dict)
    _literals: dict[int, Known] = field(default_factory=dict)
    _matter: dict[int, list] = field(default_factory=dict)

    def run(self, jaxpr: Jaxpr, consts, args) -> list:
        """The outputs of a jaxpr, each Known, None or a Ref."""
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, args, strict=True))
        literals = self._literals

        def read(v):
            if not isinstance(v, Literal):
                return known.get(v)
            if id(v) not in literals:
                literals[id(v)] = Known(np.asarray(v.val, getattr(v.aval, "dtype", None)))
            return literals[id(v)]

        for eqn in self._live(jaxpr):
            for v, x in zip(eqn.outvars, self.step(eqn, [read(v) for v in eqn.invars]), strict=True):
                if x is not None:
                    known[v] = x
        return [read(v) for v in jaxpr.outvars]

    def closed(self, closed: ClosedJaxpr | Jaxpr, args) -> list:
        if isinstance(closed, ClosedJaxpr):
            consts = [Known(np.asarray(c)) if prod(np.shape(c)) <= self.limit else None for c in closed.consts]
            return self.run(closed.jaxpr, consts, args)
        return self.run(closed, [], args)

    def _live(self, jaxpr: Jaxpr) -> list:
        """The equations to run: those listened to, and those whose results they or the caller use."""
        if id(jaxpr) not in self._matter:
            needed, found = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
            for eqn in reversed(jaxpr.eqns):
                if self._heard(eqn) or any(v in needed and self._follows(v.aval) for v in eqn.outvars):
                    found.append(eqn)
                    needed.update(v for v in eqn.invars if not isinstance(v, Literal))
            self._matter[id(jaxpr)] = found[::-1]
        return self._matter[id(jaxpr)]

    def step(self, eqn, args: list) -> list:
        """One equation."""
        way = self._ways.get(id(eqn))
        if way is None:
            way = self._ways[id(eqn)] = self._way(eqn)
        return way(self, eqn, args)

    def _way(self, eqn) -> Callable:
        """The function that runs an equation; chosen once, since loops repeat it."""
        name, params = eqn.primitive.name, eqn.params
        if name in _CONTROL:
            return _CONTROL[name]
        if name in LISTENED:
            return lambda run, eqn, args: run._memory(eqn, name, args)
        if name == "program_id":
            axis = params["axis"]
            return lambda run, eqn, args: [Known(np.int32(run.program[axis]), frozenset({axis}))]
        if name == "num_programs":
            return lambda run, eqn, args: [Known(np.int32(run.grid[params["axis"]]))]
        inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)
        if isinstance(inner, ClosedJaxpr | Jaxpr) and not name.startswith("reduce"):
            return lambda run, eqn, args: run.closed(inner, args)
        nothing = [None] * len(eqn.outvars)
        if not all(self._follows(v.aval) for v in eqn.outvars):
            return lambda run, eqn, args: nothing
        evaluate = evaluator(eqn)

        def pure(run, eqn, args):
            axes, values = NOTHING, []
            for a in args:
                if not isinstance(a, Known):
                    return nothing
                axes = axes | a.axes if a.axes else axes
                values.append(a.value)
            return [Known(x, axes) for x in evaluate(values)]

        return pure

    def _follows(self, aval) -> bool:
        """Large values are not followed, nor real numbers in a kernel: they decide nothing."""
        if not hasattr(aval, "shape") or prod(aval.shape) > self.limit:
            return False
        return not self.kernel or not aval.shape or not jax.dtypes.issubdtype(aval.dtype, np.floating)

    def _memory(self, eqn, name: str, args: list) -> list:
        if name in ("get", "masked_load"):
            self.listen(eqn, args)
            return [self._read(eqn, args)]
        if name in ("swap", "masked_swap", "addupdate"):
            self.listen(eqn, args)
            before = [self._read(eqn, args)] if name == "swap" and args[0].value is not None else [None]
            self._write(eqn, args)
            return before[: len(eqn.outvars)]
        said = self.listen(eqn, args)
        return said if said is not None else [None] * len(eqn.outvars)

    def _read(self, eqn, args) -> Known | None:
        ref = args[0]
        if ref.value is None:
            return None
        where = indices(eqn, args, ref.shape)
        if where is None:
            return None
        index, axes = where
        found = ref.value[index]
        return Known(found, axes | ref.axes) if np.size(found) <= self.limit else None

    def _write(self, eqn, args) -> None:
        ref = args[0]
        if ref.value is None:
            return
        where, value = indices(eqn, args, ref.shape), args[1]
        if where is None or not isinstance(value, Known) or eqn.primitive.name != "swap":
            ref.value = None
            return
        ref.value[where[0]] = value.value
        ref.axes = ref.axes | where[1] | value.axes

    def decide(self, value, what: str):
        """A value that control flow hangs on."""
        if not isinstance(value, Known):
            raise UnknownControl(f"{what} depends on data, not on scalars that are known: nothing can be counted")
        self.decided |= value.axes
        return value.value

    def busy(self, jaxpr: Jaxpr | ClosedJaxpr) -> bool:
        """Whether anything inside is listened to."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if id(jaxpr) not in self._busy:
            self._busy[id(jaxpr)] = any(map(self._heard, jaxpr.eqns))
        return self._busy[id(jaxpr)]

    def _heard(self, eqn) -> bool:
        """Whether an equation, or one inside it, is listened to."""
        return eqn.primitive.name in LISTENED or any(map(self.busy, inside(eqn)))


def inside(eqn) -> list[Jaxpr]:
    """The jaxprs in an equation's parameters."""
    found = []
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, ClosedJaxpr):
                found.append(x.jaxpr)
            elif isinstance(x, Jaxpr):
                found.append(x)
    return found


def _scan(run: Interpreter, eqn, args: list) -> list:
    p = eqn.params
    fixed, carried = compat.scan_sizes(p)
    consts, carry, slices = args[:fixed], args[fixed : fixed + carried], args[fixed + carried :]
    if not run.busy(p["jaxpr"]) and not all(isinstance(a, Known) for a in args):
        return [None] * len(eqn.outvars)
    stacked = []
    order = range(p["length"])
    for i in reversed(order) if p["reverse"] else order:
        each = [Known(x.value[i], x.axes) if isinstance(x, Known) else None for x in slices]
        out = run.closed(p["jaxpr"], [*consts, *carry, *each])
        carry = out[:carried]
        stacked.append(out[carried:])
    if p["reverse"]:
        stacked.reverse()
    if not stacked:
        return [*carry, *([None] * (len(eqn.outvars) - carried))]
    return [*carry, *(_stack(parts) for parts in zip(*stacked, strict=True))]


def _stack(parts) -> Known | None:
    if not all(isinstance(x, Known) for x in parts):
        return None
    return Known(np.stack([x.value for x in parts]), NOTHING.union(*(x.axes for x in parts)))


def _while(run: Interpreter, eqn, args: list) -> list:
    p = eqn.params
    split = p["cond_nconsts"] + p["body_nconsts"]
    test, consts, carry = args[: p["cond_nconsts"]], args[p["cond_nconsts"] : split], args[split:]
    if not run.busy(p["body_jaxpr"]) and not all(isinstance(a, Known) for a in args):
        return [None] * len(eqn.outvars)
    while run.decide(run.closed(p["cond_jaxpr"], [*test, *carry])[0], "a loop's bound"):
        carry = run.closed(p["body_jaxpr"], [*consts, *carry])
    return carry


def _cond(run: Interpreter, eqn, args: list) -> list:
    branches = eqn.params["branches"]
    if not isinstance(args[0], Known) and not any(run.busy(b) for b in branches):
        return [None] * len(eqn.outvars)
    chosen = int(np.clip(run.decide(args[0], "a branch"), 0, len(branches) - 1))
    return run.closed(branches[chosen], args[1:])


def _run_scoped(run: Interpreter, eqn, args: list) -> list:
    jaxpr = eqn.params["jaxpr"]
    return run.run(jaxpr, args, [scratch(v.aval) for v in jaxpr.invars])


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond, "run_scoped": _run_scoped}


def scratch(aval) -> Ref:
    """Memory that a kernel allocates. Scalar memory is tracked, and starts at zero."""
    ref = Ref(tuple(aval.shape), getattr(aval, "dtype", None), space_of(aval))
    if ref.space == "smem":
        ref.value = np.zeros(ref.shape, ref.dtype)
    return ref


def space_of(aval) -> str:
    space = getattr(aval, "memory_space", None)
    return "default" if space is None else str(getattr(space, "value", space))


def indices(eqn, args: list, shape: tuple[int, ...]):
    """The numpy index of a load or store, and the grid axes it depends on; None if it is unknown."""
    key = "tree" if "tree" in eqn.params else "args_tree"
    if key == "tree":
        first = 2 if eqn.primitive.name in ("swap", "addupdate") else 1
        transforms = tree_util.tree_unflatten(eqn.params[key], args[first:])
    else:
        _, transforms, *_ = tree_util.tree_unflatten(eqn.params[key], args)
    if not transforms:
        return (..., NOTHING)
    if len(transforms) > 1 or not hasattr(transforms[0], "indices"):
        return None
    axes, index = NOTHING, []
    arrays = any(isinstance(i, Known) and np.ndim(i.value) for i in transforms[0].indices)
    for i in transforms[0].indices:
        if hasattr(i, "size"):
            start = i.start
            if not isinstance(start, int):
                if not isinstance(start, Known):
                    return None
                axes, start = axes | start.axes, int(start.value)
            if arrays:
                return None  # a slice beside index arrays: no control flow depends on such values
            index.append(slice(start, start + i.size * (i.stride or 1), i.stride or 1))
        elif isinstance(i, Known):
            axes = axes | i.axes
            index.append(i.value)
        elif isinstance(i, int):
            index.append(i)
        else:
            return None
    if arrays:  # masked-out indices may point anywhere
        index = [np.clip(i, 0, n - 1) for i, n in zip(index, shape, strict=True)]
    return tuple(index), axes
