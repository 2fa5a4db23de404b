"""The innermost loops of a GPU kernel in SASS, as nvdisasm writes it: how many instructions a turn issues.

A tensor core or the memory is the bound of a kernel only if its instructions are not: each scheduler of a
multiprocessor issues at most one a cycle. Figures are static: a predicated instruction counts, and so does a branch of
the loop that few turns take.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TO = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Loop:
    """One innermost loop, a turn of one thread."""

    instructions: int
    loaded_bytes: int  # from global memory, by the width of the loads; copies to shared memory included
    opcodes: Mapping[str, int]  # without their modifiers

    @property
    def per_byte(self) -> float | None:
        """Instructions per byte loaded from global memory; None: the loop loads nothing, or by TMA."""
        return self.instructions / self.loaded_bytes if self.loaded_bytes else None


@dataclass(frozen=True)
class _Op:
    name: str
    predicated: bool
    operands: str

    @property
    def to(self) -> str | None:
        """The label that a branch names."""
        found = _TO.search(self.operands) if self.name.startswith("BRA") else None
        return found[1] if found else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction is never reached from here. `BRA.DIV` and `BRA.U UP0` have a condition too."""
        if self.predicated:
            return False
        return self.name.split(".")[0] in ("EXIT", "RET", "BRX") or (self.to is not None and self.operands[0] == "`")

    @property
    def loaded_bytes(self) -> int:
        kind, *modifiers = self.name.split(".")
        if kind not in ("LDG", "LDGSTS"):
            return 0
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[m] for m in modifiers if m in sizes), 4)


def loops(text: str) -> tuple[Loop, ...]:
    """The innermost loops of one kernel's text, in its order.

    They are natural loops: a branch back to a block that every way to the branch has passed. A detour out of line,
    which jumps back into the middle of a loop, is a part of that loop.
    """
    ops, labels = _read(text)
    blocks, follows = _graph(ops, labels)
    before: dict[int, set[int]] = {b: set() for b in range(len(blocks))}
    for b, after in enumerate(follows):
        for a in after:
            before[a].add(b)
    dominators = _dominators(follows, before)
    bodies: dict[int, set[int]] = {}
    for b, heads in enumerate(follows):
        for head in heads & dominators.get(b, set()):
            bodies[head] = bodies.get(head, {head}) | _body(head, b, before)
    # Behind its end a kernel is filled up with a branch to itself.
    inner = sorted(h for h in bodies if not any(o != h and o in bodies[h] for o in bodies))
    insides = [[op for b in sorted(bodies[h]) for op in ops[slice(*blocks[b])]] for h in inner]
    return tuple(_loop(inside) for inside in insides if len(inside) > 1)


def _loop(ops: list[_Op]) -> Loop:
    counts = Counter(op.name.split(".")[0] for op in ops)
    return Loop(len(ops), sum(op.loaded_bytes for op in ops), dict(counts.most_common()))


def _read(text: str) -> tuple[list[_Op], dict[str, int]]:
    """The instructions, and which of them each label precedes."""
    ops: list[_Op] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(ops)
        elif found := _INSTRUCTION.match(line):
            ops.append(_Op(found[2], found[1] is not None, found[3]))
    return ops, labels


def _graph(ops: list[_Op], labels: Mapping[str, int]) -> tuple[list[tuple[int, int]], list[set[int]]]:
    """Basic blocks as [start, stop), and the blocks that can follow each."""
    cuts = {0, len(ops), *labels.values(), *(i + 1 for i, op in enumerate(ops) if op.to or op.ends)}
    blocks = [x for x in pairwise(sorted(cuts)) if x[0] < x[1]]
    at = {start: b for b, (start, _) in enumerate(blocks)}
    follows: list[set[int]] = []
    for _, stop in blocks:
        op = ops[stop - 1]
        after = set() if op.ends else {stop}
        if (to := op.to) is not None and to in labels:
            after.add(labels[to])
        follows.append({at[i] for i in after if i in at})
    return blocks, follows


def _dominators(follows: list[set[int]], before: Mapping[int, set[int]]) -> dict[int, set[int]]:
    """Of each block that the entry reaches, the blocks on every way to it."""
    reached: set[int] = set()
    waiting = [0] if follows else []
    while waiting:
        if (b := waiting.pop()) not in reached:
            reached.add(b)
            waiting += follows[b]
    found = {b: set(reached) for b in reached} | ({0: {0}} if reached else {})
    changed = True
    while changed:
        changed = False
        for b in sorted(reached - {0}):
            now = {b} | set.intersection(*(found[p] for p in before[b] & reached))
            changed |= now != found[b]
            found[b] = now
    return found


def _body(head: int, last: int, before: Mapping[int, set[int]]) -> set[int]:
    """The blocks from which `last` is reached without passing `head`, and both."""
    inside, waiting = {head}, [last]
    while waiting:
        if (b := waiting.pop()) not in inside:
            inside.add(b)
            waiting += before[b]
    return inside
