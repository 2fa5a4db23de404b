"""Which drafted tokens a row keeps, on the device: the answer has the distribution of plain decoding.

Verification scores the newest token and g drafted ones in one pass. `accept` then goes through the positions one after
the other, since penalties depend on the tokens before. Two rules, for two kinds of drafts:

- A draft that was drawn at random comes with the distribution q that it was drawn from. The token x is kept with
  probability min(1, p(x) / q(x)); otherwise one is drawn from max(p - q, 0), normalized. Leviathan et al. 2023 (arXiv
  2211.17192), Chen et al. 2023 (arXiv 2302.01318).
- A draft without a distribution (one found in the text, or a greedy one) was certain: q(x) = 1. Then the rule is the
  same as to sample from p and keep the draft if it is the token sampled. This uses the randomness of plain decoding,
  (seed, position), so the answer has the same tokens as plain decoding, at any temperature.

Behind the last draft that was kept, one more token comes from p, so a round emits at least one token.

A token tree offers several tokens at a place, and `accept_tree` goes down from the newest token. The certain ones are
compared with the token sampled from p. Of random ones, drawn from q without replacement, the rule for one draft is
repeated: where x is rejected, p becomes max(p - q, 0) and q loses x, both normalized, for the next one. What is emitted
still has the distribution p: with these two the next sibling meets the rule for one draft. Miao et al. 2024 (SpecInfer,
arXiv 2305.09781); without replacement: Jeon et al. 2024 (arXiv 2402.14160).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from pdx.sampling.filters import draw, pad, random_key
from pdx.sampling.sampler import NO_TOKEN, SMALLEST, SampleOutput, SamplingState, filtered_logits, logprobs_of, sample
from pdx.speculative.trees import Tree

# Streams of randomness apart from that of plain sampling: the draft's tokens, whether one is kept, what replaces it.
DRAFT, KEEP, REPLACE = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


@struct.dataclass
class Drafted:
    """The tokens that a proposer drafted behind the newest token of each row.

    Attributes:
      tokens: the first `lengths` of a row count. Of a token tree, its nodes 1, 2, ...; -1: a node without a token.
      probabilities: the distribution that each token was drawn from; None: the tokens were certain. Of a token tree,
        the one that the children of each node above the last level were drawn from, the newest token's first.
      kept: for benchmarks only: whether a token is kept, whatever the model says; None: the model decides.
    """

    tokens: Int[Array, "B g"]
    lengths: Int[Array, " B"]
    probabilities: Float[Array, "B g V"] | None = None
    kept: Bool[Array, "B g"] | None = None


@struct.dataclass
class Accepted:
    """What a round emits: the first `counts` of `tokens` in each row. The last of them is not in the cache yet."""

    emitted: SampleOutput  # tokens [B, g + 1], and so on
    counts: Int[Array, " B"]
    sampling: SamplingState


def accept(
    logits: Float[Array, "B T V"] | Float[Array, "W V"],
    drafted: Drafted,
    sampling: SamplingState,
    positions: Int[Array, " B"],
    active: Bool[Array, " B"],
    *,
    at: Int[Array, "B T"] | None = None,
    allowed: Bool[Array, "B T V"] | None = None,
    num_logprobs: int = 0,
) -> Accepted:
    """Go through a verified draft and emit what plain decoding would have emitted.

    Args:
      logits: behind the newest token and each of the g drafted ones, T = g + 1.
      positions: of the first token that the round emits.
      active: rows that take part; the others emit nothing.
      at: of packed logits [W, V]: where those of each row lie.
      allowed: the tokens that may be chosen at each place; None: all.
      num_logprobs: as in `pdx.sampling.sampler.sample`.

    Returns:
      `counts` is the number of drafts that were kept, plus one. A token is -1 (`NO_TOKEN`) where the logits are not
      finite; it is the row's last one.

    Example:
      >>> from pdx.sampling.sampler import SamplingState
      >>> from pdx.speculative.acceptance import Drafted, accept
      >>> logits = jax.nn.one_hot(jnp.array([[7, 3, 9]]), 64)  # greedy: 7, then 3, then 9
      >>> drafted = Drafted(jnp.array([[7, 5]]), jnp.array([2]))
      >>> greedy = SamplingState.create([], 64, batch=1)
      >>> done = accept(logits, drafted, greedy, jnp.array([4]), jnp.array([True]))
      >>> done.counts.tolist(), done.emitted.tokens[0, :2].tolist()
      ([2], [7, 3])
    """
    b, t = logits.shape[:2] if at is None else at.shape

    def logits_of(i):
        return logits[:, i] if at is None else logits[at[:, i]]

    rows = jax.eval_shape(lambda: sample(logits_of(0), sampling, positions, num_logprobs=num_logprobs))
    rows = jax.tree.map(lambda x: jnp.zeros((b, t, *x.shape[1:]), x.dtype), rows)

    def one(carry):
        i, going, counts, sampling, rows = carry
        here, may = logits_of(i), None if allowed is None else allowed[:, i]
        drawn = sample(here, sampling, positions + i, num_logprobs=num_logprobs, allowed=may, mark_broken=True)
        kept = jnp.zeros(b, bool)
        if t > 1:  # a plain step has no draft
            at = jnp.minimum(i, t - 2)
            token, has_draft = drafted.tokens[:, at], going & (i < drafted.lengths)
            if drafted.probabilities is not None:
                q = drafted.probabilities[:, at]
                offered = jnp.where(has_draft, token, NO_TOKEN)[:, None]
                drawn = _replaced(drawn, here, may, offered, q, sampling, positions + i, num_logprobs)
            kept = has_draft & (drawn.tokens == token)
            if drafted.kept is not None:
                kept = has_draft & drafted.kept[:, at]
                drawn = drawn.replace(tokens=jnp.where(kept, token, drawn.tokens))
        sampling = sampling.observe(drawn.tokens, going)
        rows = jax.tree.map(lambda every, new: lax.dynamic_update_index_in_dim(every, new, i, 1), rows, drawn)
        return i + 1, kept, counts + going, sampling, rows

    def goes_on(carry):
        return (carry[0] < t) & jnp.any(carry[1])

    start = (jnp.int32(0), active, jnp.zeros(b, jnp.int32), sampling, rows)
    # A loop would copy the logits, which a plain step needs no loop for.
    _, _, counts, sampling, rows = one(start) if t == 1 else lax.while_loop(goes_on, one, start)
    return Accepted(rows, counts, sampling)


def accept_tree(
    logits: Float[Array, "B N V"],
    drafted: Drafted,
    tree: Tree,
    sampling: SamplingState,
    positions: Int[Array, " B"],
    active: Bool[Array, " B"],
    *,
    num_logprobs: int = 0,
) -> tuple[Accepted, Int[Array, "B M"]]:
    """Go down a verified token tree and emit what plain decoding would have emitted.

    Args:
      logits: behind each of the N nodes.
      positions, active, num_logprobs: as in `accept`.

    Returns:
      What `accept` returns, and the nodes whose tokens stay, the first `counts` of M = depth + 1: the newest token,
      then the drafts that were kept.

    Example: behind the newest token 7 or 3 may come, and 5 behind 3.
      >>> from pdx.sampling.sampler import SamplingState
      >>> from pdx.speculative.acceptance import Drafted, accept_tree
      >>> from pdx.speculative.trees import Tree
      >>> logits = jax.nn.one_hot(jnp.array([[3, 0, 5, 9]]), 64)  # greedy: 3, behind it 5, behind that 9
      >>> drafted = Drafted(jnp.array([[7, 3, 5]]), jnp.array([3]))
      >>> greedy = SamplingState.create([], 64, batch=1)
      >>> done, path = accept_tree(logits, drafted, Tree((0, 0, 2)), greedy, jnp.array([4]), jnp.array([True]))
      >>> done.emitted.tokens.tolist(), path.tolist()
      ([[3, 5, 9]], [[0, 2, 3]])
    """
    b, most = logits.shape[0], max(map(len, tree.children))
    children = jnp.array([[*nodes, *[0] * (most - len(nodes))] for nodes in tree.children])
    row = jnp.arange(b)
    every = jax.eval_shape(lambda: sample(logits[:, 0], sampling, positions, num_logprobs=num_logprobs))
    every = jax.tree.map(lambda x: jnp.zeros((b, tree.depth + 1, *x.shape[1:]), x.dtype), every)

    def one(carry):
        i, going, node, counts, sampling, every, path = carry
        here = logits[row, node]
        drawn = sample(here, sampling, positions + i, num_logprobs=num_logprobs, mark_broken=True)
        nodes = children[node]
        offers = going[:, None] & (nodes > 0) & (nodes <= drafted.lengths[:, None])
        offered = jnp.where(offers, drafted.tokens[row[:, None], nodes - 1], NO_TOKEN)
        if drafted.probabilities is not None:
            q = drafted.probabilities[row, jnp.minimum(node, drafted.probabilities.shape[1] - 1)]
            drawn = _replaced(drawn, here, None, offered, q, sampling, positions + i, num_logprobs)
        is_kept = (offered >= 0) & (offered == drawn.tokens[:, None])
        sampling = sampling.observe(drawn.tokens, going)
        every = jax.tree.map(lambda x, new: lax.dynamic_update_index_in_dim(x, new, i, 1), every, drawn)
        path = lax.dynamic_update_index_in_dim(path, node, i, 1)
        node = jnp.where(is_kept.any(1), nodes[row, is_kept.argmax(1)], node)
        return i + 1, is_kept.any(1), node, counts + going, sampling, every, path

    def goes_on(carry):
        return (carry[0] <= tree.depth) & jnp.any(carry[1])

    none = jnp.zeros(b, jnp.int32)
    start = (jnp.int32(0), active, none, none, sampling, every, jnp.zeros((b, tree.depth + 1), jnp.int32))
    _, _, _, counts, sampling, every, path = lax.while_loop(goes_on, one, start)
    return Accepted(every, counts, sampling), path


def apart(seeds: UInt[Array, "B 2"], stream: int) -> UInt[Array, "B 2"]:
    """Seeds of another stream of randomness."""
    return seeds ^ jnp.uint32(stream)


def _replaced(
    drawn: SampleOutput,
    logits,
    allowed,
    offered: Int[Array, "B K"],
    q,
    sampling: SamplingState,
    positions,
    num_logprobs,
):
    """The tokens by the rule for random drafts, in rows that have drafts and are not greedy; logits that are not
    finite keep their mark. `offered`: the drafts at this place; -1: none."""
    by_rule = jnp.any(offered >= 0, axis=1) & (sampling.temperature > 0) & (drawn.tokens >= 0)

    def choose():
        masked = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
        tokens = jnp.where(by_rule, _by_rejection(masked, offered, q, sampling, positions), drawn.tokens)
        logprobs = logprobs_of(logits.astype(jnp.float32), tokens, sampling.logprobs, num_logprobs)
        return SampleOutput(tokens, *logprobs)

    return lax.cond(jnp.any(by_rule), choose, lambda: drawn)


def _by_rejection(logits, offered: Int[Array, "B K"], q, sampling: SamplingState, positions) -> Int[Array, " B"]:
    """The first of the drafts that is kept, or the token that replaces them all."""
    p = jax.nn.softmax(filtered_logits(logits, sampling), axis=-1)
    chosen = jnp.full(offered.shape[0], NO_TOKEN)
    for i in range(offered.shape[1]):
        token, is_offered = offered[:, i], offered[:, i] >= 0
        if i:  # what the draft before has left
            p, q = (x / jnp.maximum(x.sum(-1, keepdims=True), SMALLEST) for x in (p, q))
        u = jax.vmap(lambda *of: jax.random.uniform(random_key(*of)))(apart(sampling.seeds, KEEP + i), positions)
        p_token, q_token = (jnp.take_along_axis(x, jnp.maximum(token, 0)[:, None], axis=1)[:, 0] for x in (p, q))
        chosen = jnp.where((chosen < 0) & is_offered & (u * q_token < p_token), token, chosen)
        rest = jnp.maximum(p - q, 0)
        # Where p and q are equal nothing is left, and nothing is rejected but by a rounding error.
        rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)
        p = jnp.where(is_offered[:, None], rest, p)
        q = jnp.where(jnp.arange(q.shape[1]) == token[:, None], 0.0, q)
    replaced = draw(pad(p, 0.0), apart(sampling.seeds, REPLACE), positions)
    return jnp.where(chosen >= 0, chosen, replaced).astype(jnp.int32)
