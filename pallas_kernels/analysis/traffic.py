"""Bytes moved and FLOPs done by Pallas calls: counted from grids, index maps, DMAs and dots, not estimated.

    counted = count(fn, q, k, lengths)      # lengths a numpy array: its values are known; q, k may be shapes only
    counted.bytes, counted.flops, [call.declared for call in counted.calls]

On a TPU a block is fetched when its index differs from the last step's, and written back when the index changes.
Refs in `pl.ANY` or HBM move nothing; `dma_start`s between HBM and a core's memory do. Operands of scalar prefetch
count once. On a GPU blocks are only pointers: loads and stores count, without masked lanes, and also if the L2 cache
serves them. Grid steps run one after the other, as on one core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import jax
import numpy as np
from jax import tree_util

from pallas_kernels.analysis.scalars import NOTHING, Interpreter, Known, Ref, UnknownControl, inside, scratch, space_of

_FAR = ("any", "hbm", "default", "gmem")  # memory spaces in the device's memory


@dataclass
class Call:
    """One pallas_call of a program, with all its runs added up.

    Attributes:
      given: its operands, scalars first: the value, where it is known, and the shape.
    """

    name: str
    grid: tuple[int, ...]
    platform: str
    declared: Any  # its CostEstimate, None if it has none
    given: list[tuple[np.ndarray | None, Any]]
    operands: Counter = field(default_factory=Counter)  # bytes by operand or by its DMAs
    dots: Counter = field(default_factory=Counter)  # FLOPs by the dtype of the operands
    precisions: set = field(default_factory=set)  # of dots with f32 operands
    dynamic: bool = False  # whether it has loops of dynamic length

    @property
    def bytes(self) -> int:
        return sum(self.operands.values())

    @property
    def flops(self) -> int:
        return sum(self.dots.values())


@dataclass(frozen=True)
class Counted:
    """The Pallas calls of a program."""

    calls: tuple[Call, ...]

    @property
    def bytes(self) -> int:
        return sum(c.bytes for c in self.calls)

    @property
    def flops(self) -> int:
        return sum(c.flops for c in self.calls)

    @property
    def declared_bytes(self) -> int:
        return sum(c.declared.bytes_accessed for c in self.calls if c.declared)


def count(fn: Callable, *args: Any, platform: str = "tpu", **kwargs: Any) -> Counted:
    """Count the bytes and FLOPs of the Pallas calls in `fn(*args, **kwargs)`.

    Args:
      fn: traced once, never run on a device.
      args, kwargs: arrays, whose values are known, or ShapeDtypeStructs, whose values are not.
      platform: `tpu` or `gpu`; it decides how blocks are counted.

    Raises:
      UnknownControl: the count depends on an array without known values.
    """
    calls: list[Call] = []

    def listen(eqn, operands):
        if eqn.primitive.name == "pallas_call":
            calls.append(_pallas_call(eqn, operands, platform))

    _run(fn, args, kwargs, listen)
    return Counted(tuple(calls))


def multiplied(fn: Callable, *args: Any, platform: str = "tpu", **kwargs: Any) -> Counter[tuple[str, str]]:
    """FLOPs of the matrix products of `fn(*args, **kwargs)`, by kernel ("" outside of kernels) and operand type.

    Outside of kernels the operand type is the wider of the two. A product counts once per turn of its loop and per
    step of its kernel's grid. Arguments are those of `count`.
    """
    found: Counter[tuple[str, str]] = Counter()

    def listen(eqn, operands):
        if eqn.primitive.name == "dot_general":
            types = [v.aval.dtype for v in eqn.invars[:2]]
            found["", str(jax.numpy.promote_types(*types))] += dot_flops(eqn)
        elif eqn.primitive.name == "pallas_call" and any(dots(eqn.params["jaxpr"])):
            call = _pallas_call(eqn, operands, platform)
            found.update({(call.name, dtype): flops for dtype, flops in call.dots.items()})

    _run(fn, args, kwargs, listen)
    return found


def _run(fn: Callable, args: tuple, kwargs: dict, listen: Callable) -> None:
    leaves, tree = tree_util.tree_flatten((args, kwargs))
    shapes = [
        x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype)
        for x in leaves
    ]

    def flat(*values):
        a, k = tree_util.tree_unflatten(tree, values)
        return fn(*a, **k)

    closed = jax.make_jaxpr(flat)(*shapes)
    known = [None if isinstance(x, jax.ShapeDtypeStruct) else Known(np.asarray(x)) for x in leaves]
    with np.errstate(all="ignore"):
        Interpreter(listen).closed(closed, known)


def dots(jaxpr: Any) -> Iterator[Any]:
    """Every dot_general equation of a jaxpr, also those inside kernels."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in inside(eqn):
            yield from dots(inner)


def dot_flops(eqn) -> int:
    """FLOPs of a dot_general, two per multiply-add."""
    (contract, _), _ = eqn.params["dimension_numbers"]
    a, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2 * prod(out.shape) * prod(a.shape[i] for i in contract)


def _pallas_call(eqn, operands: list, platform: str) -> Call:
    p, mapping = eqn.params, eqn.params["grid_mapping"]
    name = str(getattr(p.get("name"), "name", None) or p.get("name") or p["jaxpr"].debug_info.func_name)
    values = [np.asarray(x.value) if isinstance(x, Known) else None for x in operands]
    bounds = mapping.num_dynamic_grid_bounds
    given, operands = iter(operands[:bounds]), operands[bounds:]
    sizes = [n if isinstance(n, int) else next(given) for n in mapping.grid]
    if not all(isinstance(n, int | Known) for n in sizes):
        raise UnknownControl(f"{name}: its grid depends on data, not on scalars that are known: nothing can be counted")
    grid = tuple(int(n.value) if isinstance(n, Known) else n for n in sizes)
    arguments = list(zip(values, [v.aval for v in eqn.invars], strict=True))
    dynamic = bounds > 0 or _has_while(p["jaxpr"])
    call = Call(name, grid, platform, p["cost_estimate"], arguments, dynamic=dynamic)
    lifted = mapping.num_index_operands
    scalars = [
        _operand(x, v.aval, "smem", f"scalar{i}")
        for i, (x, v) in enumerate(zip(operands[:lifted], eqn.invars[bounds:], strict=False))
    ]
    for ref in scalars:
        call.operands["scalars"] += prod(ref.shape) * np.dtype(ref.dtype).itemsize
    inputs = operands[lifted:]
    blocks = [
        Block(m, i, inputs[i] if i < mapping.num_inputs else None, i < mapping.num_inputs)
        for i, m in enumerate(mapping.block_mappings)
    ]
    temporary = [scratch(v.aval) for v in p["jaxpr"].invars[lifted + len(blocks) :]]
    sequential = any(r.space == "smem" for r in temporary)
    run = Runs(call, p["jaxpr"], grid, independent=not sequential)
    for step in product(*map(range, grid)):
        refs = [block.visit(step, grid, scalars, call) for block in blocks]
        run.step(step, [*scalars, *refs, *temporary])
    for block in blocks:
        block.leave(call)
    return call


def _has_while(jaxpr) -> bool:
    return any(e.primitive.name == "while" or any(map(_has_while, inside(e))) for e in jaxpr.eqns)


def _operand(known: Known | None, aval, space: str, name: str) -> Ref:
    value = np.array(known.value) if isinstance(known, Known) else None
    return Ref(tuple(aval.shape), aval.dtype, space, value, NOTHING, name)


class Block:
    """One operand of a pallas_call, and its current block as the grid proceeds."""

    def __init__(self, mapping, position: int, value: Known | None, is_input: bool):
        self.mapping, self.value, self.is_input = mapping, value, is_input
        self.array = mapping.array_aval
        self.aval = mapping.transformed_block_aval
        self.space = space_of(self.aval)
        self.name = str(mapping.origin or position)
        self.index: tuple | None = None
        self.run = Interpreter(lambda *_: None)

    def _index(self, step, grid, scalars) -> tuple[tuple[int, ...], frozenset[int]]:
        self.run.program, self.run.grid = step, grid
        ids = [Known(np.int32(i), frozenset({axis})) for axis, i in enumerate(step)]
        out = self.run.closed(self.mapping.index_map_jaxpr, [*ids, *scalars])
        if not all(isinstance(x, Known) for x in out):
            raise ValueError(f"the index map of {self.name} depends on values that are not known")
        axes = NOTHING.union(*(x.axes for x in out)) if out else NOTHING
        return tuple(int(x.value) for x in out), axes

    def visit(self, step, grid, scalars, call: Call) -> Ref:
        """The ref that the kernel gets at this step. A block that differs from the last step's is counted."""
        shape, dtype = tuple(self.aval.shape), self.aval.dtype
        if self.space in ("any", "hbm") or call.platform == "gpu" or self.space == "semaphore_mem":
            whole = Ref(shape, dtype, self.space, None, NOTHING, self.name)
            if isinstance(self.value, Known) and shape == self.array.shape:
                whole.value = np.array(self.value.value)
            elif call.platform == "gpu" and shape != self.array.shape and isinstance(self.value, Known):
                index, axes = self._index(step, grid, scalars)
                whole.value, whole.axes = self._part(index), axes
            return whole
        index, axes = self._index(step, grid, scalars)
        if index != self.index:
            if self.index is not None and not self.is_input:
                call.operands[self.name] += self._bytes(self.index)
            if self.is_input:
                call.operands[self.name] += self._bytes(index)
            self.index = index
        part = self._part(index) if isinstance(self.value, Known) else None
        return Ref(shape, dtype, "vmem" if self.space == "default" else self.space, part, axes, self.name)

    def leave(self, call: Call) -> None:
        """Count the write of an output's last block, at the end of the grid."""
        if self.index is not None and not self.is_input:
            call.operands[self.name] += self._bytes(self.index)

    def _slices(self, index) -> list[slice]:
        found = []
        for dim, at, size in zip(self.mapping.block_shape, index, self.array.shape, strict=True):
            kind = type(dim).__name__
            if kind in ("BoundedSlice", "Indirect"):
                raise NotImplementedError(f"{self.name}: blocks of kind {kind} are not counted")
            width = 1 if kind == "Squeezed" else getattr(dim, "block_size", dim)
            start = at if kind == "Element" else at * width
            found.append(slice(start, min(start + width, size)))
        return found

    def _bytes(self, index) -> int:
        """Bytes of the block that lie inside the array."""
        sizes = [max(s.stop - s.start, 0) for s in self._slices(index)]
        return prod(sizes) * _bits(self.array.dtype) // 8

    def _part(self, index) -> np.ndarray | None:
        part = self.value.value[tuple(self._slices(index))]
        squeezed = tuple(i for i, d in enumerate(self.mapping.block_shape) if type(d).__name__ == "Squeezed")
        part = np.squeeze(part, squeezed)
        return np.array(part) if part.shape == tuple(self.aval.shape) else None


class Runs:
    """Runs the kernel's body at each grid step. Steps that take the path of an earlier one are not run again."""

    def __init__(self, call: Call, jaxpr, grid: tuple[int, ...], independent: bool):
        self.call, self.jaxpr, self.grid, self.independent = call, jaxpr, grid, independent
        self.seen: dict[frozenset[int], dict[tuple, list]] = {}
        self.heard: list[tuple[Counter, str, int]] = []
        self.sizes: dict[int, int] = {}
        # On a TPU only scalars matter; a GPU kernel's index arrays and masks are up to about this large.
        self.interpreter = Interpreter(self.listen, 1 << 16 if call.platform == "gpu" else 256, kernel=True)
        self.silent = not self.interpreter.busy(jaxpr)

    def step(self, step: tuple[int, ...], refs: list[Ref]) -> None:
        if self.silent:
            return
        for axes, paths in self.seen.items():
            if (found := paths.get(tuple(step[a] for a in sorted(axes)))) is not None:
                self._add(found)
                return
        run, self.heard = self.interpreter, []
        run.program, run.grid, run.decided = step, self.grid, set()
        run.run(self.jaxpr, [], refs)
        self._add(self.heard)
        if self.independent:
            axes = frozenset(run.decided)
            self.seen.setdefault(axes, {})[tuple(step[a] for a in sorted(axes))] = self.heard

    def _add(self, heard) -> None:
        for counter, key, amount in heard:
            counter[key] += amount

    def listen(self, eqn, args: list) -> None:
        name = eqn.primitive.name
        if name == "dot_general":
            dtype = str(eqn.invars[0].aval.dtype)
            if id(eqn) not in self.sizes:
                self.sizes[id(eqn)] = dot_flops(eqn)
                if dtype == "float32":
                    self.call.precisions.add(str(eqn.params["precision"]))
            self.heard.append((self.call.dots, dtype, self.sizes[id(eqn)]))
        elif name == "dma_start":
            self._dma(eqn, args)
        elif self.call.platform == "gpu" and name in ("get", "swap", "masked_load", "masked_swap"):
            self._access(eqn, args)

    def _dma(self, eqn, args: list) -> None:
        source, target, *_ = tree_util.tree_unflatten(eqn.params["tree"], args)
        a, b = getattr(source, "ref", source), getattr(target, "ref", target)
        far = [r for r in (a, b) if r.space in _FAR]
        if id(eqn) not in self.sizes:
            shape, dtype = _shape(source)
            self.sizes[id(eqn)] = prod(shape) * _bits(dtype) // 8
        for ref in far:  # HBM to HBM counts as a read and a write
            self.heard.append((self.call.operands, ref.name, self.sizes[id(eqn)]))

    def _access(self, eqn, args: list) -> None:
        ref = args[0]
        if ref.space not in _FAR:
            return
        swaps = eqn.primitive.name in ("swap", "masked_swap")
        value = eqn.invars[1].aval if swaps and "tree" in eqn.params else eqn.outvars[0].aval
        lanes = prod(value.shape)
        if "args_tree" in eqn.params:
            mask = tree_util.tree_unflatten(eqn.params["args_tree"], args)[2 if not swaps else -1]
            if isinstance(mask, Known):
                self.interpreter.decided |= mask.axes
                lanes = int(np.broadcast_to(mask.value, value.shape).sum())
        self.heard.append((self.call.operands, ref.name, lanes * _bits(ref.dtype) // 8))


def _bits(dtype) -> int:
    return (
        jax.numpy.finfo(dtype).bits
        if jax.dtypes.issubdtype(dtype, np.floating)
        else (8 if dtype == np.bool_ else jax.numpy.iinfo(dtype).bits)
    )


def _shape(ref) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a ref after its transforms."""
    base = getattr(ref, "ref", ref)
    shape, dtype = base.shape, base.dtype
    for t in getattr(ref, "transforms", ()):
        if hasattr(t, "get_indexer_shape"):
            shape = t.get_indexer_shape()
        else:
            shape, dtype = getattr(t, "shape", shape), getattr(t, "dtype", dtype)
    return tuple(int(n) for n in shape), dtype
