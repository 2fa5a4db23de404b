"""In which order waiting requests are admitted. A new policy is one function here, and its name in `POLICIES`. No jax.

A policy gives each request a head start in seconds when it is submitted, once: requests are admitted by arrival time
less head start. Since that key never changes, later requests cannot pass it for ever, and no request starves.
"""

from __future__ import annotations

from collections.abc import Callable

from pdx.engine.request import EngineRequest

# Of a request, the engine's token budget and `aging_s`.
HeadStart = Callable[[EngineRequest, int, float], float]


def fcfs(request: EngineRequest, budget: int, aging_s: float) -> float:
    """First come, first served."""
    return 0.0


def priority(request: EngineRequest, budget: int, aging_s: float) -> float:
    """Each level of priority counts as `aging_s` seconds of waiting."""
    return request.priority * aging_s


def shortest(request: EngineRequest, budget: int, aging_s: float) -> float:
    """The shortest prompt first: `budget` tokens of prompt count as `aging_s` seconds of arriving later."""
    return -len(request.prompt) / budget * aging_s


POLICIES: dict[str, HeadStart] = {"fcfs": fcfs, "priority": priority, "shortest": shortest}
