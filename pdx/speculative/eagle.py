"""An EAGLE head: one layer on the target's hidden states that predicts the next one, and so the next token.

At position t it takes the embedding of token t + 1 and the target's hidden state of token t (behind the last norm),
and predicts the hidden state of token t + 1. A small vocabulary of its own turns that into a draft. Li et al. 2024
(arXiv 2401.15077); the small vocabulary: Zhao et al. 2025 (arXiv 2502.14856).

The first draft of a round comes from the target's own hidden states, the others from predicted ones. Entry i of the
head's cache stands for token i + 1 and hidden state i. Entries that were made from predicted hidden states are dropped
at the end of a round: the target's own take their place.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from pdx.cache.dense import DenseCache
from pdx.cache.paged import PagedCache
from pdx.cache.rows import PackedRows, TokenRows
from pdx.config import ModelConfig
from pdx.layers.kernels import Kernels
from pdx.layers.linear import embed, linear, unembed
from pdx.layers.rope import rotation
from pdx.meshes import ANY_DEVICES, Devices
from pdx.model import Params, forward, layer, param_specs
from pdx.sharding import ArraySpec, constrain_rows, place_rows
from pdx.speculative.acceptance import DRAFT, Drafted, apart
from pdx.speculative.drawing import Prepared, Rows, drafted_nodes, draw_draft, grow, over_all_tokens
from pdx.speculative.proposers import always_available
from pdx.speculative.trees import LONGEST_DRAFT, Tree, depth_of
from pdx.steps.dense import finish

# Hidden states that are taken at once where more of them wait than a draft needs.
CATCH_UP = 16


def head_config(target: ModelConfig) -> ModelConfig:
    """The shape of the head's layer: one of the target's, which sees everything."""
    return dataclasses.replace(target, num_layers=1, windows=(None,))


def head_specs(cfg: ModelConfig, vocabulary: int, dtype=jnp.float32) -> Params:
    """Declare a head's parameters; `vocabulary`: how many tokens it can draft."""
    d = cfg.d_model
    return {
        "fc": ArraySpec((d, 2 * d), (None, None), dtype, part="projections"),
        "layers": param_specs(head_config(cfg), dtype)["layers"],
        "lm_head": ArraySpec((vocabulary, d), (None, None), dtype, part="head"),
        "vocabulary": ArraySpec((vocabulary,), (None,), jnp.int32),
    }


def predict(
    head: Params,
    cfg: ModelConfig,
    embedded: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    rows: TokenRows | PackedRows,
    cache: DenseCache | PagedCache | None = None,
    *,
    kernels: Kernels = "auto",
) -> tuple[Float[Array, "B T D"], Any]:
    """The hidden states that follow, and the cache with these entries.

    Args:
      cfg: as `head_config`.
      embedded: the embedding of each entry's token, the one behind `hidden`.
      rows: of the cache; without one, the entries attend to each other, and the result can be differentiated.
      cache: of the head's one layer, dense or paged.
    """
    mesh: Devices = ANY_DEVICES if cache is None else cache.mesh
    x = linear(jnp.concatenate([embedded, hidden.astype(embedded.dtype)], axis=-1), head["fc"])
    x, own = layer(
        head["layers"][0],
        x,
        None if cache is None else cache.layers[0],
        rows if cache is None else cache.layer_rows(cast(Any, rows))[0],
        rotation(cfg.rope, cfg.head_dim, rows.positions),
        cfg=cfg,
        window=None,
        mesh=mesh,
        kernels=kernels,
    )
    return x, None if cache is None else cache.advance(cast(Any, rows), (own,))


def own_logits(head: Params, cfg: ModelConfig, hidden: Float[Array, "*b D"]) -> Float[Array, "*b v"]:
    """Logits over the head's own vocabulary, in f32."""
    return unembed(hidden, head["lm_head"], cfg.logit_softcap)


@struct.dataclass
class EagleState:
    """What the head remembers.

    Attributes:
      cache: one entry for each token but the first, as far as they were taken.
      hidden: the target's hidden states that wait: row b's entry `cache.lengths[b] + j` needs `hidden[b, j]`.
    """

    cache: DenseCache
    hidden: Float[Array, "B W D"]

    @classmethod
    def create(cls, cache: DenseCache, width: int, dtype) -> EagleState:
        """Behind nothing. `width`: of a hidden state."""
        hidden = jnp.zeros((cache.batch, CATCH_UP + LONGEST_DRAFT + 1, width), dtype)
        return cls(cache, place_rows(hidden, cache.mesh))

    def holding(self, tokens: int) -> EagleState:
        """The state as if the target's rows held `tokens` tokens, whatever lies in it: to measure what a step costs."""
        return self.replace(cache=self.cache.holding(tokens - 1))

    def placed(self) -> EagleState:
        """The state constrained to its placement on the mesh."""
        return EagleState(self.cache.placed(), constrain_rows(self.hidden, self.cache.mesh))


@dataclass(frozen=True)
class Eagle:
    """Drafts with an EAGLE head; `Rows.draft_params` are its parameters, its state is an `EagleState`.

    Attributes:
      cfg: as `head_config`.
    """

    cfg: ModelConfig
    prior: ClassVar[tuple[float, ...]] = (0.6,)

    def prepare(self, rows: Rows, state: EagleState, most: int) -> Prepared:
        return always_available(rows, most)

    def draft(
        self, rows: Rows, state: EagleState, prepared: Prepared, length: int | Tree, cfg: ModelConfig, kernels: Any
    ):
        # A round before this one leaves up to one hidden state more than it can keep; more only if it was longer, or a
        # plain one.
        width = depth_of(length) + 1
        state = self._caught_up(rows, state, cfg, kernels, width)
        tokens, waiting = self._waiting(rows, state, width)
        new = state.cache.rows(waiting, *tokens.shape)
        x, cache = self._predict(rows, tokens, state.hidden[:, :width], state.cache, new, cfg, kernels)
        last = jnp.take_along_axis(x, jnp.maximum(waiting - 1, 0)[:, None, None], axis=1)
        draw = self._tree if isinstance(length, Tree) else self._chain
        drafted, after = draw(rows, prepared, length, last, cache, cfg, kernels)
        return drafted, rows.cache, state.replace(cache=after.truncate(cache.lengths))

    def _chain(self, rows: Rows, prepared: Prepared, length: int, last, cache: DenseCache, cfg: ModelConfig, kernels):
        """`length` tokens behind the predicted hidden state `last` [B, 1, D]."""
        sampling = rows.sampling.replace(seeds=apart(rows.sampling.seeds, DRAFT))

        def drawn(hidden, sampling, i):
            logits = self._logits(rows.draft_params, hidden[:, 0])
            token, probabilities = draw_draft(logits, sampling, rows.held + i)
            return token, probabilities, sampling.observe(token, rows.active)

        def step(carry, i):
            cache, hidden, token, sampling = carry
            new = cache.rows(rows.active.astype(jnp.int32), cache.batch, 1)
            hidden, cache = self._predict(rows, token[:, None], hidden, cache, new, cfg, kernels)
            token, probabilities, sampling = drawn(hidden, sampling, i)
            return (cache, hidden, token, sampling), (token, probabilities)

        first, q, sampling = drawn(last, sampling, 0)
        (cache, *_), (others, more) = lax.scan(step, (cache, last, first, sampling), jnp.arange(1, length))
        tokens = jnp.concatenate([first[:, None], others.T], axis=1)
        q = jnp.concatenate([q[:, None], more.swapaxes(0, 1)], axis=1)
        return Drafted(tokens, prepared.available, q), cache

    def _tree(self, rows: Rows, prepared: Prepared, tree: Tree, last, cache: DenseCache, cfg: ModelConfig, kernels):
        """A tree behind the predicted hidden state `last` [B, 1, D]."""

        def logits_behind(state, depth: int, tokens: Int[Array, "B m"]):
            cache, predicted = state  # `predicted`: behind the newest token, then behind each drafted one
            if depth:
                parents = jnp.array(tree.parents[: tokens.shape[1]])
                nodes = drafted_nodes(tree, cache, rows, tokens.shape[1])
                x, after = self._predict(rows, tokens, predicted[:, parents], cache, nodes, cfg, kernels)
                cache, predicted = after.truncate(cache.lengths), jnp.concatenate([last, x], axis=1)
            level = predicted[:, -len(tree.levels[depth]) :]
            return self._logits(rows.draft_params, level), (cache, predicted)

        drafted, (cache, _) = grow(tree, rows, prepared.available, (cache, last), logits_behind)
        return drafted, cache

    def observe(self, rows: Rows, state: EagleState, hidden, counts: Int[Array, " B"], cfg: ModelConfig, kernels: Any):
        state = self._caught_up(rows, state, cfg, kernels, CATCH_UP)
        at = (rows.held - 1 - state.cache.lengths)[:, None] + jnp.arange(hidden.shape[1])
        at = jnp.where(jnp.arange(hidden.shape[1]) < counts[:, None], at, state.hidden.shape[1])
        batch = jnp.arange(hidden.shape[0])[:, None]
        return state.replace(hidden=state.hidden.at[batch, at].set(hidden.astype(state.hidden.dtype), mode="drop"))

    def _waiting(self, rows: Rows, state: EagleState, width: int):
        """The next tokens that the head's cache lacks, [B, width], and how many there are."""
        at = state.cache.lengths[:, None] + 1 + jnp.arange(width)
        tokens = jnp.take_along_axis(rows.history, jnp.minimum(at, rows.history.shape[1] - 1), axis=1)
        return tokens, jnp.where(rows.active, rows.held - 1 - state.cache.lengths, 0)

    def _caught_up(self, rows: Rows, state: EagleState, cfg: ModelConfig, kernels: Any, most: int) -> EagleState:
        """The state where at most `most` hidden states wait, and one at least."""

        def take(state: EagleState) -> EagleState:
            tokens, waiting = self._waiting(rows, state, CATCH_UP)
            new = jnp.clip(waiting - 1, 0, CATCH_UP)
            entries = state.cache.rows(new, *tokens.shape)
            _, cache = self._predict(rows, tokens, state.hidden[:, :CATCH_UP], state.cache, entries, cfg, kernels)
            at = new[:, None] + jnp.arange(state.hidden.shape[1])
            at = jnp.minimum(at, state.hidden.shape[1] - 1)[..., None]
            return EagleState(cache, jnp.take_along_axis(state.hidden, at, axis=1))

        return lax.while_loop(lambda s: jnp.any(self._waiting(rows, s, 1)[1] > most), take, state)

    def _predict(
        self, rows: Rows, tokens, hidden, cache: DenseCache, entries: TokenRows, cfg: ModelConfig, kernels: Any
    ):
        embedded = embed(rows.params["embed"], tokens, cfg.embed_scale, cache.mesh)
        return predict(rows.draft_params, self.cfg, embedded, hidden, entries, cache, kernels=kernels)

    def _logits(self, head: Params, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        return over_all_tokens(own_logits(head, self.cfg, hidden), head["vocabulary"], self.cfg.vocab_size)


def prefill_with_head(params, head, tokens, following, lengths, taken, cache, state: EagleState, *, cfg, kernels):
    """A chunk of prompts through the target and the head.

    Args:
      tokens, following: [B, T], the chunk, and the token behind each.
      lengths, taken: [B], tokens of the chunk, and those whose following token is known: one less where a prompt ends.

    Returns:
      Logits of each row's last token, the target's cache and the state, in which the last hidden state waits.
    """
    out = forward(params, cfg, tokens, cache, lengths=lengths, logits="last", kernels=kernels)
    embedded = embed(params["embed"], following, cfg.embed_scale, cache.mesh)
    entries = state.cache.rows(taken, *tokens.shape)
    _, own = predict(head, head_config(cfg), embedded, out.final_hidden, entries, state.cache, kernels=kernels)
    last = jnp.take_along_axis(out.final_hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    ends = (lengths > taken)[:, None]
    hidden = state.hidden.at[:, 0].set(jnp.where(ends, last.astype(state.hidden.dtype), state.hidden[:, 0]))
    return *finish(out.logits, out.cache), EagleState(own, hidden).placed()


PREFILL = jax.jit(prefill_with_head, static_argnames=("cfg", "kernels"), donate_argnames=("cache", "state"))
