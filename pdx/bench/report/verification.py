"""What it costs to verify drafts on this device: measured, and by parts as the cost model explains it.

A verification reads the weights once, as a decode step does, but multiplies them with every drafted token. Where
arithmetic is not idle, as on a CPU, that takes time.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdx.bench.report.optimizations import Experiment
from pdx.bench.timing import Timing, interleaved

# Drafted tokens of each row.
DRAFTS = (0, 1, 3, 7)


@dataclass(frozen=True)
class Verification:
    """A step that verifies `drafted` tokens in each of `rows` rows; with none it is a decode step.

    Attributes:
      context: tokens that each row holds before.
      predicted_s: seconds of each part of the step at this device's measured rates.
    """

    rows: int
    drafted: int
    context: int
    measured: Timing
    predicted_s: dict[str, float]


def measure(experiment: Experiment) -> tuple[Verification, ...]:
    """Verify drafts of several lengths in turn, for one row and for the largest batch."""
    s, found = experiment.sizes, []
    for rows in (1, s.rows):
        works = {draft: experiment.plain.verify(rows, s.context, draft) for draft in DRAFTS}
        times = interleaved({draft: x.work for draft, x in works.items()}, s.rounds)
        for draft, timed in works.items():
            (cost,) = timed.costs()
            found.append(Verification(rows, draft, s.context, times[draft], cost.seconds_by_part(experiment.chip)))
    return tuple(found)
