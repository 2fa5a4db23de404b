"""A kernel's schedule for a TPU, as libtpu writes it down: instruction bundles, at most one of which is issued a cycle.

    schedule = read(text)            # a file *-final_bundles.txt of libtpu's dump (`targets.environment(dump=...)`)
    for loop in schedule.loops: print(loop.depth, loop.bundles, loop.counts)

The bundles of a loop's turn are the least cycles that it takes; waiting comes on top. `bundle_runs.run` says how often
each loop turns, where the lengths of loops are data too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

# What is counted in a loop, by the instructions' names.
KINDS = {
    "dma_starts": re.compile(r"dma\.(?!done)"),
    "waits": re.compile(r"dma\.done\.wait"),
    "matmuls": re.compile(r"vmatmul"),
    "exponentials": re.compile(r"vpow2"),
    "bounds_checks": re.compile(r"shalt\.err"),
}

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*: >*\s*\{(.*)", re.DOTALL)
_DIVISION = re.compile(r"/\* (kDivAndRem|kDiv|kRem) \*/")  # what a division yields stands in a comment
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_OP = re.compile(r"(?:%?([\w]+) = )?([a-z][a-z0-9_.]*)\s*(?:\[(?:thread|resolvable):[^\]]*\])?\s*(.*)", re.DOTALL)
_PREDICATE = re.compile(r"\(\s*(!?)%(\w+)(?:\s*,\s*%(\w+))?\s*\),?")


@dataclass(frozen=True)
class Op:
    """One instruction of a bundle.

    Attributes:
      name: such as `sadd.s32` or `dma.hbm_to_vmem`.
      result: the register that it writes, such as `s24_s20` (value 24, in register s20); None: none.
      args: what stands behind the name: registers `%s24_s20`, numbers, places such as `[smem:[#allocation3 + %s1_s1]]`.
      predicate: it takes place only if this register holds, or does not if `negated`; None: always.
      otherwise: the register whose value the result has if it does not take place.
    """

    name: str
    result: str | None
    args: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False
    otherwise: str | None = None

    @property
    def starts_dma(self) -> bool:
        return KINDS["dma_starts"].match(self.name) is not None

    @property
    def reads(self) -> set[str]:
        """The registers that it depends on."""
        found = {name for arg in self.args for name in re.findall(r"%(\w+)", arg)}
        return found | {x for x in (self.predicate, self.otherwise) if x}


@dataclass(frozen=True)
class Bundle:
    """The instructions of one cycle."""

    label: str  # LB: a loop begins; PF, PB, CT: a place that a branch may go to; else empty
    ops: tuple[Op, ...]
    regions: frozenset[int]  # that begin here: the targets of branches


def counted(bundles: Iterable[Bundle]) -> Counter[str]:
    """Instructions in some bundles, by the names of `KINDS`."""
    names = (op.name for bundle in bundles for op in bundle.ops)
    return Counter(kind for name in names for kind, pattern in KINDS.items() if pattern.match(name))


@dataclass(frozen=True)
class Loop:
    """A loop of a schedule.

    Attributes:
      first, last: its bundles, from the first to the last one.
      depth: 1 for the grid's loop.
      counts: of the instructions in it, by the names of `KINDS`; those in inner loops count too.
    """

    first: int
    last: int
    depth: int
    counts: Counter[str] = field(hash=False)

    @property
    def bundles(self) -> int:
        """Bundles of one turn, if every inner loop turns once and no branch leaves any out."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Operand:
    """An operand of the kernel: the register that points to it, and its shape, such as `s32[621]`.

    `by_value`: the register holds the operand itself. libtpu passes arrays of one element, such as `s32[1]`, that way.
    """

    register: str
    index: int
    shape: str
    by_value: bool = False


@dataclass(frozen=True)
class Schedule:
    """The bundles of one kernel."""

    bundles: tuple[Bundle, ...]
    operands: tuple[Operand, ...]

    @cached_property
    def regions(self) -> dict[int, int]:
        """Where each region begins: the targets of branches."""
        return {region: at for at, bundle in enumerate(self.bundles) for region in bundle.regions}

    @cached_property
    def branches(self) -> dict[int, tuple[Op, int]]:
        """Of the bundles with a branch: the branch, and the bundle that it goes to.

        A branch to a region that is nowhere ends the kernel.
        """
        found, end = {}, len(self.bundles) - 1
        for at, bundle in enumerate(self.bundles):
            for op in bundle.ops:
                if op.name.startswith("sbr"):
                    target = re.search(r"\$region(\d+)", " ".join(op.args))
                    if target is None:
                        raise ValueError(f"bundle {at}: a branch to no region: {op}")
                    found[at] = op, self.regions.get(int(target[1]), end)
        return found

    @cached_property
    def delay(self) -> int:
        """Bundles behind a branch that are issued before it takes effect."""
        starts = sorted({at for at, b in enumerate(self.bundles) if b.label} | {to for _, to in self.branches.values()})
        gaps = [next(s for s in starts if s > at) - at - 1 for at, (_, to) in self.branches.items() if to > at]
        return min(gaps, default=0)

    @cached_property
    def loops(self) -> list[Loop]:
        """The loops, outer ones first, in the order of the program. A loop ends with the branch back to its begin."""
        ends = {to: at + self.delay for at, (_, to) in self.branches.items() if to <= at}
        found: list[Loop] = []
        for first, last in sorted(ends.items()):
            depth = 1 + sum(outer.first <= first and last <= outer.last for outer in found)
            found.append(Loop(first, last, depth, counted(self.bundles[first : last + 1])))
        return found


def read(text: str) -> Schedule:
    """The schedule in a file `*-final_bundles.txt`.

    Raises:
      ValueError: the text is not one.
    """
    body = text[text.index("control target key end") :] if "control target key end" in text else ""
    bundles, operands = [], []
    for part in re.split(r"\n(?=\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*: )", body):
        if not (match := _BUNDLE.match(part)):
            continue
        _, label, rest = match.groups()
        operands += _operands(rest)
        inside = _COMMENT.sub("", _DIVISION.sub(r", \1", rest))
        inside = inside[: inside.rindex("}")] if "}" in inside else inside
        ops = tuple(op for one in inside.split(" ;; ") if (op := _op(one.strip())))
        bundles.append(Bundle(label or "", ops, frozenset(map(int, _REGION.findall(rest)))))
    if not bundles:
        raise ValueError("no bundles in this text: is it a *-final_bundles.txt of libtpu's dump?")
    return Schedule(tuple(bundles), tuple(operands))


def _operands(text: str) -> Iterator[Operand]:
    space = r"inlined_call_operand\.(\w+|<no memory space>)"
    pattern = rf"%(\w+) = {space} \[shape: ([^,]*(?:\[[\d,]*\])), index: (\d+), kind: (\w+)"
    for register, where, shape, index, kind in re.findall(pattern, text):
        if kind == "input":
            yield Operand(register, int(index), shape, where.startswith("<"))


def _op(text: str) -> Op | None:
    if not text or not (match := _OP.fullmatch(text)):
        return None
    result, name, rest = match.groups()
    predicate = _PREDICATE.search(rest)
    if predicate:
        rest = rest[: predicate.start()] + rest[predicate.end() :]
    if name == "sst":  # the place and the value have no comma between them
        rest = re.sub(r"\]\]\s+(?=[%\[\d])", "]], ", rest)
    args = tuple(arg.strip() for arg in rest.split(",") if arg.strip())
    if result is not None and not result[0].isalpha() and not name.startswith("sdivrem"):
        result = None  # a number in front of an instruction without a result; that of a division is popped
    if predicate is None:
        return Op(name, result, args)
    negated, register, otherwise = predicate.groups()
    return Op(name, result, args, register, bool(negated), otherwise)
