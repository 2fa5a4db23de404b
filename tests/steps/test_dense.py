"""The four steps: the laws that hold between them, what they leave alone, what they refuse, what they never say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx import steps
from pdx.cache.dense import init_cache
from pdx.errors import ContextLengthError
from pdx.sampling.sampler import SamplingOptions, SamplingState
from tests.support.history import CHUNK, DRAFT, history_of
from tests.support.models import ALL, GEMMA, LLAMA, QWEN, bits, close, leaves_equal, params, snapshot, tokens

pytestmark = pytest.mark.thin(3)

each = pytest.mark.parametrize("cfg", ALL.values(), ids=ALL)
B, CAPACITY = 4, 384


def empty(cfg, capacity=CAPACITY):
    return init_cache(cfg, B, capacity, chunk=CHUNK)


def filled(cfg, lengths=(24, 9, 0, 17), seed=0, capacity=CAPACITY):
    """A cache after one prefill."""
    return prefill(cfg, tokens(cfg, B, CHUNK, seed=seed), lengths, empty(cfg, capacity))[1]


def prefill(cfg, ids, lengths, cache, **settings):
    return steps.prefill(params(cfg), cfg, ids, np.asarray(lengths, np.int32), cache, **settings)


def decode(cfg, ids, active, cache, **settings):
    return steps.decode_step(params(cfg), cfg, ids, np.asarray(active), cache, **settings)


def verify(cfg, ids, lengths, cache, **settings):
    return steps.verify(params(cfg), cfg, ids, np.asarray(lengths, np.int32), cache, **settings)


def as_one_call(step):
    """Each step with the arguments (cfg, tokens [B, T], how many of them a row, cache), T as it likes."""

    def call(cfg, ids, counts, cache, **settings):
        if step == "prefill":
            return prefill(cfg, ids, counts, cache, **settings)
        if step == "verify":
            return verify(cfg, ids[:, :DRAFT], np.minimum(counts, DRAFT), cache, **settings)
        return decode(cfg, ids[:, 0], np.asarray(counts) > 0, cache, **settings)

    return call


every_step = pytest.mark.parametrize("step", ["prefill", "decode", "verify"])


# --- laws


@each
@pytest.mark.parametrize(
    "parts",
    [[(1, 1, 0, 1), (23, 8, 0, 0)], [(12, 4, 0, 1)] * 2, [(7, 0, 0, 2), (7, 9, 0, 0), (10, 0, 0, 0)]],
    ids=["one first", "halves", "rows apart"],
)
def test_chunked_prefill_is_whole_prefill(cfg, parts):
    ids, total = tokens(cfg, B, CHUNK), np.sum(parts, axis=0)
    logits, whole = prefill(cfg, ids, total, empty(cfg))
    last, cache, done = np.zeros_like(logits), empty(cfg), np.zeros(B, int)
    for part in np.array(parts):
        chunk = np.zeros((B, CHUNK), np.int32)
        for row, n in enumerate(part):
            chunk[row, :n] = ids[row, done[row] : done[row] + n]
        out, cache = prefill(cfg, chunk, part, cache)
        last, done = np.where(part[:, None] > 0, out, last), done + part
    close(last[total > 0], logits[total > 0])
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        close(a, b)


@each
def test_decode_after_prefill_is_prefill_one_longer(cfg):
    ids = tokens(cfg, B, CHUNK)
    lengths = np.array([24, 9, 2, 17])
    longer, whole = prefill(cfg, ids, lengths, empty(cfg))
    _, cache = prefill(cfg, ids, lengths - 1, empty(cfg))
    stepped, cache = decode(cfg, ids[np.arange(B), lengths - 1], np.ones(B, bool), cache)
    close(stepped, longer)
    np.testing.assert_array_equal(np.asarray(cache.lengths), lengths)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        close(a, b)


@each
def test_verify_scores_what_decode_would(cfg):
    draft, counts = tokens(cfg, B, DRAFT, seed=5), np.array([5, 3, 0, 1])
    scored, _ = verify(cfg, draft, counts, filled(cfg))
    cache = filled(cfg)
    for i in range(DRAFT):
        logits, cache = decode(cfg, draft[:, i], i < counts, cache)
        close(np.asarray(logits)[i < counts], np.asarray(scored)[i < counts, i])


@each
def test_a_draft_taken_back_never_was(cfg):
    """What is left behind is bit for bit what would be there: a rejected draft only lies in unread slots."""
    after, active = tokens(cfg, B, seed=6), np.array([True, True, False, True])
    clean, clean_cache = decode(cfg, after, active, filled(cfg))
    cache = filled(cfg)
    held = np.asarray(cache.lengths)
    _, cache = verify(cfg, tokens(cfg, B, DRAFT, seed=5), [5, 3, 0, 1], cache)
    logits, cache = decode(cfg, after, active, cache.truncate(held))
    np.testing.assert_array_equal(bits(logits)[active], bits(clean)[active])
    np.testing.assert_array_equal(np.asarray(cache.lengths), np.asarray(clean_cache.lengths))


@every_step
@each
def test_a_row_depends_on_nothing_but_itself(cfg, step):
    """Bit for bit: another slot, other neighbours, much longer or idle ones."""
    call = as_one_call(step)
    mine, begun = tokens(cfg, 2, CHUNK, seed=8)
    results = []
    for slot, neighbours in ((0, (0, 0, 0)), (2, (24, 1, 13)), (3, (24, 24, 24))):
        ids, before = tokens(cfg, B, CHUNK, seed=slot), tokens(cfg, B, CHUNK, seed=9 + slot)
        ids[slot], before[slot] = mine, begun
        counts = np.insert(np.array(neighbours), slot, 11)
        cache = empty(cfg)
        for _ in range(8 if neighbours[0] else 1):  # the neighbours run on, round their rings
            _, cache = prefill(cfg, before, np.where(np.arange(B) == slot, 0, counts), cache)
        _, cache = prefill(cfg, before, np.where(np.arange(B) == slot, 19, 0), cache)
        logits, cache = call(cfg, ids, counts, cache)
        kept = 5 if step == "verify" else None
        results.append((bits(logits)[slot, :kept], [bits(x)[slot] for x in jax.tree.leaves(cache)]))
    for logits, rows in results[1:]:
        np.testing.assert_array_equal(logits, results[0][0])
        for a, b in zip(rows, results[0][1], strict=True):
            np.testing.assert_array_equal(a, b)


# --- what is left alone


@every_step
@each
def test_idle_rows_are_untouched_bit_for_bit(cfg, step):
    cache = filled(cfg)
    before = snapshot(cache)
    counts = np.array([0, 4, 0, 1])
    _, after = as_one_call(step)(cfg, tokens(cfg, B, CHUNK, seed=3), counts, cache)
    after = snapshot(after)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(bits(a)[[0, 2]], bits(b)[[0, 2]])
    changed = (bits(after.layers[0].k) != bits(before.layers[0].k)).any(axis=(1, 2, 3))
    assert changed.tolist() == [False, True, False, True]


@every_step
def test_a_call_for_nobody_changes_nothing(step):
    cache = filled(GEMMA)
    before = snapshot(cache)
    _, after = as_one_call(step)(GEMMA, tokens(GEMMA, B, CHUNK), np.zeros(B, int), cache)
    leaves_equal(snapshot(after), before)


@pytest.mark.parametrize("step", ["prefill", "verify"])
def test_padding_is_neither_written_nor_seen(step):
    call, counts = as_one_call(step), np.array([2, 4, 0, 1])
    ids = tokens(GEMMA, B, CHUNK, seed=3)
    other = np.where(np.arange(CHUNK) < counts[:, None], ids, (ids + 7) % GEMMA.vocab_size)
    (a, cache_a), (b, cache_b) = (call(GEMMA, x, counts, filled(GEMMA)) for x in (ids, other))
    leaves_equal(snapshot(cache_a), snapshot(cache_b))
    for row, n in enumerate(counts):
        kept = slice(n) if step == "verify" else slice(None if n else 0)
        np.testing.assert_array_equal(bits(a)[row, kept], bits(b)[row, kept])


def test_nan_stays_in_its_row_and_goes_when_the_row_is_emptied():
    ids, active = tokens(QWEN, B, CHUNK, seed=3), np.array([True, True, True, True])
    clean, _ = decode(QWEN, ids[:, 0], active, filled(QWEN))
    cache = filled(QWEN)
    bad = jnp.arange(B)[:, None, None, None] == 1
    cache = cache.replace(
        layers=tuple(c.replace(k=jnp.where(bad, jnp.nan, c.k), v=jnp.where(bad, jnp.nan, c.v)) for c in cache.layers)
    )
    logits, cache = decode(QWEN, ids[:, 0], active, cache)
    assert np.isnan(logits[1]).all()
    np.testing.assert_array_equal(bits(logits)[[0, 2, 3]], bits(clean)[[0, 2, 3]])
    # The next request in that row finds nothing of it.
    fresh, _ = prefill(QWEN, ids, [0, 20, 0, 0], empty(QWEN))
    reused, cache = prefill(QWEN, ids, [0, 20, 0, 0], cache.truncate(np.array([99, 0, 99, 99])))
    np.testing.assert_array_equal(bits(reused)[1], bits(fresh)[1])


# --- what does not fit


@pytest.mark.parametrize("step", ["prefill", "decode", "verify", "decode_many"])
def test_a_full_row_is_refused(step):
    cache = filled(LLAMA, capacity=128).replace(lengths=jnp.array([128, 9, 0, 17]))
    before = snapshot(cache)
    says = "row 0 holds 128 tokens and was given 1 more, but the cache has room for 128: make it larger"
    if step == "decode_many":
        call = partial(steps.decode_many, params(LLAMA), LLAMA, tokens(LLAMA, B), cache, greedy(LLAMA), 1)
    else:
        call = partial(as_one_call(step), LLAMA, tokens(LLAMA, B, CHUNK), [1, 0, 0, 0], cache)
    with pytest.raises(ContextLengthError, match=says):
        call()
    leaves_equal(snapshot(cache), before)  # refused before anything was donated


@pytest.mark.parametrize("outer", ["check=False", "jit"])
@every_step
def test_unchecked_a_full_row_gets_nan_and_only_it(step, outer):
    call = as_one_call(step)
    ids, counts = tokens(LLAMA, B, CHUNK, seed=3), np.array([3, 2, 0, 1])
    held = np.array([127 if step != "decode" else 128, 9, 0, 17])

    def run(cache):
        if outer == "jit":
            return jax.jit(lambda c: call(LLAMA, ids, counts, c))(cache)
        return call(LLAMA, ids, counts, cache, check=False)

    clean, _ = run(filled(LLAMA, capacity=128))
    logits, cache = run(filled(LLAMA, capacity=128).replace(lengths=jnp.asarray(held)))
    assert np.isnan(logits[0]).all()
    assert np.isfinite(np.asarray(logits)[[1, 3]]).all()
    np.testing.assert_array_equal(bits(logits)[[1, 3], :1], bits(clean)[[1, 3], :1])
    assert int(cache.lengths[0]) > cache.capacity


@each
def test_what_overflowed_unchecked_can_be_taken_back(cfg):
    with history_of(cfg) as history:
        while history.lengths[0] + CHUNK <= CAPACITY - 2:
            history.prefill([CHUNK, 5, 0, 0])
        history.prefill([CAPACITY - 2 - history.lengths[0], 0, 0, 0])
        history.check()
        held = history.lengths
        logits, history.cache = verify(cfg, tokens(cfg, B, DRAFT), [5, 5, 0, 0], history.cache, check=False)
        assert np.isnan(logits[0]).all()
        history.truncate(held)
        history.decode([True, True, False, False])
        history.decode([True, False, False, False])
        assert history.lengths[0] == CAPACITY


@pytest.mark.parametrize(("lengths", "says"), [([25, 0, 0, 0], "25"), ([0, -1, 0, 0], "-1")])
def test_lengths_outside_the_chunk_are_refused(lengths, says):
    with pytest.raises(ValueError, match=f"said to have {says} new tokens, but the chunk is 24 wide"):
        prefill(LLAMA, tokens(LLAMA, B, CHUNK), lengths, empty(LLAMA))


def test_a_chunk_the_rings_cannot_take_is_refused():
    with pytest.raises(ValueError, match=r"chunk of 25 .*24"):
        prefill(GEMMA, tokens(GEMMA, B, 25), [1, 1, 1, 1], empty(GEMMA))


# --- decode_many


def greedy(cfg):
    return SamplingState.create([SamplingOptions()] * B, cfg.vocab_size)


@each
def test_decode_many_is_decode_steps_and_argmax(cfg):
    n, active = 7, np.array([True, True, False, True])
    token = tokens(cfg, B, seed=4)
    out = steps.decode_many(params(cfg), cfg, token, filled(cfg), greedy(cfg), n, active=active)
    cache, said = filled(cfg), []
    for _ in range(n):
        logits, cache = decode(cfg, token, active, cache)
        token = np.where(active, np.argmax(logits, axis=-1), token).astype(np.int32)
        said.append(token)
    np.testing.assert_array_equal(np.asarray(out.tokens)[active], np.stack(said, axis=1)[active])
    np.testing.assert_array_equal(np.asarray(out.last), token)
    np.testing.assert_array_equal(np.asarray(out.cache.lengths), np.asarray(cache.lengths))
    for a, b in zip(jax.tree.leaves(out.cache), jax.tree.leaves(cache), strict=True):
        close(a, b)
    counts = np.asarray(out.sampling.output_counts)
    assert counts.sum(axis=1).tolist() == [n, n, 0, n]
    assert counts[0].tolist() == np.bincount(np.asarray(out.tokens)[0], minlength=cfg.vocab_size).tolist()


def test_decode_many_runs_as_many_steps_as_it_is_told():
    run = partial(steps.decode_many, params(LLAMA), LLAMA, tokens(LLAMA, B, seed=4))
    whole = run(filled(LLAMA), greedy(LLAMA), 7)
    for k in (0, 1, 3, 7, 9):
        part = run(filled(LLAMA), greedy(LLAMA), 7, steps=k)
        ran = min(k, 7)
        np.testing.assert_array_equal(np.asarray(part.tokens)[:, :ran], np.asarray(whole.tokens)[:, :ran])
        assert (np.asarray(part.tokens)[:, ran:] == 0).all()
        np.testing.assert_array_equal(np.asarray(part.cache.lengths), np.array([24, 9, 0, 17]) + ran)
    # Two calls that go on from one another are one.
    part = run(filled(LLAMA), greedy(LLAMA), 7, steps=3)
    rest = steps.decode_many(params(LLAMA), LLAMA, part.last, part.cache, part.sampling, 7, steps=4)
    np.testing.assert_array_equal(np.asarray(rest.tokens)[:, :4], np.asarray(whole.tokens)[:, 3:])


def test_decode_many_has_no_token_for_a_row_without_room():
    cache = filled(LLAMA, capacity=128).replace(lengths=jnp.array([126, 9, 0, 17]))
    out = steps.decode_many(params(LLAMA), LLAMA, tokens(LLAMA, B), cache, greedy(LLAMA), 7, check=False)
    said = np.asarray(out.tokens)
    assert (said[0, :2] >= 0).all()
    assert (said[0, 2:] == -1).all()
    assert (said[1:] >= 0).all()
