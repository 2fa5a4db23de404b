"""The engine on a tiny model: every request gets what it gets alone, whatever goes on around it; and faults."""

import asyncio
import contextlib
import dataclasses
import random
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pdx.engine.engine import Engine
from pdx.engine.request import EngineRequest
from pdx.errors import ContextLengthError, EngineError, QueueFullError, RequestError
from pdx.sampling.options import SamplingOptions
from tests.support import tiny_model
from tests.support.random_requests import random_requests, same


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def windowed(model):
    """The same with a window on its second layer: two page groups."""
    return tiny_model.with_window(model)


TINY = {"slots": 4, "token_budget": 16, "page_size": 8, "max_context": 160, "num_logprobs": 2}
TIGHT = TINY | {"pages": 22}  # little more than one request of the whole context needs


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, pdx.EngineConfig(**TINY)) as engine:
        yield engine


@pytest.fixture(scope="module")
def tight(model):
    with Engine(model, pdx.EngineConfig(**TIGHT)) as engine:
        yield engine


def at_rest(engine):
    """Wait until nothing is under way; all pages must have come back by then."""
    for _ in range(2000):
        metrics = engine.metrics()
        if not (metrics.running or metrics.waiting or engine.scheduler.draining):
            break
        time.sleep(0.005)
    assert (metrics.running, metrics.waiting, metrics.pages_used) == (0, 0, 0)
    return metrics


def test_requests_get_what_they_get_alone(model, engine):
    prompts, options = random_requests(random.Random(1), 24)
    for got, expected in zip(engine.generate(prompts, options), pdx.generate(model, prompts, options), strict=True):
        same(got, expected)
    metrics = at_rest(engine)
    assert metrics.hit_tokens > 0
    assert metrics.decode_tokens > metrics.steps > 0


def test_tiny_pools_arrivals_and_cancellations_change_nothing(model, tight):
    rng = random.Random(2)
    prompts, options = random_requests(rng, 40)
    expected = pdx.generate(model, prompts, options)
    streams, cancelled = [], set()
    for i, (prompt, option) in enumerate(zip(prompts, options, strict=True)):
        streams.append(tight.submit(prompt, option, index=i))
        time.sleep(rng.choice([0, 0, 0.01]))
        if rng.random() < 0.2:
            victim = rng.randrange(i + 1)
            streams[victim].cancel()
            cancelled.add(victim)
    for i, stream in enumerate(streams):
        got = stream.result(60)
        assert got.index == i
        if got.finish_reason == "cancelled":
            assert i in cancelled
            assert got.token_ids == expected[i].token_ids[: len(got.token_ids)]
        else:
            same(got, expected[i])
    metrics = at_rest(tight)
    assert metrics.preemptions > 0
    assert metrics.pages_cached <= metrics.pages == 22


@pytest.mark.parametrize(
    "settings",
    [
        {"overlap": False},
        pytest.param({"chunked_prefill": False}, marks=pytest.mark.slow),
        pytest.param({"prefix_cache": False, "pages": 44}, marks=pytest.mark.slow),
        pytest.param({"kv_dtype": "int8"}, marks=pytest.mark.slow),
    ],
    ids=lambda s: next(iter(s)),
)
def test_every_setting_gives_the_same_tokens(windowed, settings):
    """Over two page groups, one of them with a window."""
    prompts, options = random_requests(random.Random(3), 14)
    expected = pdx.generate(windowed, prompts, options, kv_dtype=settings.get("kv_dtype"))
    with Engine(windowed, pdx.EngineConfig(**TIGHT | {"num_logprobs": 2} | settings)) as engine:
        for got, want in zip(engine.generate(prompts, options), expected, strict=True):
            same(got, want)
        assert (at_rest(engine).hit_tokens > 0) == engine.config.prefix_cache


def test_nothing_is_compiled_after_the_warm_up(tight, count_compiles):
    prompts, options = random_requests(random.Random(4), 20)
    with count_compiles() as compiles:
        tight.generate(prompts, options)
        tight.submit(EngineRequest((5, 6, 7), mask=lambda ids: None)).result(60)
        assert (compiles(), tight.metrics().compiles) == (0, 0)


@pytest.mark.slow
def test_deterministic_results_are_equal_bit_for_bit(windowed):
    rng = random.Random(5)
    prompts, options = random_requests(rng, 16, tokens=60)
    options = [dataclasses.replace(o, logprobs=2) for o in options]
    with Engine(windowed, pdx.EngineConfig(**TIGHT | {"pages": 20, "deterministic": True})) as engine:
        alone = [engine.generate([p], [o])[0] for p, o in zip(prompts, options, strict=True)]
        before = engine.metrics().preemptions
        order = rng.sample(range(16), 16)
        with engine._work:  # the engine's thread sees all of them at once
            streams = [engine.submit(prompts[i], options[i]) for i in order]
        for i, stream in zip(order, streams, strict=True):
            got = stream.result(120)
            assert (got.token_ids, got.logprobs) == (alone[i].token_ids, alone[i].logprobs)
        metrics = at_rest(engine)
    assert metrics.preemptions > before
    assert (metrics.hit_tokens > 0, metrics.compiles) == (True, 0)


@pytest.mark.slow  # it compiles for minutes
def test_mesh(tmp_path, model):
    prompts, options = random_requests(random.Random(6), 6, tokens=12)
    sharded = pdx.load(tiny_model.make(tmp_path), mesh="model=2")
    with Engine(sharded, pdx.EngineConfig(**TINY)) as engine:
        got = engine.generate(prompts, options)
        assert engine.metrics().compiles == 0
    for a, b in zip(got, pdx.generate(model, prompts, options), strict=True):
        same(a, b)


def test_streams_for_asyncio(engine):
    expected = engine.generate(["Hello"], max_tokens=30, ignore_eos=True)[0]

    async def one():
        outputs = [o async for o in engine.stream("Hello", max_tokens=30, ignore_eos=True)]
        assert [t for o in outputs for t in o.token_ids] == expected.token_ids
        assert "".join(o.text for o in outputs) == expected.text
        assert [o.completion is not None for o in outputs] == [False] * 29 + [True]
        return outputs[-1].completion

    async def many():
        return await asyncio.gather(*[one() for _ in range(9)])

    for completion in asyncio.run(many()):
        timing = completion.timing
        assert len(timing.gaps_s) == 29
        assert 0 <= timing.queue_s < timing.ttft_s < timing.e2e_s
        assert sum(timing.gaps_s) == pytest.approx(timing.e2e_s - timing.ttft_s)
        assert timing.gap_s(0.0) <= timing.gap_s(0.5) <= timing.gap_s(1.0)


def test_leaving_a_stream_early_cancels_it(engine):
    before = engine.metrics().cancelled

    async def leave():
        stream = engine.stream("Hello", max_tokens=100, ignore_eos=True)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave())
    assert at_rest(engine).cancelled == before + 1


def test_streams_for_threads(engine):
    results = []

    def client(i):
        stream = engine.submit([20 + i] * 9, max_tokens=12, ignore_eos=True, index=i)
        text = "".join(output.text for output in stream)
        results.append((stream.completion.text == text, len(stream.completion.token_ids)))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert results == [(True, 12)] * 8


def test_masks_from_the_host(engine):
    """Only even ids, then one id, by what has been generated; the neighbour does not notice."""
    vocab = engine.model.config.vocab_size
    even = np.arange(vocab) % 2 == 0
    seen = []

    def mask(ids):
        seen.append(list(ids))
        return even if len(ids) < 6 else np.arange(vocab) == 31 if len(ids) == 6 else None

    options = SamplingOptions(max_tokens=9, ignore_eos=True, temperature=1.3, seed=3, logprobs=1)
    plain = engine.generate(["Hello"], max_tokens=30, ignore_eos=True)[0]
    neighbour = engine.submit("Hello", max_tokens=30, ignore_eos=True)
    got = engine.submit(EngineRequest((50, 51, 52), options, mask=mask)).result(60)
    assert all(t % 2 == 0 for t in got.token_ids[:6])
    assert got.token_ids[6] == 31
    assert seen == [got.token_ids[:n] for n in range(9)]
    assert neighbour.result(60).token_ids == plain.token_ids
    # Log-probabilities are the model's own, not those of what the mask leaves.
    ids = [50, 51, 52, *got.token_ids]
    logits = pdx.forward(engine.model.params, engine.model.config, jnp.asarray([ids])).logits[0, 2:-1]
    norm = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    expected = np.asarray(logits)[np.arange(9), got.token_ids] - norm
    np.testing.assert_allclose([t.logprob for t in got.logprobs], expected, atol=1e-4)


@pytest.mark.parametrize("mask", [lambda ids: np.zeros(258, bool), lambda ids: np.ones(3, bool), lambda ids: 1 / 0])
def test_a_mask_that_makes_no_sense_fails_its_request_alone(engine, mask):
    neighbour, told = engine.submit("Hello", max_tokens=20, ignore_eos=True), []
    with pytest.raises(EngineError, match="mask"):
        engine.submit(EngineRequest((50, 51), mask=mask), on_output=told.append).result(60)
    assert (len(neighbour.result(60).token_ids), ["mask" in str(x.error) for x in told]) == (20, [True])


def test_a_callback_that_raises_fails_its_request_alone(engine):
    def callback(output):
        raise KeyError("mine")

    neighbour = engine.submit("Hello", max_tokens=20, ignore_eos=True)
    with pytest.raises(EngineError, match=r"callback raised KeyError.*mine"):
        engine.submit("Hello", max_tokens=20, on_output=callback).result(60)
    assert len(neighbour.result(60).token_ids) == 20
    at_rest(engine)


def test_an_event_loop_that_went_away_costs_its_request_alone(engine):
    async def abandon():
        request = engine.submit("Hello", max_tokens=100, ignore_eos=True)
        waiting = asyncio.ensure_future(request.__anext__())
        await asyncio.sleep(0)
        return waiting

    asyncio.run(abandon())
    assert len(engine.submit("x", max_tokens=5, ignore_eos=True).result(60).token_ids) == 5
    at_rest(engine)


def test_nan_logits_fail_their_request_alone(engine, monkeypatch):
    poisoned = engine.model.tokenizer.encode("x" * 30)
    sample = engine.runner.sample

    def poison(plan, logits, allowed=None):
        bad = np.zeros((engine.config.slots, 1), bool)
        for chunk in plan.chunks:
            bad[chunk.slot] = chunk.sequence.request.prompt == tuple(poisoned) and chunk.start > 33
        return sample(plan, jnp.where(bad, jnp.nan, logits), allowed)

    monkeypatch.setattr(engine.runner, "sample", poison)
    neighbour = engine.submit("Hello", max_tokens=20, ignore_eos=True)
    stream = engine.submit(poisoned, max_tokens=20, ignore_eos=True)
    with pytest.raises(EngineError, match=r"token 34 .*NaN"):
        stream.result(60)
    assert len(list(zip(range(9), stream.row.token_ids, strict=False))) == 5  # what came before it is there
    assert len(neighbour.result(60).token_ids) == 20
    at_rest(engine)


@pytest.mark.parametrize("where", ["forward", "fetch"])
def test_a_step_that_fails_fails_its_requests_and_the_engine_goes_on(engine, monkeypatch, where):
    expected = engine.generate(["Hello"], max_tokens=20, ignore_eos=True)[0]
    real, calls = getattr(engine.runner, where), iter(range(1000))

    def fail(*args, **kwargs):
        if next(calls) == 4:
            raise RuntimeError("out of paper")
        return real(*args, **kwargs)

    monkeypatch.setattr(engine.runner, where, fail)
    failed = [engine.submit("Hello", max_tokens=30, ignore_eos=True) for _ in range(3)]
    waiting = [engine.submit("Hello", max_tokens=20, ignore_eos=True) for _ in range(4)]
    for stream in failed:
        with pytest.raises(EngineError, match="out of paper"):
            stream.result(60)
    # Those that were not in that step, or came later, know nothing of it.
    done = [w.result(60) for w in waiting if w.error is None]
    assert len(done) >= 3
    assert all(c.token_ids == expected.token_ids for c in done)
    at_rest(engine)


def test_timeouts_end_with_what_there_is(engine):
    options = SamplingOptions(max_tokens=140, ignore_eos=True)
    done = engine.submit(EngineRequest((40, 41), options, timeout_s=0.05)).result(60)
    assert (done.finish_reason, len(done.token_ids) < 140) == ("timeout", True)
    waiting = [engine.submit("Hello", max_tokens=100, ignore_eos=True) for _ in range(5)]
    assert engine.submit(EngineRequest((40,), options, timeout_s=0.0)).result(60).token_ids == []
    for stream in waiting:
        stream.cancel()
    at_rest(engine)


def test_what_makes_no_sense_is_said(engine):
    for prompt, settings, error, says in (
        ("", {}, RequestError, "empty"),
        ([5, 100_000], {}, RequestError, "100000"),
        ("x" * 150, {"max_tokens": 20}, ContextLengthError, "max_context"),
        ("x", {"logprobs": 5}, RequestError, "num_logprobs"),
        ("x", {"logit_bias": {9999: 1.0}}, RequestError, "9999"),
        (EngineRequest((5,)), {"max_tokens": 3}, RequestError, "its own options"),
    ):
        with pytest.raises(error, match=says):
            engine.submit(prompt, **settings)


def test_a_full_queue_pushes_back_and_generate_waits_for_it(model, tight):
    tight.scheduler.config, config = dataclasses.replace(tight.config, max_queue=2), tight.scheduler.config
    tight.config, whole = tight.scheduler.config, tight.config
    try:
        for _ in range(tight.config.slots + 2):
            with contextlib.suppress(QueueFullError):
                tight.submit("Hello", max_tokens=60, ignore_eos=True)
        with pytest.raises(QueueFullError, match="try again"):
            [tight.submit("Hello", max_tokens=60, ignore_eos=True) for _ in range(6)]
        assert len(tight.generate(["Hello"] * 12, max_tokens=3, ignore_eos=True)) == 12
    finally:
        tight.scheduler.config, tight.config = config, whole
    at_rest(tight)


def test_closing_finishes_or_cancels(model):
    for cancel in (False, True):
        engine = Engine(model, pdx.EngineConfig(**TINY)).start()
        streams = [engine.submit("Hello", max_tokens=60, ignore_eos=True) for _ in range(6)]
        engine.close(cancel=cancel)
        reasons = {s.result(0).finish_reason for s in streams}
        assert reasons == ({"cancelled"} if cancel else {"length"})
        with pytest.raises(EngineError, match="closed"):
            engine.submit("x")
        engine.close()  # nothing happens


@pytest.mark.slow
def test_soak(windowed):
    """2,000 mixed requests: all pages come back, memory stays, nothing compiles."""
    import gc

    import jax

    rng = random.Random(7)
    prompts, options = random_requests(rng, 2000, tokens=30)
    config = pdx.EngineConfig(**TIGHT | {"pages": 30, "policy": "shortest", "max_queue": 64})
    with Engine(windowed, config) as engine:
        sizes = []
        for at in range(0, 2000, 250):
            part = slice(at, at + 250)
            done = engine.generate(prompts[part], options[part])
            assert len(done) == 250
            gc.collect()
            nodes = len(list(engine.scheduler.memory.tree.nodes()))
            sizes.append((len(jax.live_arrays()), len(engine._driver.streams), nodes))
        metrics = at_rest(engine)
    assert metrics.compiles == 0
    assert metrics.preemptions > 0
    assert metrics.finished == 2000
    assert all(streams == 0 and nodes <= 60 for _, streams, nodes in sizes)
    assert max(live for live, _, _ in sizes) <= sizes[0][0] + 4
