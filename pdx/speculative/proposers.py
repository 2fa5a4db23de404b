"""Proposers: what is drafted for a row, from its tokens or by a smaller model. They run on the device, inside a round.

A proposer is static and hashable; what it remembers is a pytree, its state. A round calls, in this order:

1. `prepare`: how many tokens each row could draft, and how sure that is (its confidence class). It is cheap.
2. `draft`, if the round's level is above 0: the tokens.
3. `observe`, after the verification: the target's hidden states of the tokens that stay.

In an engine a `pdx.speculative.reading.Reader` sees the hidden states of prompts and plain steps too. It has methods of
its own in place of `observe`.

The tokens of a row are `history[b, :held[b]]`; the last one is the newest, and the target's cache holds all the others.
A proposer with a cache of its own drops what was rejected when it is next called.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pdx.cache.dense import DenseCache
from pdx.config import ModelConfig
from pdx.model import forward
from pdx.sampling.filters import random_key
from pdx.speculative.acceptance import DRAFT, Drafted, apart
from pdx.speculative.drawing import Prepared, Rows, decode, decode_tree, tokens_at
from pdx.speculative.trees import Tree


class Proposer(Protocol):
    """Drafts tokens.

    Attributes:
      prior: the acceptance to assume of each confidence class, before anything was seen.
    """

    @property
    def prior(self) -> tuple[float, ...]: ...

    def prepare(self, rows: Rows, state: Any, most: int) -> Prepared:
        """What the rows could draft: up to `most` tokens each."""
        ...

    def draft(
        self, rows: Rows, state: Any, prepared: Prepared, length: int | Tree, cfg: ModelConfig, kernels: Any
    ) -> tuple[Drafted, DenseCache, Any]:
        """Draft `length` tokens a row, or a tree; returns them, the target's cache and the state."""
        ...

    def observe(
        self, rows: Rows, state: Any, hidden: Float[Array, "B T D"], counts: Int[Array, " B"], cfg: ModelConfig, kernels
    ) -> Any:
        """The state after the target's hidden states, from the newest token on; the first `counts` of a row stay."""
        ...


class _Blind:
    """A proposer that does not look at hidden states."""

    def observe(self, rows: Rows, state: Any, hidden, counts, cfg: ModelConfig, kernels: Any) -> Any:
        return state


@dataclass(frozen=True)
class NGram(_Blind):
    """Prompt lookup: the tokens that followed the longest earlier match of the row's last tokens. No model.

    Of equally long matches the latest counts. Where the text ends behind the match, the tokens between the match and
    the end are taken again, as in a repetition. Saxena 2023; the confidence class is the length of the match.

    Attributes:
      longest: the most tokens of a match that are compared.
    """

    longest: int = 8
    # Low: plain steps show for free what a draft would have been worth.
    prior: ClassVar[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

    def prepare(self, rows: Rows, state: Any, most: int) -> Prepared:
        history, held = rows.history, rows.held
        width = history.shape[1]
        at = jnp.arange(width)
        matches, run = jnp.ones(history.shape, bool), jnp.zeros(history.shape, jnp.int32)
        for back in range(self.longest):
            last = tokens_at(history, held - 1 - back)[:, None]
            shifted = jnp.roll(history, back, axis=1)
            matches &= (shifted == last) & (at >= back) & (held > back)[:, None]
            run += matches
        # Only an earlier place, and of equally long matches the latest.
        earlier = (at < held[:, None] - 1) & (run > 0)
        end = jnp.argmax(jnp.where(earlier, run * width + at, -1), axis=1)  # of the match
        found = jnp.any(earlier, axis=1)
        gap = jnp.maximum(held - 1 - end, 1)
        source = end[:, None] + 1 + jnp.arange(most) % gap[:, None]
        tokens = jnp.take_along_axis(history, jnp.minimum(source, width - 1), axis=1)
        length = jnp.take_along_axis(run, end[:, None], axis=1)[:, 0]
        return Prepared(
            jnp.where(found, most, 0), jnp.clip(length, 1, len(self.prior)) - 1, jnp.where(found[:, None], tokens, 0)
        )

    def draft(self, rows: Rows, state: Any, prepared: Prepared, length: Any, cfg: ModelConfig, kernels: Any):
        return Drafted(prepared.tokens[:, :length], prepared.available), rows.cache, state


@dataclass(frozen=True)
class Synthetic(_Blind):
    """Accepts each drafted token with probability `acceptance`, whatever the model says: for benchmarks and plans.

    The verification is a real one and costs what it costs. The answer means nothing.
    """

    acceptance: float

    @property
    def prior(self) -> tuple[float, ...]:
        return (self.acceptance,)

    def prepare(self, rows: Rows, state: Any, most: int) -> Prepared:
        return always_available(rows, most)

    def draft(self, rows: Rows, state: Any, prepared: Prepared, length: Any, cfg: ModelConfig, kernels: Any):
        def chances(*of):
            return jax.random.uniform(random_key(*of), (length,))

        kept = jax.vmap(chances)(apart(rows.sampling.seeds, DRAFT), rows.held) < self.acceptance
        tokens = jnp.broadcast_to(rows.newest[:, None], kept.shape)
        return Drafted(tokens, prepared.available, kept=kept), rows.cache, state


@dataclass(frozen=True)
class SelfDraft(_Blind):
    """The target's first `layers` layers and its own head, over the target's cache of those layers.

    What it writes there, the verification writes again.
    """

    layers: int
    prior: ClassVar[tuple[float, ...]] = (0.6,)

    def prepare(self, rows: Rows, state: Any, most: int) -> Prepared:
        return always_available(rows, most)

    def draft(self, rows: Rows, state: Any, prepared: Prepared, length: int | Tree, cfg: ModelConfig, kernels: Any):
        k, cache = self.layers, rows.cache
        params = rows.params | {"layers": rows.params["layers"][:k]}
        part = dataclasses.replace(cfg, num_layers=k, windows=cfg.windows[:k])
        feed = rows.newest[:, None], rows.active.astype(jnp.int32)
        drafted, first = _drawn(params, part, cache.first_layers(k), feed, rows, prepared, length, kernels)
        return drafted, cache.with_first(first), state


@dataclass(frozen=True)
class DraftModel(_Blind):
    """A smaller model of the same tokens; it may draft only some, `vocabulary` in its parameters.

    Its state is its cache, which holds the prompt when decoding begins.

    Attributes:
      cfg: of the draft model; its parameters are `Rows.draft_params`.
      catch_up: tokens that its cache lacks and that are appended at a time, before it drafts.
    """

    cfg: ModelConfig
    catch_up: int = 16
    prior: ClassVar[tuple[float, ...]] = (0.7,)
    # A round that keeps its whole draft leaves two tokens that the draft's cache lacks.
    BEHIND: ClassVar[int] = 2

    def prepare(self, rows: Rows, state: DenseCache, most: int) -> Prepared:
        return always_available(rows, most)

    def draft(
        self, rows: Rows, state: DenseCache, prepared: Prepared, length: int | Tree, cfg: ModelConfig, kernels: Any
    ):
        # Of a tree the cache keeps nothing, so it lacks all that a round kept.
        behind = length.depth + 1 if isinstance(length, Tree) else self.BEHIND
        cache = self.caught_up(rows, state, kernels, behind)
        feed = self._missing(rows, cache, behind)
        drafted, cache = _drawn(rows.draft_params, self.cfg, cache, feed, rows, prepared, length, kernels)
        return drafted, rows.cache, cache

    def caught_up(self, rows: Rows, state: DenseCache, kernels: Any, behind: int = BEHIND) -> DenseCache:
        """The cache without what was rejected, and with all tokens of the active rows but the last `behind`: a prompt,
        and what rounds without a draft left behind."""

        def catch_up(cache: DenseCache) -> DenseCache:
            tokens, count = self._missing(rows, cache, self.catch_up)
            new = jnp.clip(count - behind, 0, self.catch_up)
            return forward(
                rows.draft_params, self.cfg, tokens, cache, lengths=new, logits="none", kernels=kernels
            ).cache

        kept = state.truncate(jnp.maximum(rows.held - 1, 0))
        return lax.while_loop(lambda cache: jnp.any(self._missing(rows, cache, 1)[1] > behind), catch_up, kept)

    def _missing(self, rows: Rows, cache: DenseCache, width: int):
        """The next tokens that the cache lacks, [B, width], and how many they are, the newest one included."""
        at = cache.lengths[:, None] + jnp.arange(width)
        tokens = jnp.take_along_axis(rows.history, jnp.minimum(at, rows.history.shape[1] - 1), axis=1)
        return tokens, jnp.where(rows.active, rows.held - cache.lengths, 0)


def always_available(rows: Rows, most: int) -> Prepared:
    """Of a proposer that can always draft, and has one confidence class."""
    return Prepared(jnp.full_like(rows.held, most), jnp.zeros_like(rows.held))


def _drawn(params, cfg: ModelConfig, cache, feed, rows: Rows, prepared: Prepared, length: int | Tree, kernels: Any):
    """A chain or a tree from a model's logits: see `drawing.decode` and `decode_tree`."""
    if isinstance(length, Tree):
        return decode_tree(params, cfg, cache, feed, rows, prepared, length, kernels)
    return decode(params, cfg, cache, feed, rows, prepared, length, kernels)
