"""Which row owns each token of one call, and at which position: all that the cache, attention and the head need.

`DenseCache.rows` makes `TokenRows` from the number of new tokens; `PackedRows.packed` makes its paged sibling from
block tables. `forward` and the layers take either and do not ask which.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int


@struct.dataclass
class TokenRows:
    """T tokens of each of B rows, after those that the row holds.

    Attributes:
      new_lengths: tokens that this call appends to each row; 0: the row takes no part.
      held_lengths: tokens that each row holds, this call's included; 0 for a row that takes no part.
      positions: the position of each token in its row.
      real: False for padding and for tokens past the end of the cache, which are neither written nor attended to.
      tree: of a token tree, which of the T tokens each one sees: its ancestors and itself. Then a token's position is
        counted by its depth, and its slot by its index. None: the tokens are a chain.
    """

    new_lengths: Int[Array, " B"]
    held_lengths: Int[Array, " B"]
    positions: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    tree: Bool[Array, "B T T"] | None = None

    @classmethod
    def behind(cls, before: Int[Array, " B"], new_lengths: Int[Array, " B"], tokens: int) -> TokenRows:
        """Rows that held `before` tokens and get `tokens` more each, of which the first `new_lengths` are real."""
        offsets = jnp.arange(tokens, dtype=jnp.int32)[None]
        held = jnp.where(new_lengths > 0, before + new_lengths, 0)
        return cls(new_lengths, held, before[:, None] + offsets, offsets < new_lengths[:, None])

    def as_tree(self, mask: Bool[ArrayLike, "T T"]) -> TokenRows:
        """The same tokens as the nodes of a tree, or of several: `mask[i, j]`, whether token i sees token j.

        A token comes behind its ancestors. The depth of a token is how many of them are among these T.
        """
        mask = jnp.asarray(mask)
        depths = mask.sum(1, dtype=jnp.int32) - 1
        tree = jnp.broadcast_to(mask, (self.positions.shape[0], *mask.shape))
        return self.replace(positions=self.starts[:, None] + depths, tree=tree)

    @property
    def starts(self) -> Int[Array, " B"]:
        """The position of each row's first token."""
        return self.positions[:, 0]

    @property
    def wanted(self) -> Int[Array, "B 1"]:
        """The last token of each row, whose logits a step returns."""
        return self.new_lengths[:, None] - 1

    def slots(self, size: int) -> Int[Array, " B*T"]:
        """The slot mapping: the slot that each token is written to, row * size + slot in the row; -1: not written."""
        b, t = self.positions.shape
        places = self.starts[:, None] + jnp.arange(t)
        return jnp.where(self.real, jnp.arange(b)[:, None] * size + places % size, -1).reshape(-1)


@struct.dataclass
class PackedRows:
    """The tokens of R requests packed into one row [1, T], stored in the pages that block tables name.

    Attributes:
      block_tables: position t of request r is in page block_tables[g, r, t // p] of page group g. [R, M]: of one group.
      held_lengths: tokens that each request holds, this call's included; 0: it takes no part.
      query_starts: request r owns tokens query_starts[r] to query_starts[r+1] - 1; the last one has position
        held_lengths[r] - 1. Tokens after the last request are padding.
      positions: the position of each token in its request.
      owner: the request of each token.
      real: False for padding.
      wanted_tokens: the packed tokens whose logits a step returns; None: the last one of each request.
      decode_rows, decode_queries: static; the first `decode_rows` requests own at most `decode_queries` tokens each.
      max_queries: static; the most tokens that one request owns.
    """

    block_tables: Int[Array, "Gr R M"] | Int[Array, "R M"]
    held_lengths: Int[Array, " R"]
    query_starts: Int[Array, " R1"]
    positions: Int[Array, "1 T"]
    owner: Int[Array, "1 T"]
    real: Bool[Array, "1 T"]
    wanted_tokens: Int[Array, " W"] | None = None
    decode_rows: int = struct.field(pytree_node=False, default=0)
    decode_queries: int = struct.field(pytree_node=False, default=1)
    max_queries: int | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def packed(
        cls,
        tokens: int,
        block_tables: Int[Array, "Gr R M"],
        held_lengths: Int[Array, " R"],
        query_starts: Int[Array, " R1"],
        decode_rows: int = 0,
        max_queries: int | None = None,
        *,
        decode_queries: int = 1,
    ) -> PackedRows:
        """Rows of `tokens` packed tokens, padding included."""
        at, rows = jnp.arange(tokens, dtype=jnp.int32), held_lengths.shape[0]
        row = jnp.searchsorted(query_starts, at, side="right", method="compare_all") - 1
        owner = jnp.clip(row, 0, rows - 1)
        held = held_lengths[owner]
        positions = held - query_starts[owner + 1] + at
        real = (row < rows) & (held > 0) & (positions >= 0)
        return cls(
            block_tables,
            held_lengths,
            query_starts,
            positions[None],
            owner[None],
            real[None],
            decode_rows=decode_rows,
            decode_queries=decode_queries,
            max_queries=max_queries,
        )

    @property
    def wanted(self) -> Int[Array, "1 W"]:
        """The tokens whose logits a step returns."""
        wanted = self.query_starts[1:] - 1 if self.wanted_tokens is None else self.wanted_tokens
        return wanted[None]

    def of_group(self, index: int) -> PackedRows:
        """The same tokens with the block table of one page group."""
        return self.replace(block_tables=self.block_tables[index])

    def slots(self, size: int) -> Int[Array, " T"]:
        """The slot mapping: page * size + slot in the page for each token; -1: not written."""
        owner, positions, real = self.owner[0], self.positions[0], self.real[0]
        width = self.block_tables.shape[1]
        page = self.block_tables[owner, jnp.clip(positions // size, 0, width - 1)]
        return jnp.where(real & (positions < width * size), page * size + positions % size, -1)
