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
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pdx.cache.dense import DenseCache
from pdx.config import ModelConfig
from pdx.model import Params, forward
from pdx.sampling.filters import best, draw, pad, random_key
from pdx.sampling.sampler import SamplingState, filtered_logits
from pdx.speculative.acceptance import DRAFT, Drafted, apart

# The logit of a token that a model cannot draft. Finite: where a bias bans all others there still is a distribution.
OUTSIDE = -1e30


@struct.dataclass
class Rows:
    """What a proposer sees of the rows.

    Attributes:
      history: the tokens of each row, prompt and answer.
      held: how many they are.
      cache: the target's, which holds all tokens but the newest: dense, or the pages of an engine's slots.
      params, draft_params: of the target, and of the draft model if there is one.
      steps: the longest draft that a row needs in this round; None: the round's length.
    """

    history: Int[Array, "B S"]
    held: Int[Array, " B"]
    active: Bool[Array, " B"]
    cache: DenseCache | Any
    sampling: SamplingState
    params: Params
    draft_params: Params | None = None
    steps: Int[Array, ""] | None = None

    @property
    def newest(self) -> Int[Array, " B"]:
        return tokens_at(self.history, self.held - 1)


@struct.dataclass
class Prepared:
    """What a proposer could draft: `available` tokens a row, of which confidence class; `tokens` where it knows them
    already."""

    available: Int[Array, " B"]
    confidence: Int[Array, " B"]
    tokens: Int[Array, "B g"] | None = None


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
        self, rows: Rows, state: Any, prepared: Prepared, length: int, cfg: ModelConfig, kernels: Any
    ) -> tuple[Drafted, DenseCache, Any]:
        """Draft `length` tokens a row; returns them, the target's cache and the state."""
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
    # Low for short matches: plain steps show for free what a draft would have been worth.
    prior: ClassVar[tuple[float, ...]] = (0.02, 0.1, 0.25, 0.4, 0.55, 0.65, 0.75, 0.8)

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

    def draft(self, rows: Rows, state: Any, prepared: Prepared, length: int, cfg: ModelConfig, kernels: Any):
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

    def draft(self, rows: Rows, state: Any, prepared: Prepared, length: int, cfg: ModelConfig, kernels: Any):
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

    def draft(self, rows: Rows, state: Any, prepared: Prepared, length: int, cfg: ModelConfig, kernels: Any):
        k, cache = self.layers, rows.cache
        params = rows.params | {"layers": rows.params["layers"][:k]}
        part = dataclasses.replace(cfg, num_layers=k, windows=cfg.windows[:k])
        feed = rows.newest[:, None], rows.active.astype(jnp.int32)
        drafted, first = draft_tokens(params, part, cache.first_layers(k), feed, rows, prepared, length, kernels)
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

    def draft(self, rows: Rows, state: DenseCache, prepared: Prepared, length: int, cfg: ModelConfig, kernels: Any):
        cache = self.caught_up(rows, state, kernels)
        feed = self._missing(rows, cache, self.BEHIND)
        drafted, cache = draft_tokens(rows.draft_params, self.cfg, cache, feed, rows, prepared, length, kernels)
        return drafted, rows.cache, cache

    def caught_up(self, rows: Rows, state: DenseCache, kernels: Any) -> DenseCache:
        """The cache without what was rejected, and with all tokens of the active rows but the last `BEHIND`: a prompt,
        and what rounds without a draft left behind."""

        def catch_up(cache: DenseCache) -> DenseCache:
            tokens, count = self._missing(rows, cache, self.catch_up)
            new = jnp.clip(count - self.BEHIND, 0, self.catch_up)
            return forward(
                rows.draft_params, self.cfg, tokens, cache, lengths=new, logits="none", kernels=kernels
            ).cache

        kept = state.truncate(jnp.maximum(rows.held - 1, 0))
        return lax.while_loop(lambda cache: jnp.any(self._missing(rows, cache, 1)[1] > self.BEHIND), catch_up, kept)

    def _missing(self, rows: Rows, cache: DenseCache, width: int):
        """The next tokens that the cache lacks, [B, width], and how many they are, the newest one included."""
        at = cache.lengths[:, None] + jnp.arange(width)
        tokens = jnp.take_along_axis(rows.history, jnp.minimum(at, rows.history.shape[1] - 1), axis=1)
        return tokens, jnp.where(rows.active, rows.held - cache.lengths, 0)


def always_available(rows: Rows, most: int) -> Prepared:
    """Of a proposer that can always draft, and has one confidence class."""
    return Prepared(jnp.full_like(rows.held, most), jnp.zeros_like(rows.held))


def tokens_at(history: Int[Array, "B S"], at: Int[Array, " B"]) -> Int[Array, " B"]:
    """The token of each row at a position; outside of the row, the nearest one."""
    return jnp.take_along_axis(history, jnp.clip(at, 0, history.shape[1] - 1)[:, None], axis=1)[:, 0]


def draft_tokens(params: Params, cfg: ModelConfig, cache: Any, feed, rows: Rows, prepared, length: int, kernels):
    """Draft `length` tokens. Returns them, and the cache, which then holds all but the last of them.

    `feed`: tokens [B, w] to append first, and how many of them are real, [B]. Tokens are drawn by the target's settings
    and penalties, with other randomness.
    """
    width, vocab = feed[0].shape[1], rows.sampling.output_counts.shape[1]
    sampling = rows.sampling.replace(seeds=apart(rows.sampling.seeds, DRAFT))
    batch = rows.held.shape[0]
    found = jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, length, vocab))

    def step(i, carry):
        cache, sampling, (tokens, lengths), (drafted, probabilities) = carry
        logits, cache = append(cache, params, cfg, tokens, lengths, kernels)
        logits = over_all_tokens(logits, params.get("vocabulary"), vocab)
        drawn, q = draw_draft(logits, sampling, rows.held + i)
        # A row that needs no more tokens appends none: an engine has no page for them.
        more = rows.active & (i + 1 < prepared.available)
        feed = jnp.pad(drawn[:, None], ((0, 0), (0, width - 1))), more.astype(jnp.int32)
        found = drafted.at[:, i].set(drawn), probabilities.at[:, i].set(q)
        return cache, sampling.observe(drawn, rows.active), feed, found

    steps = length if rows.steps is None else jnp.minimum(rows.steps, length)
    cache, _, _, found = lax.fori_loop(0, steps, step, (cache, sampling, feed, found))
    return Drafted(found[0], jnp.minimum(prepared.available, steps), found[1]), cache


def append(cache: Any, params: Params, cfg: ModelConfig, tokens: Int[Array, "B w"], lengths: Int[Array, " B"], kernels):
    """Append tokens; returns the logits behind the last one of each row, and the cache, dense or of an engine."""
    if not isinstance(cache, DenseCache):
        return cache.append(params, cfg, tokens, lengths, kernels)
    out = forward(params, cfg, tokens, cache, lengths=lengths, logits="last", kernels=kernels)
    return out.logits, out.cache


def over_all_tokens(
    logits: Float[Array, "B v"], vocabulary: Int[Array, " v"] | None, count: int
) -> Float[Array, "B V"]:
    """Logits over all `count` tokens of a model that can only draft those of `vocabulary`; None: it can draft all."""
    if vocabulary is None:
        return logits
    return jnp.full((logits.shape[0], count), OUTSIDE, jnp.float32).at[:, vocabulary].set(logits)


def draw_draft(
    logits: Float[Array, "B V"], sampling: SamplingState, positions: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
    """A token of each row, of a greedy row the one token that is left, and the distribution that it was drawn from."""
    kept = filtered_logits(logits, sampling)
    probabilities = jax.nn.softmax(kept, axis=-1)
    top = best(pad(kept))[1]
    is_drawn = sampling.temperature > 0

    def drawn():
        return jnp.where(is_drawn, draw(pad(probabilities, 0.0), sampling.seeds, positions), top)

    tokens = lax.cond(jnp.any(is_drawn), drawn, lambda: top)
    return jnp.minimum(tokens, kept.shape[1] - 1).astype(jnp.int32), probabilities
