"""Reads the text of an optimized HLO module, as `Compiled.as_text()` gives it.

It answers, for a compiled step: Is the cache aliased or copied? Are weights padded, transposed or re-laid before a
kernel? Which collectives run? Do dots keep the requested precision?
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

# Opcodes that only move data. A fusion counts as its root.
MOVES = ("copy", "copy-start", "pad", "transpose", "reshape", "concatenate", "slice", "dynamic-slice", "gather")
_THROUGH = ("bitcast", "convert", "copy-done", "tuple", "get-tuple-element", "optimization-barrier")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "c64": 64, "c128": 128}

_SHAPE = re.compile(r"\b(pred|bf16|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's result: `bf16[8,4096,256]{2,1,0:T(8,128)(2,1)S(1)}`."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return prod(self.dims) * _bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory: the minor axes rounded up to the layout's first tile."""
        order = [int(n) for n in self.layout.split(":")[0].split(",") if n]
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if not tile or not self.dims:
            return self.bytes
        dims = [self.dims[axis] for axis in order]  # minor first
        for i, size in enumerate(reversed([int(n) for n in tile.group(1).split(",")])):
            if i < len(dims):
                dims[i] = -(-dims[i] // size) * size
        return prod(dims) * _bits(self.dtype) // 8

    @property
    def memory_space(self) -> int:
        """0 HBM; on a TPU 1 is VMEM, 2 semaphores, 5 the host, 6 SMEM."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found.group(1)) if found else 0

    @property
    def order(self) -> str:
        """The layout without its memory space."""
        return re.sub(r"S\(\d+\)", "", self.layout)


@dataclass(frozen=True)
class Instruction:
    """One instruction: a line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # one, or those of a tuple
    operands: tuple[str, ...]
    rest: str  # the text after the opcode's parenthesis
    computation: str
    root: bool

    @property
    def called(self) -> str | None:
        """The computation that a fusion runs."""
        found = re.search(r"calls=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        """The operation of the traced program that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    def __str__(self) -> str:
        s = self.shapes[0]
        array = f"{s.dtype}{list(s.dims)}{{{s.layout}}}"
        return f"%{self.name} = {array} {self.opcode}, {s.bytes / 1e6:.1f} MB, {self.op_name}"


class Module:
    """The instructions of a compiled program, by computation."""

    def __init__(self, text: str):
        self.text = text
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = ""
        for line in text.splitlines():
            head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            if head:
                current = head.group(2)
                self.computations[current] = {}
                self.entry = current if head.group(1) else self.entry
            elif current and (found := _LINE.match(line)):
                instruction = _instruction(found, current)
                self.computations[current][instruction.name] = instruction

    @cached_property
    def fused(self) -> frozenset[str]:
        """Computations that run inside one instruction: their intermediate results are not in memory."""
        every = (i for c in self.computations.values() for i in c.values())
        return frozenset(i.called for i in every if i.opcode == "fusion" and i.called)

    def instructions(self) -> Iterator[Instruction]:
        """The instructions that run; those inside of a fusion are left out."""
        for name, body in self.computations.items():
            if name not in self.fused:
                yield from body.values()

    def acts_as(self, instruction: Instruction) -> str:
        """The opcode of an instruction; of a fusion, that of its root, behind bitcasts and converts."""
        while instruction.opcode == "fusion" and instruction.called in self.computations:
            body = self.computations[instruction.called]
            instruction = next(i for i in body.values() if i.root)
            while instruction.opcode in _THROUGH and instruction.operands and instruction.operands[0] in body:
                instruction = body[instruction.operands[0]]
        return instruction.opcode

    def source(self, instruction: Instruction) -> Instruction:
        """The source of an instruction's first operand, behind copies and bitcasts: a parameter, for example."""
        body = self.computations[instruction.computation]
        while instruction.operands and instruction.operands[0] in body:
            if instruction.opcode not in (*_THROUGH, *MOVES, "fusion"):
                break
            instruction = body[instruction.operands[0]]
        return instruction


def _instruction(found: re.Match, computation: str) -> Instruction:
    root, name, result, opcode, rest = found.groups()
    inside = rest[: _closing(rest)]
    shapes = tuple(
        Shape(d, tuple(int(n) for n in dims.split(",") if n), layout or "")
        for d, dims, layout in _SHAPE.findall(result)
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, shapes, operands, rest[len(inside) :], computation, bool(root))


def _closing(text: str) -> int:
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i
    return len(text)


def _bits(dtype: str) -> int:
    return _BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) or 32)


def moved(text: str, at_least: int, *, opcodes: tuple[str, ...] = MOVES) -> list[Instruction]:
    """Instructions, fusions included, that copy, pad, transpose, slice or re-lay `at_least` bytes or more.

    A prefetch into VMEM that keeps the layout does not count: the kernel would read the same bytes itself.
    Use buffers larger than VMEM; XLA has good reasons to move small ones there.
    """
    module = Module(text)
    found = []
    for i in module.instructions():
        if not i.shapes or i.shapes[0].bytes < at_least or module.acts_as(i) not in opcodes:
            continue
        before = module.computations[i.computation].get(i.operands[0]) if i.operands else None
        kept = before is not None and before.shapes and before.shapes[0].order == i.shapes[0].order
        if not (kept and i.opcode in ("copy", "copy-start") and i.shapes[0].memory_space == 1):
            found.append(i)
    return found


def aliases(text: str) -> dict[tuple[int, ...], int]:
    """`input_output_alias`: index of an output -> number of the parameter whose memory it reuses."""
    start = text.find("input_output_alias={")
    if start < 0:
        return {}
    said = text[start : text.index("\n", start)]
    pairs = re.findall(r"\{([\d, ]*)\}: \((\d+), \{[^}]*\}, (?:may|must)-alias\)", said)
    return {tuple(int(n) for n in out.split(",") if n.strip()): int(parameter) for out, parameter in pairs}


def collectives(text: str) -> list[tuple[str, int]]:
    """Opcode and result bytes per device of each collective. One inside a loop is listed once."""
    counted: dict[tuple[str, int, str], Counter] = {}
    for where, body in Module(text).computations.items():
        for i in body.values():
            name = i.opcode.removesuffix("-start")
            if name in _COLLECTIVES:
                started = i.opcode.endswith("-start")
                # An asynchronous collective returns its operands beside its results.
                shapes = i.shapes[len(i.shapes) // 2 :] if started and len(i.shapes) > 1 else i.shapes
                channel = re.search(r"channel_id=(\d+)", i.rest)
                key = name, sum(s.bytes for s in shapes), channel.group(0) if channel else i.name
                counted.setdefault(key, Counter())[where, started] += 1
    # Collectives may share a channel; an asynchronous one appears again as its start and in other computations.
    return [key[:2] for key, places in counted.items() for _ in range(max(places.values()))]


@dataclass(frozen=True)
class Dot:
    """A matrix product of the program. The text does not show those inside Pallas kernels."""

    name: str
    operands: tuple[str, ...]  # dtypes
    precision: tuple[str, ...]  # of each operand: default | high | highest

    @property
    def ieee(self) -> bool:
        """Whether f32 operands are multiplied in IEEE f32; true for narrower types, whose products are exact."""
        return "f32" not in self.operands or set(self.precision) == {"highest"}


def dots(text: str) -> list[Dot]:
    """Every dot, convolution and cuBLAS call, with the types and precisions of the operands."""
    found = []
    for body in Module(text).computations.values():
        for i in body.values():
            if i.opcode in ("dot", "convolution") or ("custom-call" in i.opcode and "$gemm" in i.rest):
                types = tuple(body[o].shapes[0].dtype for o in i.operands[:2] if o in body)
                said = re.search(r'operand_precision=\{(\w+),(\w+)\}|operand_precision":\["(\w+)","(\w+)"\]', i.rest)
                precision = tuple(p.lower() for p in said.groups() if p) if said else ("default", "default")
                found.append(Dot(i.name, types, precision))
    return found


# Custom calls that are Pallas kernels: Mosaic on a TPU, Triton and Mosaic on a GPU.
_PALLAS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call", "mosaic_gpu", "mosaic_gpu_v2")


def pallas_calls(text: str) -> list[str]:
    """The names of the instructions that call a program's Pallas kernels."""
    calls = (i for i in Module(text).instructions() if i.opcode.startswith("custom-call"))
    return [i.name for i in calls if any(f'custom_call_target="{name}"' in i.rest for name in _PALLAS)]


def vmem_bytes(text: str) -> int:
    """The most scoped VMEM that one instruction of a TPU program uses, in bytes."""
    used = re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', text)
    sizes = [int(n) for part in used for n in re.findall(r'"memory_space":"1"[^}]*?"size":"(\d+)"', part)]
    return max(sizes, default=0)


def estimated_cycles(text: str, target: str = "tpu_custom_call") -> dict[str, int]:
    """The compiler's static cycles of each custom call, by instruction name.

    Only a process started with `targets.environment(profile=...)` has them. The compiler guesses the turns of a dynamic
    loop, so kernels with such loops have no usable figure. Cycles of different instructions overlap.
    """
    found = {}
    for i in Module(text).instructions():
        if i.opcode == "custom-call" and f'custom_call_target="{target}"' in i.rest:
            cycles = re.findall(r'"estimated_cycles":"(\d+)"', i.rest)
            if cycles:
                found[i.name] = int(cycles[-1])
    return found
