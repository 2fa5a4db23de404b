"""Drafts that are drawn from a small model's logits, token by token: chains, and trees level by level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pdx.cache.dense import DenseCache
from pdx.cache.rows import TokenRows
from pdx.config import ModelConfig
from pdx.layers.linear import unembed
from pdx.model import Params, forward
from pdx.sampling.filters import best, draw, pad
from pdx.sampling.sampler import NO_TOKEN, SamplingState, filtered_logits
from pdx.speculative.acceptance import DRAFT, Drafted, apart
from pdx.speculative.trees import Tree

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


def tokens_at(history: Int[Array, "B S"], at: Int[Array, " B"]) -> Int[Array, " B"]:
    """The token of each row at a position; outside of the row, the nearest one."""
    return jnp.take_along_axis(history, jnp.clip(at, 0, history.shape[1] - 1)[:, None], axis=1)[:, 0]


def decode(
    params: Params, cfg: ModelConfig, cache: DenseCache, feed, rows: Rows, prepared: Prepared, length: int, kernels: Any
) -> tuple[Drafted, DenseCache]:
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
    logits: Float[Array, "*b v"], vocabulary: Int[Array, " v"] | None, count: int
) -> Float[Array, "*b V"]:
    """Logits over all `count` tokens of a model that can only draft those of `vocabulary`; None: it can draft all."""
    if vocabulary is None:
        return logits
    return jnp.full((*logits.shape[:-1], count), OUTSIDE, jnp.float32).at[..., vocabulary].set(logits)


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


def grow(
    tree: Tree, rows: Rows, available: Int[Array, " B"], state: Any, logits_behind: Callable
) -> tuple[Drafted, Any]:
    """Draft a tree level by level. Returns it, and the last state.

    Args:
      available: tokens that each row may keep; deeper nodes are not counted in `lengths`.
      logits_behind: of a state, a depth, and the tokens [B, m] of nodes 1 to m, all nodes up to there: the logits
        [B, w, V] behind each node of that depth, and the next state.
    """
    tokens, found = jnp.zeros((rows.held.shape[0], 0), jnp.int32), []
    for depth in range(tree.depth):
        logits, state = logits_behind(state, depth, tokens)
        drawn, q = _children(tree, depth, logits, rows, tokens)
        tokens = jnp.concatenate([tokens, drawn], axis=1)
        found.append(q)
    drafted_within = np.searchsorted(tree.depths, np.arange(tree.depth + 1), side="right") - 1
    lengths = jnp.asarray(drafted_within, jnp.int32)[jnp.minimum(available, tree.depth)]
    lengths = jnp.minimum(lengths, rows.cache.capacity - rows.held)  # each node takes a slot of the target's cache
    return Drafted(tokens, lengths, jnp.concatenate(found, axis=1)), state


def decode_tree(
    params: Params, cfg: ModelConfig, cache: DenseCache, feed, rows: Rows, prepared: Prepared, tree: Tree, kernels: Any
) -> tuple[Drafted, DenseCache]:
    """As `decode`, but the draft is a tree, and the cache then holds `feed` and nothing of the draft."""
    head, vocab = params.get("lm_head", params["embed"]), rows.sampling.output_counts.shape[1]

    def logits_behind(cache: DenseCache, depth: int, tokens: Int[Array, "B m"]):
        if depth == 0:
            logits, cache = append(cache, params, cfg, *feed, kernels)
            return over_all_tokens(logits[:, None], params.get("vocabulary"), vocab), cache
        nodes = drafted_nodes(tree, cache, rows, tokens.shape[1])
        out = forward(params, cfg, tokens, cache, rows=nodes, logits="none", kernels=kernels)
        logits = unembed(out.final_hidden[:, -len(tree.levels[depth]) :], head, cfg.logit_softcap, cache.mesh)
        return over_all_tokens(logits, params.get("vocabulary"), vocab), out.cache.truncate(cache.lengths)

    return grow(tree, rows, prepared.available, cache, logits_behind)


def drafted_nodes(tree: Tree, cache: DenseCache, rows: Rows, count: int) -> TokenRows:
    """The first `count` drafted nodes as tokens of one call, behind a cache that holds the newest token.

    Attention masks only the tokens of one call, so each level of a tree appends the levels above it again. These are
    few tokens, and a level reads the weights once in any case.
    """
    new = jnp.where(rows.active, jnp.clip(cache.capacity - cache.lengths, 0, count), 0)
    return cache.rows(new, cache.batch, count).as_tree(np.array(tree.mask)[1 : count + 1, 1 : count + 1])


def _children(tree: Tree, depth: int, logits: Float[Array, "B w V"], rows: Rows, tokens: Int[Array, "B m"]):
    """The children of the nodes of a depth, [B, n], and the distribution [B, w, V] that those of each were drawn from.

    The children of a node are drawn one after the other without replacement; those of a greedy row are its best tokens.
    A node with fewer tokens than children gets -1 for the others.
    """
    b, w, vocab = logits.shape
    nodes, greedy = tree.levels[depth], jnp.repeat(rows.sampling.temperature <= 0, w)
    # Filters would leave a greedy row one token: here it takes the best of all.
    state = _of_nodes(tree, nodes, rows, tokens)
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    state = state.replace(**{name: jnp.where(greedy, x, getattr(state, name)) for name, x in plain.items()})
    q = jax.nn.softmax(filtered_logits(logits.reshape(b * w, vocab), state), axis=-1)
    positions, left, drawn = jnp.repeat(rows.held + depth, w), q, []
    for i in range(max(len(tree.children[node]) for node in nodes)):

        def random(left=left, i=i):
            seeds = apart(state.seeds, DRAFT + i)
            return jnp.where(greedy, best(pad(left, 0.0))[1], draw(pad(left, 0.0), seeds, positions))

        token = lax.cond(jnp.all(greedy), lambda left=left: best(pad(left, 0.0))[1], random)
        token = jnp.where(left.sum(-1) > 0, token, NO_TOKEN).astype(jnp.int32)
        left = jnp.where(jnp.arange(vocab) == token[:, None], 0.0, left)
        drawn.append(token.reshape(b, w))
    columns = [drawn[i][:, at] for at, node in enumerate(nodes) for i in range(len(tree.children[node]))]
    return jnp.stack(columns, axis=1), q.reshape(b, w, vocab)


def _of_nodes(tree: Tree, nodes: tuple[int, ...], rows: Rows, tokens: Int[Array, "B m"]) -> SamplingState:
    """The sampling state of each row at each of these nodes, [B * w]: penalties count the tokens on the way to it."""
    state = jax.tree.map(lambda x: jnp.repeat(x, len(nodes), axis=0), rows.sampling)
    active = jnp.repeat(rows.active, len(nodes))
    for step in range(1, tree.depths[nodes[0]] + 1):
        on_the_way = np.array([tree.path(node)[step] for node in nodes])
        state = state.observe(tokens[:, on_the_way - 1].reshape(-1), active)
    return state
