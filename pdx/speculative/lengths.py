"""How many tokens a round drafts: as many as pay, by the rows' acceptance so far and by what a round costs.

A round of level g verifies up to g drafted tokens a row. If each is accepted with probability a, it emits
(1 - a^(g+1)) / (1 - a) tokens (Leviathan et al. 2023). The rows of a batch wait for the last one, so `choose` takes the
level at which that one ends first; level 0, a plain decode step, where none pays. What failed drafts cost is bounded
(`shares.gained`).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from pdx.speculative.shares import MARGIN, MEMORY, PRIOR_WEIGHT, at_worst, gained
from pdx.speculative.trees import Tree

# Draft lengths that rounds are compiled for; T = 1, 4 and 8 tokens a row.
LEVELS = (0, 3, 7)
# Seconds of a round at a level that must not be taken.
NEVER = float("inf")


@struct.dataclass
class Acceptance:
    """Tokens tried and accepted, by row and by the proposer's confidence class; old ones count less and less.

    Classes ascend: where one is right, a surer one would have been, and where one is wrong, a less sure one too. So
    accepted tokens also count for the classes above, and rejected ones for those below. A plain step teaches too, if
    the proposer knows for free what it would have drafted.
    """

    tried: Float[Array, "B C"]
    accepted: Float[Array, "B C"]

    @classmethod
    def none(cls, rows: int, prior: tuple[float, ...]) -> Acceptance:
        """Before anything was seen; on the host, where it costs no program."""
        weight = np.full((rows, len(prior)), PRIOR_WEIGHT, np.float32)
        return cls(weight, weight * np.asarray(prior, np.float32))

    def of(self, confidence: Int[Array, " B"]) -> Float[Array, "2 B"]:
        """The probability that a token is accepted, and what it is at worst."""
        tried, accepted = (jnp.take_along_axis(x, confidence[:, None], 1)[:, 0] for x in (self.tried, self.accepted))
        return jnp.stack([accepted / tried, at_worst(accepted, tried)])

    def observe(self, confidence: Int[Array, " B"], tried: Int[Array, " B"], accepted: Int[Array, " B"]) -> Acceptance:
        """With `tried` tokens more, of which `accepted` were accepted; a token behind a rejected one was not tried."""
        classes = jnp.arange(self.tried.shape[1])
        confidence, tried, accepted = (x[:, None] for x in (confidence, tried, accepted))
        hits = jnp.where(classes >= confidence, accepted, 0)
        misses = jnp.where(classes <= confidence, tried - accepted, 0)
        keep = jnp.exp(-(hits + misses) / MEMORY)
        return Acceptance(self.tried * keep + hits + misses, self.accepted * keep + hits)


def always(length: int | Tree) -> tuple[tuple[int | Tree, ...], np.ndarray]:
    """Levels and costs for which every round drafts `length` tokens, or a tree, where there is a draft at all."""
    return (0, length), np.array([NEVER, 1.0], np.float32)


def ratios(costs: Float[Array, " levels"]) -> Float[Array, " levels"]:
    """The plain steps that take as long as a round of each level; 0 where plain steps are not chosen among."""
    return jnp.where(jnp.isfinite(costs[0]), costs / costs[0], 0.0)


def expected_tokens(acceptance: Float[Array, "*n B"], drafted: Int[Array, " B"]) -> Float[Array, "*n B"]:
    """Tokens that a round emits with `drafted` tokens a row."""
    a = jnp.clip(acceptance, 0.0, 0.9999)
    return (1 - a ** (drafted + 1)) / (1 - a)


def choose(
    levels: tuple[int, ...],
    costs: Float[Array, " levels"],
    acceptance: Float[Array, "2 B"],
    available: Int[Array, " B"],
    left: Int[Array, " B"],
    allowance: Float[Array, ""] | float = NEVER,
) -> Int[Array, ""]:
    """The index of the level at which the last row ends first, of those that the allowance covers.

    Args:
      levels: draft lengths, ascending; the first is 0. Of a token tree, its depth: a is then the probability that one
        of the tokens offered at a place is accepted.
      costs: seconds of a round at each level, or any other unit. A level that costs `NEVER` is not taken; but level 0
        is, whatever it costs, where no row has a draft.
      acceptance: of each row, and what it is at worst.
      available: tokens that each row could have verified.
      left: tokens that each row still has to emit; 0: it takes no part.
      allowance: what drafts may lose, in plain steps.
    """
    found = []
    for level, cost, ratio in zip(levels, costs, ratios(costs), strict=True):
        rounds, most = jnp.max(left / expected_tokens(acceptance, jnp.minimum(available, level)), axis=1)
        is_covered = allowance + gained(jnp.max(left) / most, ratio) >= 0
        found.append(jnp.where(is_covered | (level == 0), cost * rounds, NEVER))
    seconds = jnp.stack(found)
    best = jnp.argmin(seconds)
    has_draft = jnp.any((left > 0) & (available > 0))
    return jnp.where(has_draft & (MARGIN * seconds[best] < seconds[0]), best, 0).astype(jnp.int32)
