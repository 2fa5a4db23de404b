"""How many tokens a round drafts: as many as pay, by the rows' acceptance so far and by what a round costs.

A round of level g verifies up to g drafted tokens a row. If each is accepted with probability a, it emits
(1 - a^(g+1)) / (1 - a) tokens (Leviathan et al. 2023). `choose` takes the level with the most tokens a second over all
rows; level 0, a plain decode step, where none pays.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# Draft lengths that rounds are compiled for; T = 1, 4 and 8 tokens a row.
LEVELS = (0, 3, 7)
# Seconds of a round at a level that must not be taken.
NEVER = float("inf")
# What a level must promise over a plain step: the costs are measured, and not exactly.
MARGIN = 1.1
# Tokens that the prior counts for, and how long what was seen is remembered, in tokens.
PRIOR_WEIGHT, MEMORY = 3.0, 64.0


@struct.dataclass
class Acceptance:
    """Tokens tried and accepted, by row and by the proposer's confidence; old ones count less and less.

    A plain step teaches too, if the proposer knows for free what it would have drafted.
    """

    tried: Float[Array, "B C"]
    accepted: Float[Array, "B C"]

    @classmethod
    def none(cls, rows: int, prior: tuple[float, ...]) -> Acceptance:
        """Before anything was seen; on the host, where it costs no program."""
        weight = np.full((rows, len(prior)), PRIOR_WEIGHT, np.float32)
        return cls(weight, weight * np.asarray(prior, np.float32))

    def of(self, confidence: Int[Array, " B"]) -> Float[Array, " B"]:
        """The probability that a token is accepted."""
        tried, accepted = (jnp.take_along_axis(x, confidence[:, None], 1)[:, 0] for x in (self.tried, self.accepted))
        return accepted / tried

    def observe(self, confidence: Int[Array, " B"], tried: Int[Array, " B"], accepted: Int[Array, " B"]) -> Acceptance:
        """With `tried` tokens more, of which `accepted` were accepted; a token behind a rejected one was not tried."""
        rows = jnp.arange(confidence.shape[0])
        keep = jnp.exp(-tried / MEMORY)
        return Acceptance(
            self.tried.at[rows, confidence].multiply(keep).at[rows, confidence].add(tried),
            self.accepted.at[rows, confidence].multiply(keep).at[rows, confidence].add(accepted),
        )


def always(length: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Levels and costs for which every round drafts `length` tokens, where there is a draft at all."""
    return (0, length), np.array([NEVER, 1.0], np.float32)


def expected_tokens(acceptance: Float[Array, " B"], drafted: Int[Array, " B"]) -> Float[Array, " B"]:
    """Tokens that a round emits with `drafted` tokens a row."""
    a = jnp.clip(acceptance, 0.0, 0.9999)
    return (1 - a ** (drafted + 1)) / (1 - a)


def choose(
    levels: tuple[int, ...],
    costs: Float[Array, " levels"],
    acceptance: Float[Array, " B"],
    available: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Int[Array, ""]:
    """The index of the level that emits the most tokens a second.

    Args:
      levels: draft lengths, ascending; the first is 0.
      costs: seconds of a round at each level, or any other unit. A level that costs `NEVER` is not taken; but level 0
        is, whatever it costs, where no row has a draft.
      available: tokens that each row could have verified.
    """
    found = []
    for level, cost in zip(levels, costs, strict=True):
        tokens = expected_tokens(acceptance, jnp.minimum(available, level))
        found.append(jnp.where(active, tokens, 0.0).sum() / cost)
    rates = jnp.stack(found)
    best = jnp.argmax(rates)
    has_draft = jnp.any(active & (available > 0))
    return jnp.where(has_draft & (rates[best] > MARGIN * rates[0]), best, 0).astype(jnp.int32)
