"""Rounds that verify token trees: greedy rows get the tokens of plain decoding, sampled rows its distribution."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import pdx
from pdx.cache.dense import init_cache
from pdx.errors import RequestError
from pdx.model import forward, init_params
from pdx.sampling.sampler import SamplingOptions, SamplingState
from pdx.speculative.eagle import Eagle, head_config
from pdx.speculative.lengths import always
from pdx.speculative.options import Speculation, asked
from pdx.speculative.proposers import DraftModel, SelfDraft
from pdx.speculative.rounds import Drafter, SpeculationState, speculate_many
from pdx.speculative.trees import Tree
from tests.speculative import test_eagle, test_rounds
from tests.speculative.test_rounds import DRAWN, GREEDY, OTHER, PENALIZED, TEXTS, N, plain, speculated
from tests.support import rounds, tiny_model
from tests.support.models import GEMMA, LLAMA, params, whole

TREE = Tree.of((3, 2, 1))
UNLIKELY = 1e-5  # a statistic that a right rule exceeds once in a hundred thousand runs; the seeds are fixed

LEVELS, COSTS = always(TREE)
PROPOSERS = {"self": (SelfDraft(1), None), "draft": (DraftModel(OTHER), init_params(OTHER, jax.random.key(3)))}


@pytest.mark.parametrize(
    ("cfg", "name", "options"),
    [
        (LLAMA, "draft", GREEDY),
        pytest.param(GEMMA, "draft", PENALIZED, marks=pytest.mark.slow),
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
    assert (drafted >= 5 * kept).all()  # of 15 tokens at most 3 are kept
    assert (drafted > 0).all()


@pytest.mark.slow
def test_greedy_rounds_of_a_head_emit_the_tokens_of_plain_decoding():
    cfg, proposer = LLAMA, Eagle(head_config(LLAMA))
    _, cache, sampling, state = test_eagle.begun(cfg, GREEDY)
    got, _ = rounds.until(
        24,
        params(cfg),
        cfg,
        cache,
        sampling,
        state,
        drafter=Drafter(proposer, LEVELS, test_eagle.head(cfg)),
        costs=COSTS,
    )
    np.testing.assert_array_equal(got, test_eagle.plain(cfg, GREEDY, 24))


@pytest.mark.slow
@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_draft_that_is_the_target_is_kept_to_the_last_level(options):
    proposer = DraftModel(LLAMA)
    _, _, (rounds, _, kept) = speculated(
        LLAMA, options, proposer, draft_params=params(LLAMA), levels=LEVELS, costs=COSTS
    )
    if options is GREEDY:
        assert (rounds == N // (TREE.depth + 1)).all()
    assert (kept > 2 * rounds).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["f32", "int8"])
def test_rejected_nodes_leave_no_trace_in_the_next_logits(dtype):
    proposer, weights = PROPOSERS["draft"]
    expected, clean = plain(GEMMA, GREEDY, dtype)
    got, cache, _ = speculated(GEMMA, GREEDY, proposer, dtype, weights, levels=LEVELS, costs=COSTS)
    np.testing.assert_array_equal(got, expected)
    a, b = (forward(params(GEMMA), GEMMA, got[:, -1:], c).logits for c in (cache, clean))
    np.testing.assert_allclose(a, b, atol=2e-4 if dtype == jnp.float32 else 2e-2)


@pytest.mark.slow
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
        limits=limits,
        drafter=Drafter(DraftModel(cfg), LEVELS, weights),
        costs=COSTS,
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


@pytest.mark.slow
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
        limits=np.full(count, 8, np.int32),
        drafter=Drafter(DraftModel(OTHER), LEVELS, weights),
        costs=COSTS,
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


@pytest.mark.slow
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
