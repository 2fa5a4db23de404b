"""What a proposer of an engine learns from the tokens that the target reads: its final hidden states, in every step.

1. `read`, when the target has read a step's tokens, prompts and drafts among them.
2. `hidden_at` takes out what may be needed once it is known which drafts stay.
3. `keep`, when that is known.
"""

from __future__ import annotations

import abc
from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float, Int

from pdx.cache.paged import PagedCache
from pdx.cache.rows import PackedRows


@struct.dataclass
class ReadTokens:
    """The packed tokens that the target read in a step of an engine.

    Attributes:
      hidden: the target's final hidden state of each.
      rows: where they stand in the pages.
      slot_of: the slot whose request owns each row.
    """

    tokens: Int[Array, " T"]
    hidden: Float[Array, "T D"]
    rows: PackedRows
    slot_of: Int[Array, " R"]


class Reader(abc.ABC):
    """A proposer of an engine that reads the target's hidden states, of every token once."""

    @abc.abstractmethod
    def read(self, read: ReadTokens, state: Any, cache: PagedCache, params, draft_params, cfg, kernels) -> PagedCache:
        """The cache with what the proposer makes of a step's tokens."""

    @abc.abstractmethod
    def hidden_at(
        self, read: ReadTokens, state: Any, at: Int[Array, "S g1"], took_part: Bool[Array, " S"]
    ) -> Float[Array, "S g1 D"]:
        """The hidden states of the tokens behind which each slot samples; what `keep` needs of slots without any."""

    @abc.abstractmethod
    def keep(self, state: Any, hidden: Float[Array, "S g1 D"], counts: Int[Array, " S"]) -> Any:
        """The state behind a step that emitted `counts` tokens in each slot."""
