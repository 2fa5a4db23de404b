"""Runs the scalar unit of a kernel's schedule, to see which bundles are issued how often.

    ran = run(read(text), {0: plan, 1: tables})     # values of the operands that the kernel's scalars come from
    ran.bundles, ran.counts["dma_starts"]

Loops and branches of a TPU kernel are decided by scalars: numbers in scalar memory and arithmetic on them. Only the
instructions that decide a branch, or whether a DMA starts, are run; the vector unit's are counted. So trip counts that
are data are as certain as fixed ones. It is a count, not a simulation of time: a bundle is issued at most once a cycle,
and a wait may take longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pallas_kernels.analysis.bundles import Bundle, Op, Schedule, counted

# Pointers are numbers from here on. They are far apart, and no arithmetic on 32 bits reaches them.
_POINTER = 1 << 44
_SPACING = 1 << 48
# Runs longer than this are given up: more steps of branches than any kernel of the cases takes.
MOST_STEPS = 20_000_000


class UnknownBranch(ValueError):
    """A branch, or a DMA, depends on a value that is not known."""


class _Unknown:
    """A value that nobody knows. Arithmetic on it is unknown; a decision by it raises UnknownBranch."""

    def _same(self, *_):
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = _same
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __xor__ = __rxor__ = __neg__ = __mod__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = _same

    def __eq__(self, other):
        return self

    def __ne__(self, other):
        return self

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self):
        raise UnknownBranch("a branch depends on a value that the case does not give")


UNKNOWN = _Unknown()


@dataclass
class Run:
    """What one run of a kernel on one core issued.

    Attributes:
      bundles: issued, in all.
      turns: of each loop, in the order of `Schedule.loops`.
      counts: of instructions, by the names of `bundles.KINDS`.
    """

    bundles: int = 0
    turns: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def run(schedule: Schedule, operands: Mapping[int, np.ndarray], core: int = 0) -> Run:
    """Run a schedule on one core.

    Args:
      operands: values of the kernel's integer operands, by their index.

    Raises:
      UnknownBranch: a branch depends on a value that is not known.
    """
    machine = _Machine(schedule, operands, core)
    machine.go()
    found, begun = Run(), {}
    for block, times in zip(machine.blocks, machine.times, strict=True):
        begun[block.start] = times
        found.bundles += times * (block.stop - block.start)
        found.counts.update({name: times * count for name, count in block.counts.items()})
    found.counts["dma_starts"] = machine.started  # some have a predicate that does not hold
    found.turns = [begun[loop.first] for loop in schedule.loops]
    return found


@dataclass
class _Block:
    """Bundles that are issued one after the other."""

    start: int
    stop: int
    counts: Counter[str]
    act: Callable[[], bool]  # runs them; whether the branch at the end is taken
    target: int = -1  # the block that the branch goes to


class _Machine:
    def __init__(self, schedule: Schedule, operands: Mapping[int, np.ndarray], core: int):
        self.schedule = schedule
        self.values: dict[str, object] = {}
        self.registers: dict[str, object] = {}
        self.memory: dict[int, int] = {}
        self.places: dict[str, int] = {}
        self.contents: dict[int, np.ndarray] = {}  # of operands, by their pointers
        self.started = 0
        self.memory[self._place("#allocation0")] = core
        for operand in schedule.operands:
            if operand.by_value:
                given = operands.get(operand.index)
                self._set(operand.register, UNKNOWN if given is None else int(np.asarray(given).item()))
                continue
            pointer = self._place(f"operand{operand.index}")
            self._set(operand.register, pointer)
            if operand.index in operands:
                words = np.asarray(operands[operand.index]).reshape(-1)
                self.contents[pointer] = words
                self.memory.update(zip(range(pointer, pointer + len(words)), map(int, words), strict=True))
        self.needed = _needed(schedule)
        self.blocks = self._cut()
        self.times = [0] * len(self.blocks)

    def go(self) -> None:
        at, steps = 0, 0
        while at < len(self.blocks):
            self.times[at] += 1
            block = self.blocks[at]
            at = block.target if block.act() else at + 1
            steps += 1
            if steps > MOST_STEPS:
                raise UnknownBranch(f"the kernel has not ended after {MOST_STEPS:,} branches")

    def _cut(self) -> list[_Block]:
        """Cut the schedule where branches go to, and behind the delay of each branch."""
        schedule, count = self.schedule, len(self.schedule.bundles)
        behind = {at + schedule.delay + 1 for at in schedule.branches}
        targets = {to for _, to in schedule.branches.values()}
        starts = sorted({0, *behind, *targets} & set(range(count)))
        number = {start: i for i, start in enumerate(starts)}
        blocks = []
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            inside = schedule.bundles[start:stop]
            branch = next((at for at in range(start, stop) if at in schedule.branches), None)
            op, to = schedule.branches[branch] if branch is not None else (None, count)
            act = self._compiled(inside, op)
            blocks.append(_Block(start, stop, counted(inside), act, number.get(to, len(starts))))
        return blocks

    def _compiled(self, bundles: tuple[Bundle, ...], branch: Op | None) -> Callable[[], bool]:
        """A function that runs the needed instructions of some bundles, and says whether their branch is taken."""
        phis, others = [], []
        for bundle in bundles:
            for op in bundle.ops:
                if op.name == "sphi" and op.result in self.needed:
                    phis.append(self._phi(op))
                elif op is branch:
                    others.append(f"taken = bool({self._holds(op)})")
                elif op.starts_dma:
                    others.append(self._dma(op))
                elif op.name == "sst" or (op.result in self.needed and not op.name.startswith("inlined")):
                    others += self._line(op)
        lines = ["def act():", "  taken = False", *(f"  {x}" for x in phis + others), "  return taken"]
        scope = {
            "V": self.values,
            "R": self.registers,
            "M": self.memory,
            "machine": self,
            "UNKNOWN": UNKNOWN,
            "w": _wrapped,
            "u": _unsigned,
            "no": _no,
            "both": _both,
            "pick": _pick,
            "extreme": _extreme,
            "divided": _divided,
            "pop": _pop,
        }
        exec("\n".join(lines), scope)  # the text is made here, of the names in `_line`
        return scope["act"]  # type: ignore[return-value]

    def _set(self, register: str, value: object) -> None:
        self.values[register] = self.registers[_physical(register)] = value

    def _place(self, name: str) -> int:
        return self.places.setdefault(name, _POINTER + _SPACING * len(self.places))

    def _holds(self, op: Op) -> str:
        if op.predicate is None:
            return "True"
        value = f"V.get({op.predicate!r}, UNKNOWN)"
        return f"no({value})" if op.negated else value

    def _phi(self, op: Op) -> str:
        return f"V[{op.result!r}] = R.get({_physical(str(op.result))!r}, UNKNOWN)"

    def _value(self, arg: str) -> str:
        """An argument as an expression: a register, a number, or a place with an offset."""
        arg = arg.strip()
        if arg.startswith("[") and arg.endswith("]"):
            return self._value(arg[1:-1].removeprefix("smem:"))
        if " + " in arg:
            return "(" + " + ".join(self._value(part) for part in arg.split(" + ")) + ")"
        if arg.startswith("[") or arg.startswith("#"):
            return str(self._place(arg.strip("[]")))
        if arg.startswith("!%"):
            return f"no(V.get({arg[2:]!r}, UNKNOWN))"
        if arg.startswith("%"):
            return f"V.get({arg[1:]!r}, UNKNOWN)"
        number = int(arg.removeprefix("$"), 0)
        return str(_wrapped(number))

    def _line(self, op: Op) -> list[str]:
        """The instruction as lines of Python."""
        if op.name == "sst":
            *place, value = op.args
            where, value = f"M[{self._value(','.join(place))}]", self._value(value)
            if op.predicate is None:
                return [f"{where} = {value}"]
            # Unknown whether it is stored: then what is there is unknown, such as the cookies of v5p's barriers.
            return [f"{where} = pick({self._holds(op)}, {value}, {where.replace('M[', 'M.get(')[:-1]}, UNKNOWN))"]
        result = str(op.result)
        target = f"V[{result!r}] = R[{_physical(result)!r}]"
        try:
            value = self._expression(op)
        except (ValueError, IndexError):
            value = "UNKNOWN"
        if op.predicate is None:
            return [f"{target} = {value}"]
        kept = f"R.get({_physical(result)!r}, UNKNOWN)" if op.otherwise is None else f"V.get({op.otherwise!r}, UNKNOWN)"
        return [f"{target} = pick({self._holds(op)}, {value}, {kept})"]

    def _expression(self, op: Op) -> str:
        if op.name == "sdivrem.u32":
            return f"divided({self._value(op.args[0])}, {self._value(op.args[1])}, {op.args[2]!r})"
        args = [self._value(arg) for arg in op.args]
        if op.name == "spop.drf":
            return f"pop({args[0]})"
        kind, _, detail = op.name.partition(".")
        signed = not detail.startswith("u32")
        if kind == "sld":
            return f"M.get({args[0]}, UNKNOWN)"
        if kind in ("smov", "int_to_ptr", "pmov"):
            return args[0]
        if kind == "scalar_select":
            return f"pick({args[0]}, {args[1]}, {args[2]})"
        if kind == "scmp":
            sign = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}[detail.split(".")[0]]
            of = args if ".u32" not in op.name else [f"u({x})" for x in args]
            return f"({of[0]} {sign} {of[1]})"
        if kind in ("pnand", "por", "pand", "pneg", "pnor", "pxor"):
            return {
                "pneg": "no({0})",
                "pand": "both({0}, {1})",
                "por": "no(both(no({0}), no({1})))",
                "pnand": "no(both({0}, {1}))",
                "pnor": "both(no({0}), no({1}))",
                "pxor": "({0} != {1})",
            }[kind].format(*args)
        if kind == "scalar_lea":
            return f"({args[0]} + {args[1]})"
        if kind in ("smin", "smax"):
            of = args if signed else [f"u({x})" for x in args]
            return f"w(extreme({kind[1:]}, {of[0]}, {of[1]}))"
        signs = {"sadd": "+", "ssub": "-", "smul": "*", "sand": "&", "sor": "|", "sxor": "^"}
        if kind in signs:
            return f"w({args[0]} {signs[kind]} {args[1]})"
        if kind == "sshll":
            return f"w({args[0]} << {args[1]})"
        if kind == "sshra":
            return f"w({args[0]} >> {args[1]})"
        if kind == "sshrl":
            return f"w(u({args[0]}) >> {args[1]})"
        raise ValueError(op.name)

    def _dma(self, op: Op) -> str:
        act = "machine.started += 1"
        if op.name.endswith("to_smem"):
            act = f"machine.load({self._value(op.args[0])}, {self._value(op.args[2])})"
        return act if op.predicate is None else f"if {self._holds(op)}: {act}"

    def load(self, source: int, target: int) -> None:
        """Copy an operand to scalar memory. The pointer may be given in words, or in bytes or tiles."""
        self.started += 1
        for shift in range(10):
            words = self.contents.get(source >> shift)
            if words is not None and source == (source >> shift) << shift:
                self.memory.update(zip(range(target, target + len(words)), map(int, words), strict=True))
                return


def _no(x):
    return UNKNOWN if x is UNKNOWN else not x


def _both(a, b):
    """Whether both hold; one that does not decides it, whatever the other is."""
    if a is UNKNOWN or b is UNKNOWN:
        return False if a is False or b is False else UNKNOWN
    return bool(a and b)


def _pick(condition, a, b):
    return UNKNOWN if condition is UNKNOWN else a if condition else b


def _extreme(choose, a, b):
    return UNKNOWN if a is UNKNOWN or b is UNKNOWN else choose(a, b)


def _divided(a, b, wanted: str):
    """The results of a division in the order in which they are popped: the quotient first."""
    if a is UNKNOWN or b is UNKNOWN or not b:
        return UNKNOWN
    quotient, rest = divmod(_unsigned(a), _unsigned(b))
    return {"kDivAndRem": [quotient, rest], "kDiv": [quotient], "kRem": [rest]}[wanted]


def _pop(results):
    return UNKNOWN if results is UNKNOWN or not results else _wrapped(results.pop(0))


def _physical(register: str) -> str:
    """The register of the machine that holds a value: `s24_s20` is in s20."""
    return register.rsplit("_", 1)[-1]


def _wrapped(x):
    """A number as 32 bits with a sign; pointers stay."""
    if type(x) is not int or x >= _POINTER:
        return x
    return ((x + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def _unsigned(x):
    return x & 0xFFFFFFFF if type(x) is int and x < 0 else x


def _needed(schedule: Schedule) -> set[str]:
    """The registers that branches and DMAs depend on, through scalar memory too."""
    made: dict[str, list[Op]] = {}
    work: list[str] = []
    for op in (op for bundle in schedule.bundles for op in bundle.ops):
        if op.result is not None:
            made.setdefault(op.result, []).append(op)
        if op.name == "sst" or op.name.startswith("sbr") or (op.starts_dma and "smem" in op.name):
            work += op.reads
        elif op.starts_dma and op.predicate:
            work.append(op.predicate)
        elif op.name == "spop.drf":  # each of a division's, so that their order is kept
            work.append(str(op.result))
    found: set[str] = set()
    while work:
        if (name := work.pop()) not in found:
            found.add(name)
            work += [x for op in made.get(name, ()) for x in op.reads]
    return found
