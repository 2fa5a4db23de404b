"""Rounds that verify token trees: greedy rows get the tokens of plain decoding, sampled rows its distribution."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import pdx
from pdx.cache.dense import init_cache
from pdx.errors import RequestError
from pdx.model import forward, init_params
from pdx.sampling.sampler import SamplingOptions, SamplingState, filtered_logits
from pdx.speculative.acceptance import accept_tree
from pdx.speculative.drawing import Rows, grow
from pdx.speculative.eagle import Eagle, head_config
from pdx.speculative.lengths import always
from pdx.speculative.options import Speculation, asked
from pdx.speculative.proposers import DraftModel, SelfDraft
from pdx.speculative.rounds import SpeculationState, speculate_many
from pdx.speculative.trees import Tree
from tests.speculative import test_eagle, test_rounds
from tests.speculative.test_rounds import DRAWN, GREEDY, OTHER, PENALIZED, TEXTS, N, plain, speculated
from tests.support import tiny_model
from tests.support.models import GEMMA, LLAMA, params, whole

TREE = Tree.of((3, 2, 1))
UNLIKELY = 1e-5  # a statistic that a right rule exceeds once in a hundred thousand runs; the seeds are fixed
VOCAB, ROWS = 6, 4000
OFFERS = Tree.of((3, 2))

# --- the rule


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


def drafted_from(sampling, tree):
    held, active = jnp.full(ROWS, 7), jnp.ones(ROWS, bool)
    rows = Rows(None, held, active, SimpleNamespace(capacity=128), sampling, None)

    def logits_behind(state, depth, tokens):
        if depth == 0:
            return jnp.broadcast_to(DRAFT_FIRST, (ROWS, 1, VOCAB)), state
        return DRAFT_NEXT[tokens[:, -len(tree.levels[depth]) :]], state

    return grow(tree, rows, jnp.full(ROWS, tree.depth), None, logits_behind)[0]


def accepted(settings, tree=OFFERS):
    """The tokens of ROWS rows of one round, [ROWS, depth + 1], how many they are, and the drafts."""
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


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_emitted_has_the_distribution_of_plain_sampling(settings):
    """The first token; and the second behind each first one that was kept."""
    tokens, counts, *_ = accepted(settings)
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
    *_, drafted, _ = accepted(SETTINGS["plain"])
    tokens = np.asarray(drafted.tokens)
    q = plain_distribution(DRAFT_FIRST, SETTINGS["plain"])
    assert is_drawn_from(tokens[:, 0], q)
    second = sum(q[x] * np.where(np.arange(VOCAB) == x, 0, q) / (1 - q[x]) for x in range(VOCAB))
    assert is_drawn_from(tokens[:, 1], second)
    for nodes in OFFERS.children:
        each = tokens[:, np.array(nodes, int) - 1]
        assert all(len(set(row)) == len(nodes) for row in each.tolist())


def test_a_node_with_fewer_tokens_than_children_offers_what_it_has():
    settings = {"temperature": 1.0, "top_k": 2}
    tokens, *_, drafted, _ = accepted(settings)
    assert (np.asarray(drafted.tokens)[:, :2] >= 0).all()
    assert (np.asarray(drafted.tokens)[:, 2] == -1).all()
    assert is_drawn_from(tokens[:, 0], plain_distribution(FIRST, settings))


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
    *_, drafted, _ = accepted(settings)
    rng = np.random.default_rng(0)
    tokens = np.array([rule(p / p.sum(), q / q.sum(), row, rng) for row in np.asarray(drafted.tokens)[:, :3]])
    assert not is_drawn_from(tokens, p)


def test_a_tree_keeps_more_than_a_chain():
    (_, tree, *_), (_, chain, *_) = (accepted(SETTINGS["plain"], t) for t in (OFFERS, Tree.of((1, 1))))
    assert tree.mean() > chain.mean() + 0.3


def test_a_greedy_row_goes_down_the_nodes_that_plain_decoding_takes():
    tokens, counts, drafted, path = accepted({"temperature": 0.0})
    expected = [int(FIRST.argmax())]
    for _ in range(OFFERS.depth):
        expected.append(int(NEXT[expected[-1]].argmax()))
    for row in (0, ROWS - 1):
        assert tokens[row, : counts[row]].tolist() == expected[: counts[row]]
        on_the_way = path[row, 1 : counts[row]]
        assert np.asarray(drafted.tokens)[row, on_the_way - 1].tolist() == expected[: counts[row] - 1]
    best = np.argsort(-np.asarray(DRAFT_FIRST))[:3]
    assert np.asarray(drafted.tokens)[0, :3].tolist() == best.tolist()
    assert counts[0] > 1


# --- rounds

LEVELS, COSTS = always(TREE)
PROPOSERS = {"self": (SelfDraft(1), None), "draft": (DraftModel(OTHER), init_params(OTHER, jax.random.key(3)))}


@pytest.mark.parametrize(
    ("cfg", "name", "options"),
    [
        (LLAMA, "draft", GREEDY),
        (GEMMA, "draft", PENALIZED),
        pytest.param(LLAMA, "self", PENALIZED, marks=pytest.mark.slow),
        pytest.param(GEMMA, "self", GREEDY, marks=pytest.mark.slow),
    ],
    ids=["llama, draft", "windows, draft, penalized", "llama, self, penalized", "windows, self"],
)
def test_greedy_rounds_emit_the_tokens_of_plain_decoding(cfg, name, options):
    proposer, weights = PROPOSERS[name]
    got, cache, (rounds, drafted, kept) = speculated(
        cfg, options, proposer, draft_params=weights, levels=LEVELS, costs=COSTS
    )
    np.testing.assert_array_equal(got, plain(cfg, options)[0])
    assert cache.lengths.tolist() == [len(text) + N for text in TEXTS]
    assert (rounds + kept == N).all()
    assert (drafted > 10 * kept).all()  # of 15 tokens at most 3 are kept


def test_greedy_rounds_of_a_head_emit_the_tokens_of_plain_decoding():
    cfg, proposer = LLAMA, Eagle(head_config(LLAMA))
    texts, cache, sampling, state = test_eagle.begun(cfg, GREEDY)
    got, left = [[] for _ in texts], np.full(len(texts), 24, np.int32)
    while left.any():
        out = speculate_many(
            params(cfg),
            cfg,
            cache,
            sampling,
            state,
            8,
            active=left > 0,
            limits=left,
            costs=COSTS,
            proposer=proposer,
            levels=LEVELS,
            draft_params=test_eagle.head(cfg),
        )
        cache, sampling, state = out.cache, out.sampling, out.state
        for row, tokens in enumerate(got):
            tokens += np.asarray(out.emitted.tokens)[row, : int(out.counts[row])].tolist()
        left = left - np.asarray(out.counts)
    np.testing.assert_array_equal(got, test_eagle.plain(cfg, GREEDY, 24))


@pytest.mark.parametrize("options", [GREEDY, pytest.param(DRAWN, marks=pytest.mark.slow)], ids=["greedy", "drawn"])
def test_a_draft_that_is_the_target_is_kept_to_the_last_level(options):
    proposer = DraftModel(LLAMA)
    _, _, (rounds, _, kept) = speculated(
        LLAMA, options, proposer, draft_params=params(LLAMA), levels=LEVELS, costs=COSTS
    )
    if options is GREEDY:
        assert (rounds == N // (TREE.depth + 1)).all()
    assert (kept > 2 * rounds).all()


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.int8], ids=["f32", "int8"])
def test_rejected_nodes_leave_no_trace_in_the_next_logits(dtype):
    proposer, weights = PROPOSERS["draft"]
    expected, clean = plain(GEMMA, GREEDY, dtype)
    got, cache, _ = speculated(GEMMA, GREEDY, proposer, dtype, weights, levels=LEVELS, costs=COSTS)
    np.testing.assert_array_equal(got, expected)
    a, b = (forward(params(GEMMA), GEMMA, got[:, -1:], c).logits for c in (cache, clean))
    np.testing.assert_allclose(a, b, atol=2e-4 if dtype == jnp.float32 else 2e-2)


def test_no_row_gets_more_than_its_limit_or_than_its_cache_holds():
    """Rows that stand 1, 6 and 20 tokens before the end of a cache of 128, of which a tree takes up to 16."""
    cfg, weights = LLAMA, params(LLAMA)
    held = [127, 122, 108]
    ids = np.random.default_rng(0).integers(0, 96, (3, 128)).astype(np.int32)
    caches = [
        forward(weights, cfg, ids, init_cache(cfg, 3, 128, chunk=128), lengths=jnp.array(held), logits="none").cache
        for _ in range(2)
    ]
    state = SpeculationState.create([ids[i, : n + 1] for i, n in enumerate(held)], 3, 128, DraftModel(cfg), caches[1])
    limits = np.array([1, 6, 5], np.int32)
    out = speculate_many(
        weights,
        cfg,
        caches[0],
        test_rounds.sampling_of(GREEDY),
        state,
        8,
        active=np.ones(3, bool),
        limits=limits,
        costs=COSTS,
        proposer=DraftModel(cfg),
        levels=LEVELS,
        draft_params=weights,
    )
    assert out.counts.tolist() == limits.tolist()
    assert out.cache.lengths.tolist() == [128, 128, 113]
    texts = np.pad(ids, ((0, 0), (0, 8)))
    for row, (n, limit) in enumerate(zip(held, limits, strict=True)):
        texts[row, n + 1 : n + 1 + limit] = np.asarray(out.emitted.tokens)[row, :limit]
    logits = np.asarray(whole(weights, cfg, texts).logits)
    for row, (n, limit) in enumerate(zip(held, limits, strict=True)):
        at = n + np.arange(limit)
        assert (logits[row, at].max(-1) - logits[row, at, texts[row, at + 1]] < 1e-3).all()


def test_sampled_rounds_keep_the_distribution():
    """The first token of a round over many seeds, by chi-square; the first draft alone fails."""
    count, text, options = 3000, [3, 1, 4, 1, 5], {"temperature": 1.5}
    _, weights = PROPOSERS["draft"]
    caches = [
        forward(w, c, jnp.array([text[:-1]]), init_cache(c, 1, 128, chunk=32), logits="none").cache
        for w, c in ((params(LLAMA), LLAMA), (weights, OTHER))
    ]
    caches = [jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), cache) for cache in caches]
    sampling = SamplingState.create(
        [SamplingOptions(seed=i, **options) for i in range(count)], 96, prompts=[text] * count
    )
    state = SpeculationState.create([text] * count, count, 16, DraftModel(OTHER), caches[1])
    out = speculate_many(
        params(LLAMA),
        LLAMA,
        caches[0],
        sampling,
        state,
        1,
        active=np.ones(count, bool),
        limits=np.full(count, 8, np.int32),
        costs=COSTS,
        proposer=DraftModel(OTHER),
        levels=LEVELS,
        draft_params=weights,
    )
    p, q = (
        np.asarray(jax.nn.softmax(forward(w, c, jnp.array([text]), logits="last").logits[0] / 1.5), np.float64)
        for w, c in ((params(LLAMA), LLAMA), (weights, OTHER))
    )

    def share(tokens, expected):
        """Chi-square over its limit, the tokens that are expected less than five times taken as one."""
        seen, expected = np.bincount(tokens, minlength=96), count * expected
        rare = expected < 5
        seen, expected = (np.append(x[~rare], x[rare].sum() + 1e-9) for x in (seen, expected))
        return ((seen - expected) ** 2 / expected).sum() / chi2.isf(UNLIKELY, len(seen) - 1)

    tokens = np.asarray(out.emitted.tokens)
    assert int(out.kept.sum()) > 0
    assert share(tokens[:, 0], p) < 1
    assert share(np.random.default_rng(0).choice(96, count, p=q / q.sum()), p) > 1


# --- how it is asked for


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("draft"), seed=1))


def test_generate_with_a_tree_answers_as_without(model, draft):
    settings = {"max_tokens": 24, "ignore_eos": True, "repetition_penalty": 1.1}
    prompts = ["ab ab ab ab ab", "x"]
    expected = [c.token_ids for c in pdx.generate(model, prompts, **settings)]
    speculation = Speculation("draft", "3x2x1", model=draft)
    for _ in range(2):
        done = pdx.generate(model, prompts, speculate=speculation, **settings)
        assert [c.token_ids for c in done] == expected
    for counts in (c.speculation for c in done):
        assert counts.rounds + counts.kept == 23
        assert counts.drafted > counts.rounds
        assert set(counts.by_length) == {0, 3}
    assert {c.compile_s for c in done} == {0.0}


def test_a_tree_is_asked_for_by_its_branches():
    assert asked("draft", "3x2x1").draft_length == TREE
    assert Speculation("self", TREE, layers=2) == Speculation.parse("self:2", "3x2x1")
    assert asked("draft", "4").draft_length == 4


@pytest.mark.parametrize(
    ("proposer", "length", "says"),
    [
        ("ngram", "3x2x1", "ngram drafts no token trees, but draft, eagle, self do"),
        ("synthetic:0.5", "2x2", "drafts no token trees"),
        ("draft", "3x3x3", "of 39 tokens: 1 to 15"),
        ("draft", "3x", "a token tree such as 3x2x1"),
        ("draft", "0x2", "at least 1"),
    ],
)
def test_a_tree_that_cannot_be_is_refused(proposer, length, says):
    with pytest.raises(RequestError, match=says):
        asked(proposer, length)


def test_an_engine_refuses_a_tree_by_name():
    with pytest.raises(NotImplementedError, match=r"3x2x1: an engine's pages take no token tree"):
        pdx.EngineConfig(speculate="draft", draft_length="3x2x1")


def test_a_tree_deeper_than_a_window_is_refused(model):
    short = replace(model, config=replace(model.config, windows=(3, *model.config.windows[1:])))
    with pytest.raises(NotImplementedError, match="has a window of 3 tokens"):
        pdx.generate(short, "a", max_tokens=4, speculate="self:1", draft_length="2x1x1")
