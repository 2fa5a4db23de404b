"""Rounds with an EAGLE head: the tokens of plain decoding, and a cache that rejected drafts leave no trace in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from pdx import steps
from pdx.cache.dense import init_cache
from pdx.cache.rows import TokenRows
from pdx.layers.linear import embed
from pdx.model import forward
from pdx.sampling.sampler import SamplingOptions, SamplingState
from pdx.sharding import is_spec
from pdx.speculative.drawing import Rows
from pdx.speculative.eagle import PREFILL, Eagle, EagleState, head_config, head_specs, own_logits, predict
from pdx.speculative.lengths import NEVER
from pdx.speculative.rounds import Drafter, SpeculationState, speculate_many
from tests.support.models import GEMMA, LLAMA, params
from tests.support.rounds import until

CAPACITY, CHUNK, OWN = 256, 32, 50
TEXTS = [[3, 1, 4, 1, 5] * 4, np.random.default_rng(0).integers(0, 96, 11).tolist(), [9] * 7]
LEVELS = (0, 3, 7)
UNLIKELY = 1e-5


def head(cfg, seed=5):
    """Random weights in every leaf; it can draft the tokens 0, 2, 4 and so on up to 98, as far as there are any."""
    leaves, tree = jax.tree.flatten(head_specs(cfg, OWN - 2), is_leaf=is_spec)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [0.4 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, made) | {"vocabulary": jnp.arange(0, 96, 2, dtype=jnp.int32)}


def prefilled(cfg, texts, chunk=CHUNK):
    """The logits, the target's cache and the head's state behind the texts, in chunks."""
    b = len(texts)
    cache = init_cache(cfg, b, CAPACITY, chunk=CHUNK)
    state = EagleState.create(init_cache(head_config(cfg), b, CAPACITY, chunk=CHUNK), cfg.d_model, jnp.float32)
    logits = np.zeros((b, cfg.vocab_size), np.float32)
    for held in range(0, max(map(len, texts)), chunk):
        tokens, following = np.zeros((2, b, chunk), np.int32)
        lengths, taken = np.zeros((2, b), np.int32)
        for row, text in enumerate(texts):
            part, behind = text[held : held + chunk], text[held + 1 : held + 1 + chunk]
            tokens[row, : len(part)], following[row, : len(behind)] = part, behind
            lengths[row], taken[row] = len(part), min(len(part), len(behind))
        new, cache, state = PREFILL(
            params(cfg), head(cfg), tokens, following, lengths, taken, cache, state, cfg=cfg, kernels="auto"
        )
        logits = np.where((lengths > 0)[:, None], new, logits)
    return logits, cache, state


def sampling_of(options, texts):
    return SamplingState.create([options] * len(texts), 96, prompts=texts)


def rounds(cfg, world, options, n, level=None):
    """Rounds until each row has `n` more tokens, of one level or the one that pays."""
    texts, cache, sampling, state = world
    costs = np.array([1.0, 1.2, 1.4]) if level is None else np.where(np.array(LEVELS) == level, 1.0, NEVER)
    got, calls = until(
        n,
        params(cfg),
        cfg,
        cache,
        sampling,
        state,
        drafter=Drafter(Eagle(head_config(cfg)), LEVELS, head(cfg)),
        costs=costs.astype(np.float32),
    )
    if calls:
        cache, sampling, state = calls[-1].cache, calls[-1].sampling, calls[-1].state
    return [[*text, *new] for text, new in zip(texts, got, strict=True)], cache, sampling, state


def begun(cfg, options, chunk=CHUNK):
    logits, cache, own = prefilled(cfg, TEXTS, chunk)
    texts = [[*text, int(token)] for text, token in zip(TEXTS, logits.argmax(-1), strict=True)]
    state = SpeculationState.create(texts, len(texts), CAPACITY, Eagle(head_config(cfg)), own)
    return texts, cache, sampling_of(options, TEXTS), state


def plain(cfg, options, n):
    logits, cache, _ = prefilled(cfg, TEXTS)
    out = steps.decode_many(
        params(cfg), cfg, np.asarray(logits.argmax(-1), np.int32), cache, sampling_of(options, TEXTS), n
    )
    return np.asarray(out.tokens)


GREEDY, PENALIZED = SamplingOptions(), SamplingOptions(repetition_penalty=1.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "options"), [(LLAMA, GREEDY), (LLAMA, PENALIZED), (GEMMA, GREEDY)], ids=["llama", "penalized", "windows"]
)
def test_greedy_rounds_emit_the_tokens_of_plain_decoding(cfg, options):
    n = 40
    got, cache, *_ = rounds(cfg, begun(cfg, options), options, n)
    expected = plain(cfg, options, n)
    np.testing.assert_array_equal([g[-n:] for g in got], expected)
    assert cache.lengths.tolist() == [len(g) - 1 for g in got]


def first_draft(cfg, text):
    """The head's first draft behind a text, from the whole text at once and without a cache."""
    ids = jnp.array([text])
    hidden = forward(params(cfg), cfg, ids[:, :-1], logits="none").final_hidden
    count = jnp.array([len(text) - 1])
    entries = TokenRows.behind(jnp.zeros(1, jnp.int32), count, len(text) - 1)
    embedded = embed(params(cfg)["embed"], ids[:, 1:], cfg.embed_scale)
    x, _ = predict(head(cfg), head_config(cfg), embedded, hidden, entries)
    return own_logits(head(cfg), cfg, x[0, -1])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [CHUNK, 8], ids=["one chunk", "chunks"])
def test_after_any_rounds_the_head_drafts_as_if_it_read_the_whole_text(chunk):
    """Behind the prompt, behind plain rounds (more than wait at once), behind short and long drafts."""
    cfg, world = LLAMA, begun(LLAMA, GREEDY, chunk)
    for n, level in ((0, 0), (21, 0), (9, 3), (1, 0), (17, 7), (2, 3)):
        world = rounds(cfg, world, GREEDY, n, level)
        texts, cache, sampling, state = world
        held = jnp.array([len(text) for text in texts])
        rows = Rows(state.history, held, held > 0, cache, sampling, params(cfg), head(cfg))
        eagle = Eagle(head_config(cfg))
        drafted, _, after = eagle.draft(rows, state.proposer, eagle.prepare(rows, state.proposer, 3), 3, cfg, "auto")
        assert after.cache.lengths.tolist() == [len(text) - 1 for text in texts]
        for row, text in enumerate(texts):
            logits = np.asarray(first_draft(cfg, text))
            assert logits.max() - logits[drafted.tokens[row, 0] // 2] < 1e-3
            assert (drafted.tokens[row] % 2 == 0).all()


@pytest.mark.slow
def test_sampled_rounds_keep_the_distribution():
    """The first token of a round over many seeds, by chi-square; that of the drafts alone fails."""
    cfg, count, text = LLAMA, 4000, [3, 1, 4, 1, 5]
    _, cache, own = prefilled(cfg, [text[:-1]])
    cache, own = (jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), x) for x in (cache, own))
    options = [SamplingOptions(temperature=1.5, seed=i) for i in range(count)]
    sampling = SamplingState.create(options, 96, prompts=[text] * count)
    state = SpeculationState.create([text] * count, count, 16, Eagle(head_config(cfg)), own)
    p = jax.nn.softmax(forward(params(cfg), cfg, jnp.array([text]), logits="last").logits[0] / 1.5)
    q = jax.nn.softmax(first_draft(cfg, text) / 1.5)
    held = jnp.full(count, len(text))
    rows = Rows(jnp.asarray(state.history), held, held > 0, cache, sampling, params(cfg), head(cfg))
    eagle = Eagle(head_config(cfg))
    drafted, *_ = eagle.draft(rows, own, eagle.prepare(rows, own, 3), 3, cfg, "auto")

    def statistic(tokens, expected):
        """Chi-square, the tokens that are expected less than five times taken as one."""
        seen, expected = np.bincount(np.asarray(tokens), minlength=96), count * np.asarray(expected, np.float64)
        rare = expected < 5
        seen, expected = (np.append(x[~rare], x[rare].sum() + 1e-9) for x in (seen, expected))
        return ((seen - expected) ** 2 / expected).sum() / chi2.isf(UNLIKELY, len(seen) - 1)

    out = speculate_many(
        params(cfg),
        cfg,
        cache,
        sampling,
        state,
        1,
        limits=np.full(count, 8, np.int32),
        drafter=Drafter(eagle, (0, 3), head(cfg)),
        costs=np.array([NEVER, 1.0], np.float32),
    )
    assert 0 < int(out.kept.sum()) < int(out.drafted.sum())
    assert statistic(out.emitted.tokens[:, 0], p) < 1
    drafts = np.zeros(96)
    drafts[::2] = q
    assert statistic(drafted.tokens[:, 0], drafts) < 1
    assert statistic(drafted.tokens[:, 0], p) > 1
