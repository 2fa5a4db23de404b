"""The acceptance rule for token trees: what a round emits has the distribution of plain sampling."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from pdx.sampling.sampler import SamplingOptions, SamplingState, filtered_logits
from pdx.speculative.acceptance import Drafted, accept_tree
from pdx.speculative.drawing import Rows, grow
from pdx.speculative.trees import Tree

UNLIKELY = 1e-5  # a statistic that a right rule exceeds once in a hundred thousand runs; the seeds are fixed
VOCAB, ROWS = 6, 4000
OFFERS = Tree.of((3, 2))


def distribution(seed, *shape):
    return 1.2 * jax.random.normal(jax.random.key(seed), (*shape, VOCAB))


FIRST, NEXT = distribution(1), distribution(2, VOCAB)  # logits of the target: at first, and behind each token
DRAFT_FIRST, DRAFT_NEXT = distribution(3), distribution(4, VOCAB)
SETTINGS = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "top-k": {"temperature": 1.0, "top_k": 4},
    "top-p": {"temperature": 1.2, "top_p": 0.8},
    "bias": {"temperature": 1.0, "logit_bias": {3: 2.0, 5: -100.0}},
    "penalty": {"temperature": 1.0, "presence_penalty": 1.5},
}
FEW, GREEDILY = {"temperature": 1.0, "top_k": 2}, {"temperature": 0.0}


def drafted_from(sampling, tree):
    held, active = jnp.full(ROWS, 7), jnp.ones(ROWS, bool)
    rows = Rows(None, held, active, SimpleNamespace(capacity=128), sampling, None)

    def logits_behind(state, depth, tokens):
        if depth == 0:
            return jnp.broadcast_to(DRAFT_FIRST, (ROWS, 1, VOCAB)), state
        return DRAFT_NEXT[tokens[:, -len(tree.levels[depth]) :]], state

    return grow(tree, rows, jnp.full(ROWS, tree.depth), None, logits_behind)[0]


@cache
def accepted(name, tree=OFFERS):
    """The tokens of ROWS rows of one round, [ROWS, depth + 1], how many they are, and the drafts."""
    settings = (SETTINGS | {"few": FEW, "greedy": GREEDILY})[name]
    sampling = SamplingState.create([SamplingOptions(seed=i, **settings) for i in range(ROWS)], VOCAB)
    drafted = jax.jit(drafted_from, static_argnums=1)(sampling, tree)
    logits = jnp.concatenate([jnp.broadcast_to(FIRST, (ROWS, 1, VOCAB)), NEXT[drafted.tokens]], axis=1)
    done, path = jax.jit(accept_tree, static_argnums=2)(
        logits, drafted, tree, sampling, jnp.full(ROWS, 7), jnp.ones(ROWS, bool)
    )
    return np.asarray(done.emitted.tokens), np.asarray(done.counts), drafted, np.asarray(path)


def plain_distribution(logits, settings, seen=()):
    state = SamplingState.create([SamplingOptions(seed=0, **settings)], VOCAB, prompts=[[]], outputs=[list(seen)])
    return np.asarray(jax.nn.softmax(filtered_logits(logits[None], state), -1)[0], np.float64)


def statistic(tokens, p):
    """Chi-square and its degrees of freedom; a token of no probability must not come."""
    seen, expected = np.bincount(tokens, minlength=VOCAB), len(tokens) * p
    assert (seen[p < 1e-9] == 0).all()
    some = p >= 1e-9
    return ((seen[some] - expected[some]) ** 2 / expected[some]).sum(), some.sum() - 1


def is_drawn_from(tokens, p):
    found, freedom = statistic(tokens, p)
    return found < chi2.isf(UNLIKELY, max(freedom, 1))


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_emitted_has_the_distribution_of_plain_sampling(name):
    """The first token; and the second behind each first one that was kept."""
    settings = SETTINGS[name]
    tokens, counts, *_ = accepted(name)
    assert set(counts.tolist()) == {1, 2, 3}
    assert is_drawn_from(tokens[:, 0], plain_distribution(FIRST, settings))
    total, freedom = 0.0, 0
    for first in range(VOCAB):
        second = tokens[(counts > 1) & (tokens[:, 0] == first), 1]
        if len(second) > 100:
            found = statistic(second, plain_distribution(NEXT[first], settings, [first]))
            total, freedom = total + found[0], freedom + found[1]
    assert freedom >= 2
    assert total < chi2.isf(UNLIKELY, freedom)


def test_the_drafts_of_a_node_differ_and_are_drawn_from_q():
    *_, drafted, _ = accepted("plain")
    tokens = np.asarray(drafted.tokens)
    q = plain_distribution(DRAFT_FIRST, SETTINGS["plain"])
    assert is_drawn_from(tokens[:, 0], q)
    second = sum(q[x] * np.where(np.arange(VOCAB) == x, 0, q) / (1 - q[x]) for x in range(VOCAB))
    assert is_drawn_from(tokens[:, 1], second)
    for nodes in OFFERS.children:
        each = tokens[:, np.array(nodes, int) - 1]
        assert all(len(set(row)) == len(nodes) for row in each.tolist())


def test_a_node_with_fewer_tokens_than_children_offers_what_it_has():
    tokens, *_, drafted, _ = accepted("few")
    assert (np.asarray(drafted.tokens)[:, :2] >= 0).all()
    assert (np.asarray(drafted.tokens)[:, 2] == -1).all()
    assert is_drawn_from(tokens[:, 0], plain_distribution(FIRST, FEW))


def whole_distribution_again(p, q, offered, rng):
    """Wrong: each sibling is judged as if none had been rejected before it."""
    for token in offered:
        if rng.random() * q[token] < p[token]:
            return token
    rest = np.maximum(p - q, 0)
    return rng.choice(VOCAB, p=rest / rest.sum())


def q_as_it_was(p, q, offered, rng):
    """Wrong: p is reduced, but q keeps the siblings that were drawn before."""
    for token in offered:
        if rng.random() * q[token] < p[token]:
            return token
        p = np.maximum(p - q, 0)
        p = p / p.sum()
    return rng.choice(VOCAB, p=p)


@pytest.mark.parametrize("rule", [whole_distribution_again, q_as_it_was])
def test_a_wrong_rule_fails_the_same_test(rule):
    settings = SETTINGS["plain"]
    p, q = plain_distribution(FIRST, settings), plain_distribution(DRAFT_FIRST, settings)
    *_, drafted, _ = accepted("plain")
    rng = np.random.default_rng(0)
    tokens = np.array([rule(p / p.sum(), q / q.sum(), row, rng) for row in np.asarray(drafted.tokens)[:, :3]])
    assert not is_drawn_from(tokens, p)


def test_a_tree_keeps_more_than_a_chain():
    (_, tree, *_), (_, chain, *_) = (accepted("plain", t) for t in (OFFERS, Tree.of((1, 1))))
    assert tree.mean() > chain.mean() + 0.3


def test_a_greedy_row_offers_its_best_tokens():
    *_, drafted, _ = accepted("greedy")
    tokens = np.asarray(drafted.tokens)[0]
    assert tokens[:3].tolist() == np.argsort(-np.asarray(DRAFT_FIRST))[:3].tolist()
    assert tokens[5:7].tolist() == np.argsort(-np.asarray(DRAFT_NEXT[tokens[1]]))[:2].tolist()


def test_a_greedy_row_goes_down_the_nodes_that_plain_decoding_takes():
    """Here by the second child, then by the second again, as far as the row's nodes go."""
    right = [int(FIRST.argmax())]
    for _ in range(2):
        right.append(int(NEXT[right[-1]].argmax()))
    wrong = [(token + 1) % VOCAB for token in right]
    tokens = jnp.array([[wrong[0], right[0], wrong[0], *[wrong[1]] * 3, right[1], *[wrong[1]] * 2]] * 3)
    logits = jnp.concatenate([jnp.broadcast_to(FIRST, (3, 1, VOCAB)), NEXT[tokens]], axis=1)
    greedy = SamplingState.create([], VOCAB, batch=3)
    drafted = Drafted(tokens, jnp.array([9, 6, 1]))
    done, path = accept_tree(logits, drafted, OFFERS, greedy, jnp.full(3, 7), jnp.ones(3, bool))
    assert done.counts.tolist() == [3, 2, 1]
    for row, count in enumerate((3, 2, 1)):
        assert done.emitted.tokens[row, :count].tolist() == right[:count]
        assert path[row, :count].tolist() == [0, 2, 7][:count]
    assert done.sampling.output_counts.sum(1).tolist() == [3, 2, 1]
