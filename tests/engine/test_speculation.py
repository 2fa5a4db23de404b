"""An engine that drafts: every request gets what it gets without drafts, whatever goes on around it."""

import dataclasses
import random
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import pdx
from pdx.engine.engine import Engine
from pdx.engine.request import EngineRequest
from pdx.errors import EngineError, RequestError
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState, filtered_logits
from pdx.speculative import acceptance
from pdx.speculative.options import Speculation
from pdx.speculative.proposers import NGram
from pdx.weights.checkpoint import save
from tests.support import heads, tiny_model
from tests.support.random_requests import random_requests, same

REPEATS = "ab cd ab cd ab cd ab"  # its n-grams draft from the first token on
TIGHT = {"slots": 4, "token_budget": 16, "page_size": 8, "max_context": 160, "num_logprobs": 2, "pages": 24}
NGRAM = {"speculate": "ngram", "draft_length": 3}
# Chance finds a smaller statistic than this one in all but so many cases.
UNLIKELY = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a window on its second layer: two page groups."""
    return tiny_model.with_window(pdx.load(tiny_model.make(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("draft"), seed=1))


@pytest.fixture(scope="module")
def engine(model, request):
    """One that drafts with n-grams, or as a test names it."""
    speculate = asked(getattr(request, "param", "ngram"), model)
    with Engine(model, pdx.EngineConfig(**TIGHT | NGRAM | {"speculate": speculate})) as engine:
        yield engine


def asked(proposer, model, draft=None):
    """`speculate` of an engine; a head and a draft model have random weights."""
    if proposer == "eagle":
        return Speculation("eagle", model=heads.make(model))
    return Speculation("draft", model=draft) if proposer == "draft" else proposer


with_a_head_too = pytest.mark.parametrize(
    "engine", ["ngram", pytest.param("eagle", marks=pytest.mark.slow)], indirect=True
)


def check_all(engine, prompts, options, expected):
    """All at once, and nothing is left behind."""
    for got, want in zip(engine.generate(prompts, options), expected, strict=True):
        same(got, want)
    metrics = engine.metrics()
    assert (metrics.compiles, metrics.pages_used) == (0, 0)
    return metrics


def test_requests_get_what_they_get_alone(model, engine):
    """At any temperature: a draft found in the text is kept if it is the token that plain decoding draws."""
    prompts, options = random_requests(random.Random(1), 30)
    metrics = check_all(engine, prompts, options, pdx.generate(model, prompts, options))
    counts = metrics.speculation
    assert counts.kept > 0 < counts.by_length[0]
    assert set(counts.by_length) <= {0, 1, 2, 3}
    assert metrics.hit_tokens > 0 < metrics.preemptions


@with_a_head_too
def test_a_request_can_opt_out_and_each_is_counted(engine):
    options = SamplingOptions(max_tokens=40, ignore_eos=True)
    ids = tuple(engine.model.tokenizer.encode(REPEATS))
    alone, drafted = (
        engine.submit(EngineRequest(ids, options, speculate=speculate)).result(60) for speculate in (False, True)
    )
    assert alone.token_ids == drafted.token_ids
    assert alone.speculation is None
    counts = drafted.speculation
    assert counts.rounds + counts.kept == 39  # the first token comes from the prompt
    assert 0 < counts.kept <= counts.drafted


def test_drafts_make_steps_fewer(engine):
    def steps(speculate):
        before = engine.metrics().steps
        prompt = tuple(engine.model.tokenizer.encode(REPEATS))
        engine.submit(
            EngineRequest(prompt, SamplingOptions(max_tokens=60, ignore_eos=True), speculate=speculate)
        ).result(60)
        return engine.metrics().steps - before

    assert steps(True) < 0.7 * steps(False)


@with_a_head_too
def test_stop_strings_and_stop_tokens_end_inside_a_round(engine):
    plain = engine.generate([REPEATS], max_tokens=40, ignore_eos=True)[0]
    for settings in ({"stop": plain.text[20:22]}, {"stop_token_ids": (plain.token_ids[18],)}, {"max_tokens": 17}):
        settings = {"max_tokens": 40, "ignore_eos": True} | settings
        same(engine.generate([REPEATS], **settings)[0], pdx.generate(engine.model, [REPEATS], **settings)[0])


@with_a_head_too
def test_masks_apply_to_every_drafted_position(engine):
    """Only even ids: a mask for each drafted token, up to the first one that it forbids."""
    vocab, seen = engine.model.config.vocab_size, []

    def mask(ids):
        seen.append(tuple(ids))
        return np.arange(vocab) % 2 == 0

    ids = tuple(engine.model.tokenizer.encode(REPEATS))
    for temperature in (0.0, 1.0)[: 2 if engine.config.speculate.proposer == "ngram" else 1]:
        options = SamplingOptions(max_tokens=30, ignore_eos=True, temperature=temperature, seed=5)
        want = engine.submit(EngineRequest(ids, options, mask=mask, speculate=False)).result(60)
        seen.clear()
        got = engine.submit(EngineRequest(ids, options, mask=mask)).result(60)
        assert got.token_ids == want.token_ids
        assert all(t % 2 == 0 for t in got.token_ids)
        assert {tuple(got.token_ids[:n]) for n in range(30)} <= set(seen)
        assert max(map(len, seen)) <= 30 + 3


def test_a_mask_that_fails_behind_a_draft_fails_its_request_alone(engine):
    ids = tuple(engine.model.tokenizer.encode(REPEATS))
    neighbour = engine.submit(REPEATS, max_tokens=20, ignore_eos=True)
    options = SamplingOptions(max_tokens=20, ignore_eos=True)
    with pytest.raises(EngineError, match="mask"):
        engine.submit(EngineRequest(ids, options, mask=lambda ids: None if len(ids) < 4 else 1 / 0)).result(60)
    same(neighbour.result(60), pdx.generate(engine.model, [REPEATS], max_tokens=20, ignore_eos=True)[0])


@with_a_head_too
def test_nan_logits_behind_a_draft_fail_their_request_alone(engine, monkeypatch):
    sample = engine.runner.sample

    def poison(plan, scored, allowed=None):
        bad = plan.has_drafts and any(len(c.sequence.tokens) > 30 for c in plan.chunks)
        return sample(plan, scored.replace(logits=scored.logits * (jnp.nan if bad else 1)), allowed)

    monkeypatch.setattr(engine.runner, "sample", poison)
    with pytest.raises(EngineError, match="NaN"):
        engine.submit(REPEATS, max_tokens=60, ignore_eos=True).result(60)
    monkeypatch.undo()
    assert len(engine.submit(REPEATS, max_tokens=9, ignore_eos=True).result(60).token_ids) == 9


@with_a_head_too
def test_a_failed_step_is_recovered_from(engine, monkeypatch):
    real, calls = engine.runner.fetch, iter(range(1000))

    def fail(*args, **kwargs):
        if next(calls) == 3:
            raise RuntimeError("out of paper")
        return real(*args, **kwargs)

    want = engine.generate([REPEATS], max_tokens=20, ignore_eos=True)[0]
    monkeypatch.setattr(engine.runner, "fetch", fail)
    with pytest.raises(EngineError, match="out of paper"):
        engine.submit(REPEATS, max_tokens=30, ignore_eos=True).result(60)
    same(engine.generate([REPEATS], max_tokens=20, ignore_eos=True)[0], want)


@with_a_head_too
def test_a_request_that_is_cancelled_before_it_joins_harms_nobody(engine, monkeypatch):
    """Neither the slot that is counted last, nor a later request with the same prompt."""
    victim = tuple(engine.model.tokenizer.encode("the victim's own words, more than a page of them"))
    real = engine.runner.join_all

    def cancel_first(joins):
        for _, seq in joins:
            if seq.request.prompt == victim:
                engine._driver.cancel(seq)
        real(joins)

    monkeypatch.setattr(engine.runner, "join_all", cancel_first)
    settings = {"ignore_eos": True}
    lengths = (5, 40, 40, 40)  # the first one makes room
    streams = [engine.submit(f"{REPEATS} {i}", max_tokens=n, **settings) for i, n in enumerate(lengths)]
    cancelled = engine.submit(list(victim), max_tokens=20, **settings)
    assert cancelled.result(60).finish_reason == "cancelled"
    for i, (stream, n) in enumerate(zip(streams, lengths, strict=True)):
        same(stream.result(60), pdx.generate(engine.model, [f"{REPEATS} {i}"], max_tokens=n, **settings)[0])
    monkeypatch.undo()
    expected = pdx.generate(engine.model, [list(victim)], max_tokens=20, **settings)[0]
    same(engine.submit(list(victim), max_tokens=20, **settings).result(60), expected)


def test_no_page_of_the_prefix_tree_holds_a_rejected_token(engine):
    """What the tree holds equals, key by key and value by value, what plain prefill makes of the same tokens."""
    engine.generate([REPEATS, "ab ab ab ab", "x y x y x"], max_tokens=60, ignore_eos=True)
    assert engine.metrics().speculation.drafted > engine.metrics().speculation.kept
    model, size, checked = engine.model, engine.config.page_size, 0
    for node in engine.scheduler.memory.tree.nodes():
        path = [node]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        ids = [t for n in reversed(path) for t in n.key]
        if node.pages[0] is None or not ids:
            continue
        cache = pdx.init_cache(model.config, 1, 160, layout="heads_first")
        _, cache = pdx.prefill(model.params, model.config, jnp.asarray([ids]), jnp.array([len(ids)]), cache)
        layer, begin = engine.runner.cache.layers[0], len(ids) - len(node.key)
        for paged, dense in ((layer.k, cache.layers[0].k), (layer.v, cache.layers[0].v)):
            got = np.asarray(paged)[node.pages[0]][:, : len(node.key)]
            np.testing.assert_allclose(got, np.asarray(dense)[0][:, begin : len(ids)], atol=1e-4)
        checked += len(node.key) == size
    assert checked > 8


SETTINGS = [
    {"overlap": False},
    {"chunked_prefill": False},
    {"prefix_cache": False, "pages": 44},
    {"kv_dtype": "int8"},
    {"draft_length": "auto"},
    {"speculate": "self:1"},
    {"speculate": "draft"},
    {"speculate": "draft", "draft_length": "auto", "overlap": False},
    {"speculate": "eagle"},
    {"speculate": "eagle", "kv_dtype": "int8", "overlap": False},
    {"speculate": "eagle", "draft_length": "auto", "chunked_prefill": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()))
def test_every_setting_gives_the_tokens_of_plain_decoding(model, draft, settings):
    """Greedy ones for drafts that are drawn: they take other randomness."""
    prompts, options = random_requests(random.Random(3), 16)
    kv_dtype, settings = settings.get("kv_dtype"), dict(settings)
    if settings.get("speculate", "ngram") != "ngram":
        options = [dataclasses.replace(o, temperature=0.0) for o in options]
    settings["speculate"] = asked(settings.get("speculate", "ngram"), model, draft)
    expected = pdx.generate(model, prompts, options, kv_dtype=kv_dtype)
    with Engine(model, pdx.EngineConfig(**TIGHT | NGRAM | settings)) as engine:
        metrics = check_all(engine, prompts, options, expected)
        is_chosen = engine.config.drafts.draft_length == "auto"  # then a draft that large never pays
        assert metrics.speculation.drafted > 0 or (is_chosen and engine.config.speculate.proposer != "ngram")


@pytest.mark.slow
@pytest.mark.parametrize("proposer", ["ngram", "self:1", "eagle"])
def test_deterministic_results_do_not_depend_on_drafts_bit_for_bit(model, proposer):
    """With and without drafts, alone and under load: the same tokens and log-probabilities, at any temperature."""
    rng = random.Random(5)
    prompts, options = random_requests(rng, 14, tokens=60)
    prompts = [model.tokenizer.encode(REPEATS + p if rng.random() < 0.5 else p) for p in prompts]
    options = [dataclasses.replace(o, logprobs=2) for o in options]
    requests = [(tuple(p), o) for p, o in zip(prompts, options, strict=True)]
    settings = {"token_budget": 24, "deterministic": True, "speculate": asked(proposer, model)}
    with Engine(model, pdx.EngineConfig(**TIGHT | NGRAM | settings)) as engine:
        alone = [engine.submit(EngineRequest(p, o, speculate=False)).result(120) for p, o in requests]
        streams = [engine.submit(EngineRequest(p, o)) for p, o in requests]
        for stream, want in zip(streams, alone, strict=True):
            got = stream.result(120)
            assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
        assert engine.metrics().speculation.kept > 0


@pytest.mark.slow
@pytest.mark.parametrize("proposer", ["ngram", "self:1", "eagle"])
def test_mesh(tmp_path, proposer):
    """Over two devices; the window is no part of it."""
    prompts, options = random_requests(random.Random(6), 6, tokens=40)
    prompts = [REPEATS + p for p in prompts]
    options = [dataclasses.replace(o, temperature=0.0) for o in options]
    files = tiny_model.make(tmp_path)
    model = pdx.load(files, mesh="model=2")
    if proposer == "eagle":
        proposer = f"eagle:{save(heads.make(pdx.load(files)), tmp_path / 'head')}"
    config = pdx.EngineConfig(**TIGHT | {"speculate": proposer, "draft_length": 3})
    with Engine(model, config) as engine:
        got = engine.generate(prompts, options)
        assert engine.metrics().compiles == 0
        assert engine.metrics().speculation.drafted > 0
    for a, b in zip(got, pdx.generate(pdx.load(files), prompts, options), strict=True):
        same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["right", "wrong"])
@pytest.mark.parametrize("proposer", ["draft", "self:1", "eagle"])
def test_drawn_drafts_leave_the_distribution_as_it_is(model, draft, proposer, rule, monkeypatch):
    """Chi-square over many seeds at temperature 1. A rule that keeps every draft fails it."""
    if rule == "wrong":
        monkeypatch.setattr(acceptance, "_by_rejection", lambda logits, offered, *others: offered[:, 0])
        jax.clear_caches()
    speculate = asked(proposer, model, draft)
    ids, settings = (40, 41, 42), {"max_tokens": 3, "ignore_eos": True, "temperature": 1.0, "top_k": 3}
    config = pdx.EngineConfig(
        slots=8, token_budget=32, max_context=64, speculate=speculate, draft_length=2, prefix_cache=False
    )
    with Engine(model, config) as engine:
        requests = [EngineRequest(ids, SamplingOptions(seed=i, **settings)) for i in range(1200)]
        answers = Counter(tuple(c.token_ids) for c in engine.generate(requests))
        assert engine.metrics().speculation.drafted > 1000
    jax.clear_caches()
    expected = {path: 1200 * p for path, p in paths(model, ids, SamplingOptions(seed=0, **settings), 3).items()}
    statistic = sum((answers[path] - n) ** 2 / n for path, n in expected.items())
    is_the_same = set(answers) <= set(expected) and statistic < chi2.isf(UNLIKELY, len(expected) - 1)
    assert is_the_same == (rule == "right")


def paths(model, ids, options, length) -> dict[tuple[int, ...], float]:
    """Every answer that may be drawn, and its probability."""
    if not length:
        return {(): 1.0}
    state = SamplingState.create([options], model.config.vocab_size)
    logits = pdx.forward(model.params, model.config, jnp.asarray([ids])).logits[:, -1]
    p = np.asarray(jax.nn.softmax(filtered_logits(logits, state), axis=-1))[0]
    return {
        (int(t), *rest): float(p[t]) * q
        for t in np.flatnonzero(p > 0)
        for rest, q in paths(model, (*ids, int(t)), options, length - 1).items()
    }


def test_what_makes_no_sense_is_said(model, draft):
    for settings, says in (
        ({"draft_length": "three"}, "draft_length"),
        ({"speculate": "ngrams"}, "ngram"),
        ({"speculate": "ngram", "draft_length": 16}, "draft_length"),
    ):
        with pytest.raises(RequestError, match=says):
            pdx.EngineConfig(**TIGHT, **settings)
    with pytest.raises(RequestError, match="self:2"):
        Engine(model, pdx.EngineConfig(**TIGHT, speculate="self:2"))
    with pytest.raises(RequestError, match="none comes with pdx"):
        Engine(model, pdx.EngineConfig(**TIGHT, speculate=Speculation("eagle")))
    with pytest.raises(RequestError, match="speculate"):
        EngineRequest((5,), speculate="ngram")


def test_a_configuration_can_be_changed_and_keeps_its_drafts():
    config = pdx.EngineConfig(slots=8, token_budget=128, speculate="ngram", draft_length=4)
    assert dataclasses.replace(config, slots=2).drafts == Speculation("ngram", 4)
    assert dataclasses.replace(config, draft_length="auto").drafts == Speculation("ngram")
    assert dataclasses.replace(config, speculate="none").drafts is None
    own = pdx.EngineConfig(token_budget=64, speculate=Speculation("ngram", 3))
    assert (own.drafts.draft_length, dataclasses.replace(own, draft_length=5).drafts.draft_length) == (3, 5)
    assert config.draft_ladder == (16, 32, 40)
    assert pdx.EngineConfig(slots=1, token_budget=128, speculate="ngram").draft_ladder == (4, 8)
    assert NGram.prior[0] < NGram.prior[-1]
