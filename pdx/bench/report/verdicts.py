"""Claims as ranges of gains; verdicts on whether a measured gain is within its claim, with an explanation."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from pallas_kernels.hardware import Chip
from pdx.bench.timed_work import TimedWork
from pdx.bench.timing import Timing
from pdx.cost import Phase

# Claim -> the range of gains for which it holds. A gain is the speed of a phase with the optimization over that
# without.
CLAIMS = {
    "no": (0.95, 1.05),
    "small": (0.95, 1.5),
    "yes": (1.05, math.inf),
    "huge": (2.0, math.inf),
    "costs a little": (0.67, 1.05),
    "protects the others": (2.0, math.inf),
}
HOLDS, FAILS = "holds", "does not hold"


@dataclass(frozen=True)
class Comparison:
    """One phase without and with an optimization. `measures`: what is timed, if it is not a step."""

    off: TimedWork
    on: TimedWork
    measures: str = ""

    @property
    def phase(self) -> Phase:
        return self.off.phase

    def gain(self, off_s: float, on_s: float) -> float:
        """Tokens per second with the optimization over those without."""
        return off_s / on_s * self.on.tokens / self.off.tokens


@dataclass(frozen=True)
class Finding:
    """The result of a phase of a row: claimed, measured and predicted gains, and the verdict."""

    phase: Phase
    claim: str
    load: str
    off_s: Timing
    on_s: Timing
    gains: tuple[float, ...]  # round by round
    predicted: dict[str, float]  # gain, by chip
    verdict: str
    why: str

    @property
    def gain(self) -> float:
        return statistics.median(self.gains)


def judge(claim: str, of: Comparison, off: Timing, on: Timing, chip: Chip, chips: dict[str, Chip]) -> Finding:
    """The finding of a comparison. A claim holds if the interquartile range of the rounds' gains overlaps its range."""
    gains = tuple(of.gain(a, b) for a, b in zip(off.seconds, on.seconds, strict=True))
    quarter, _, third = statistics.quantiles(gains, n=4, method="inclusive") if len(gains) > 1 else gains * 3
    low, high = CLAIMS[claim]
    predicted = {name: of.gain(of.off.seconds(c), of.on.seconds(c)) for name, c in chips.items()}
    verdict = HOLDS if quarter < high and third >= low else FAILS
    load = of.off.label if of.off.label == of.on.label else f"{of.off.label} → {of.on.label}"
    load += f" ({of.measures})" if of.measures else ""
    return Finding(of.phase, claim, load, off, on, gains, predicted, verdict, explain(of, off, on, chip))


def explain(of: Comparison, off: Timing, on: Timing, chip: Chip) -> str:
    """A sentence that explains a gain: what dominates the time without the optimization, how it changes bytes and
    FLOPs, and how close both come to the device's floor."""
    share, what = _dominant(of.off, chip)
    per_token = [
        [sum(getattr(c, x) for c in w.costs()) / w.tokens for w in (of.off, of.on)] for x in ("bytes", "flops")
    ]
    moved, computed = (b / a for a, b in per_token)
    floors = [timed.floor(chip) for timed in (of.off, of.on)]
    text = (
        f"Without it {share:.0%} of the floor is {what}. It moves {moved:.2f}x the bytes and computes "
        f"{computed:.2f}x the FLOPs a token, which allows {of.gain(*floors):.2f}x"
    )
    reached = [floor / t.median for floor, t in zip(floors, (off, on), strict=True)]
    return text + f"; the device came to {reached[0]:.0%} of its floor's speed without and {reached[1]:.0%} with it."


def _dominant(timed: TimedWork, chip: Chip) -> tuple[float, str]:
    """The largest part of the floor: its share, and its name."""
    words = {
        ("products", 0): "computing products",
        ("products", 1): "reading weights",
        ("attention", 0): "computing attention",
        ("attention", 1): "reading the cache",
    }
    if not timed.setup.flash:
        words["attention", 1] = "moving scores and the cache"
    spent = dict.fromkeys(words, 0.0)
    for c in timed.costs():
        for part, pair in c.parts(chip).items():
            slower = int(pair[1] > pair[0])
            spent[part, slower] += pair[slower]
    most = max(spent, key=spent.get)
    return spent[most] / sum(spent.values()), words[most]
