"""What a request took, the two phases apart. No clock and no I/O in here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestTiming:
    """Seconds of one request, from the moment its prefill began, without compilation.

    ttft_s: until the first token was on the host (prefill).
    e2e_s: until the last one was.
    """

    tokens: int
    ttft_s: float
    e2e_s: float

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token behind the first (decode): (E2E - TTFT) / (n - 1). None for fewer than two."""
        return (self.e2e_s - self.ttft_s) / (self.tokens - 1) if self.tokens > 1 else None
