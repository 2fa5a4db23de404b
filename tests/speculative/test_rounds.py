"""Rounds over a dense cache: tokens of plain decoding, and rejected tokens that leave no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx import steps
from pdx.cache.dense import init_cache
from pdx.model import init_params
from pdx.sampling.sampler import SamplingOptions, SamplingState
from pdx.speculative.drawing import Rows
from pdx.speculative.proposers import DraftModel, NGram, SelfDraft, Synthetic
from pdx.speculative.rounds import Drafter, SpeculationState, speculate_many
from tests.support.models import GEMMA, LLAMA, params
from tests.support.rounds import until

N, CAPACITY, CHUNK = 40, 256, 32
# Repetitive, random, and constant.
TEXTS = [[3, 1, 4, 1, 5] * 4, np.random.default_rng(0).integers(0, 96, 11).tolist(), [9] * 7]
# Drafting is always worth it where there is a draft.
COSTS = np.array([2.0, 1.0, 1.2], np.float32)
LEVELS = (0, 3, 7)


def prefilled(cfg, weights, dtype=jnp.float32):
    ids = np.zeros((len(TEXTS), CHUNK), np.int32)
    for row, text in enumerate(TEXTS):
        ids[row, : len(text)] = text
    lengths = np.array([len(text) for text in TEXTS])
    logits, cache = steps.prefill(weights, cfg, ids, lengths, init_cache(cfg, 3, CAPACITY, chunk=CHUNK, dtype=dtype))
    return np.asarray(logits.argmax(-1), np.int32), cache


def sampling_of(options):
    return SamplingState.create([options] * 3, 96, prompts=TEXTS)


def plain(cfg, options, dtype=jnp.float32):
    first, cache = prefilled(cfg, params(cfg), dtype)
    out = steps.decode_many(params(cfg), cfg, first, cache, sampling_of(options), N)
    return np.asarray(out.tokens), out.cache


def speculated(
    cfg, options, proposer, dtype=jnp.float32, draft_params=None, n=8, limit=N, levels=LEVELS, costs=COSTS, own=None
):
    """All rounds until each row has `limit` tokens: those, the cache, and rounds, drafted and kept by row."""
    first, cache = prefilled(cfg, params(cfg), dtype)
    if own is None and draft_params is not None:
        own = prefilled(proposer.cfg, draft_params)[1]
    texts = [[*text, int(token)] for text, token in zip(TEXTS, first, strict=True)]
    state, sampling = SpeculationState.create(texts, 3, CAPACITY, proposer, own), sampling_of(options)
    got, calls = until(
        limit, params(cfg), cfg, cache, sampling, state, n, drafter=Drafter(proposer, levels, draft_params), costs=costs
    )
    seen = sum(np.stack([out.rounds.sum(axis=1), out.drafted, out.kept]) for out in calls)  # by row
    return np.array(got), calls[-1].cache, seen


GREEDY, PENALIZED = SamplingOptions(), SamplingOptions(repetition_penalty=1.2, frequency_penalty=0.2)
DRAWN = SamplingOptions(temperature=0.8, top_p=0.9, seed=11)
OTHER = LLAMA.__class__(**{**vars(LLAMA), "num_layers": 1, "windows": ()})
PROPOSERS = {
    "ngram": (NGram(), None),
    "self": (SelfDraft(1), None),
    "draft": (DraftModel(OTHER), init_params(OTHER, jax.random.key(3))),
}


@pytest.mark.thin(5)
@pytest.mark.parametrize("options", [GREEDY, PENALIZED], ids=["greedy", "penalized"])
@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("cfg", [LLAMA, GEMMA], ids=["llama", "windows"])
def test_greedy_rounds_emit_the_tokens_of_plain_decoding(cfg, name, options):
    proposer, weights = PROPOSERS[name]
    expected, _ = plain(cfg, options)
    got, cache, (rounds, drafted, kept) = speculated(cfg, options, proposer, draft_params=weights)
    np.testing.assert_array_equal(got, expected)
    assert (rounds + kept == N).all()
    assert cache.lengths.tolist() == [len(text) + N for text in TEXTS]
    assert (kept <= drafted).all()
    assert drafted.sum() > 0


def test_ngrams_leave_sampled_tokens_as_they_are():
    expected, _ = plain(LLAMA, DRAWN)
    got, *_ = speculated(LLAMA, DRAWN, NGram())
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_a_draft_that_is_the_target_is_kept_whole():
    got, _, (rounds, drafted, kept) = speculated(LLAMA, GREEDY, DraftModel(LLAMA), draft_params=params(LLAMA))
    np.testing.assert_array_equal(got, plain(LLAMA, GREEDY)[0])
    assert (drafted == kept).all()
    assert (rounds == N // 8).all()
    drawn = speculated(LLAMA, DRAWN, DraftModel(LLAMA), draft_params=params(LLAMA))[2]
    assert (drawn[1] == drawn[2]).all()


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["f32", "int8"])
@pytest.mark.parametrize("cfg", [LLAMA, GEMMA], ids=["llama", "windows"])
def test_rejected_tokens_leave_no_trace(cfg, dtype):
    """The cache behind the rounds answers as one that never saw what was rejected: the next logits are equal."""
    proposer, weights = PROPOSERS["draft"]
    expected, clean = plain(cfg, GREEDY, dtype)
    got, cache, (_, drafted, kept) = speculated(cfg, GREEDY, proposer, dtype, draft_params=weights)
    np.testing.assert_array_equal(got, expected)
    assert (drafted - kept).sum() > 20
    a, b = (steps.decode_step(params(cfg), cfg, got[:, -1], np.ones(3, bool), c)[0] for c in (cache, clean))
    np.testing.assert_allclose(a, b, atol=2e-4 if dtype == jnp.float32 else 2e-2)


def test_no_row_gets_more_than_its_limit_and_rows_that_rest_stay():
    first, cache = prefilled(LLAMA, params(LLAMA))
    texts = [[*text, int(token)] for text, token in zip(TEXTS, first, strict=True)]
    out = speculate_many(
        params(LLAMA),
        LLAMA,
        cache,
        sampling_of(GREEDY),
        SpeculationState.create(texts, 3, CAPACITY, Synthetic(1.0)),
        8,
        limits=np.array([2, 5, 0], np.int32),
        drafter=Drafter(Synthetic(1.0), LEVELS),
        costs=COSTS,
    )
    assert out.counts.tolist() == [2, 5, 0]
    assert out.cache.lengths.tolist() == [len(TEXTS[0]) + 2, len(TEXTS[1]) + 5, len(TEXTS[2])]
    assert out.state.history[0, len(TEXTS[0]) + 1 : len(TEXTS[0]) + 3].tolist() == out.emitted.tokens[0, :2].tolist()


def drafts(text, most=4, longest=8):
    history = np.zeros((1, 32), np.int32)
    history[0, : len(text)] = text
    rows = Rows(jnp.asarray(history), jnp.array([len(text)]), jnp.array([True]), None, None, None)
    found = NGram(longest).prepare(rows, None, most)
    return found.tokens[0, : int(found.available[0])].tolist(), int(found.confidence[0]) + 1


@pytest.mark.parametrize(
    ("text", "tokens", "length"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], [9, 8, 1, 2], 3),
        ([1, 2, 7, 3, 2, 7, 1, 2], [7, 3, 2, 7], 2),  # the longest match, not the latest
        ([5, 1, 6, 1, 7, 1], [7, 1, 7, 1], 1),  # of equally long ones the latest; then the repetition goes on
        ([4, 4, 4, 4], [4, 4, 4, 4], 3),
        ([1, 2, 3], [], 1),
        ([7], [], 1),
    ],
)
def test_ngrams_copy_what_followed_the_longest_match(text, tokens, length):
    assert drafts(text) == (tokens, length)


def test_the_longest_match_is_bounded():
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    assert drafts(text, longest=2) == ([5, 6, 1, 2], 2)
