"""`generate`, `stream` and the engine, used roughly: side by side, from threads, with odd types; and memory."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pdx.cache.idle import IdleCaches
from pdx.engine.request import EngineRequest
from pdx.errors import EngineError, RequestError
from pdx.generation.generator import Generator
from pdx.generation.kept import _MODEL_CACHES, MOST_GENERATORS, generator
from pdx.generation.prompts import prepared_rows
from pdx.sampling.options import SamplingOptions
from tests.support import tiny_model

B = 2
PROMPTS = ["Hello", "abc"]
ASKED = {"max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def expected(model):
    return ids(pdx.generate(model, PROMPTS, **ASKED))


def ids(done):
    return [c.token_ids for c in done]


def finished(pieces):
    return ids(sorted((p.completion for p in pieces if p.completion), key=lambda c: c.index))


# Runs side by side.


def test_streams_may_be_interleaved_and_nested(model, expected):
    one, two = ([], [])
    for a, b in zip(pdx.stream(model, PROMPTS, **ASKED), pdx.stream(model, PROMPTS, **ASKED), strict=True):
        one.append(a)
        two.append(b)
        assert ids(pdx.generate(model, PROMPTS[0], **ASKED)) == expected[:1]
    assert finished(one) == finished(two) == expected


def test_threads_share_programs_and_nothing_else(model, expected, count_compiles):
    # omlx 463: two requests to one model at the same time left its cache broken for good.
    fresh = pdx.load(model.path)
    gate, found = threading.Barrier(4), {}

    def work(name):
        gate.wait()
        found[name] = ids(pdx.generate(fresh, PROMPTS, **ASKED))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 4
    with count_compiles() as compiles:
        work_alone = ids(pdx.generate(fresh, PROMPTS, **ASKED))
    assert (work_alone, compiles()) == (expected, 0)


@pytest.mark.parametrize("ended", ["closed", "collected", "thrown into"])
def test_a_run_that_ends_early_gives_its_cache_back(model, expected, ended):
    run = Generator(model, rows=2, capacity=256)
    for _ in range(2):
        stream = run.run(prepared_rows(model, PROMPTS, [SamplingOptions(**ASKED)] * 2))
        next(stream)
        held = weakref.ref(stream.gi_frame.f_locals["held"].cache.layers[0].k)
        assert run._caches.idle_bytes == 0
        if ended == "closed":
            stream.close()
        elif ended == "thrown into":
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        del stream
        gc.collect()
        assert held() is not None
        assert run._caches.idle_bytes > 0


def test_a_step_that_fails_takes_its_cache_along(model, expected, monkeypatch):
    run = Generator(model, rows=2, capacity=256)

    def rows():
        return prepared_rows(model, PROMPTS, [SamplingOptions(**ASKED)] * 2)

    list(run.run(rows()))
    assert run._caches.idle_bytes > 0
    with monkeypatch.context() as patch:
        patch.setattr(run, "_active", lambda requests: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(run.run(rows()))
    assert run._caches.idle_bytes == 0
    again = rows()
    list(run.run(again))
    assert [r.token_ids for r in again] == expected


# Memory.


def test_idle_caches_are_bounded_and_the_least_recently_used_go():
    made = []

    def lend(key, size):
        def make():
            made.append(key)
            return [key]

        return caches.lend(key, size, make)

    caches = IdleCaches(limit=100)
    for key in ("a", "b", "a", "c"):
        with lend(key, 40):
            assert caches.idle_bytes <= 60  # what is idle makes room for what is used
    assert (made, caches.idle_bytes) == (["a", "b", "c"], 80)
    with lend("a", 40):
        pass
    with lend("b", 40):
        pass
    assert made == ["a", "b", "c", "b"]
    with lend("huge", 1000):
        assert caches.idle_bytes == 0
    assert caches.idle_bytes == 1000  # the last one stays, for the next call of its shape
    with lend("a", 40) as held:
        assert caches.idle_bytes == 0
        held.cache = None  # a step has it
    assert caches.idle_bytes == 0


def cache_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays() if x.ndim == 4)


@pytest.mark.slow
def test_many_shapes_leave_no_more_than_the_bound(model):
    one = pdx.load(model.path)
    pdx.generate(one, "x", max_tokens=1)
    before = cache_bytes()
    kept = _MODEL_CACHES[one]
    kept.caches.limit = 1 << 20
    for rows in range(1, 7):
        pdx.generate(one, ["x"] * rows, max_tokens=1, logprobs=rows % 2)
        assert cache_bytes() - before <= kept.caches.limit
    for rows in range(1, MOST_GENERATORS + 9):
        generator(one, rows=rows, tokens=10, kernels="auto", num_logprobs=0)
    assert len(kept.generators) == MOST_GENERATORS


@pytest.mark.slow
def test_a_model_that_is_deleted_frees_everything(model):
    before = {id(x) for x in jax.live_arrays()}
    mine = pdx.load(model.path)
    for settings in ({}, {"logprobs": 1}, {"capacity": 512}):
        pdx.generate(mine, PROMPTS, **ASKED, **settings)
    stream = pdx.stream(mine, PROMPTS, **ASKED)
    next(stream)
    stream.close()
    leaf = weakref.ref(mine.params["embed"])
    del mine, stream
    gc.collect()
    assert leaf() is None
    assert [x.shape for x in jax.live_arrays() if id(x) not in before and x.ndim > 1] == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_token": 3}, "max_token is no setting: did you mean max_tokens"),
        ({"capacity": "many"}, "capacity is 'many'"),
        ({"capacity": True}, "capacity is True"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_size": np.float32(2)}, r"batch_size is 2.0"),
        ({"kv_dtype": jnp.int32}, "is not one of auto, f32, bf16, f16, int8"),
        ({"kv_dtype": 5}, "kv_dtype 5 is not one"),
        ({"max_tokens": jnp.array(True)}, "max_tokens is True"),
        ({"temperature": np.bool_(True)}, "temperature is True"),
        ({"logit_bias": {5: -float("inf"), 3: np.nan}}, "token 3"),
        ({"logit_bias": dict.fromkeys(range(258), -float("inf"))}, "bans every token"),
    ],
)
def test_settings_of_generate_that_make_no_sense(model, settings, says):
    with pytest.raises(RequestError, match=says):
        pdx.generate(model, "hi", **settings)


@pytest.mark.parametrize(
    "scalar", [np.int32, np.int64, jnp.int32, lambda x: np.array(x)], ids=["int32", "int64", "jax", "array"]
)
def test_scalars_of_numpy_and_jax_are_numbers(model, expected, scalar):
    settings = {
        "max_tokens": scalar(20),
        "top_k": scalar(5),
        "seed": scalar(3),
        "capacity": scalar(300),
        "batch_size": scalar(2),
        "stop_token_ids": [scalar(257)],
        "temperature": np.float32(0),
        "top_p": jnp.float32(0.5),
        "logit_bias": {np.int64(5): np.float16(0)},
    }
    assert ids(pdx.generate(model, PROMPTS, ignore_eos=np.bool_(True), **settings)) == expected
    config = pdx.EngineConfig(slots=scalar(2), pages=[scalar(9)], memory_share=np.float32(0.5), overlap=np.bool_(False))
    assert config == pdx.EngineConfig(slots=2, pages=(9,), memory_share=0.5, overlap=False)
    assert type(config.slots) is int
    assert EngineRequest(np.array([1, 2]), priority=scalar(1)).prompt == (1, 2)


# The engine.


def test_an_engine_used_roughly(model, expected):
    engine = pdx.Engine(model, pdx.EngineConfig(slots=2, token_budget=16))
    waited = []

    def wait_inside(output):
        if output.completion is None:
            engine.submit("x", max_tokens=1).result()

    with engine:
        assert ids(engine.generate("Hello", **ASKED)) == expected[:1]
        assert len(engine.generate([5, 6, 7], max_tokens=1)) == 1
        assert len(engine.generate(EngineRequest((5, 6)))) == 1
        assert ids(engine.generate(PROMPTS, (SamplingOptions(**ASKED),) * 2)) == expected
        for call, says in (
            (lambda: engine.submit("hi", {"max_tokens": 3}), "options must be SamplingOptions"),
            (lambda: engine.submit("hi", max_token=3), "did you mean max_tokens"),
            (lambda: engine.submit("hi", on_output="print"), "on_output is 'print'"),
            (lambda: engine.submit(None), "a prompt is a text"),
            (lambda: engine.generate(None), "a prompt is a text"),
            (lambda: engine.generate("hi", [SamplingOptions()], max_tokens=3), "in each request's options"),
        ):
            with pytest.raises(RequestError, match=says):
                call()
        # Waiting in the engine's own thread would never end.
        stream = engine.submit("Hello", on_output=wait_inside, **ASKED)
        with pytest.raises(EngineError, match="a callback waits for a request of its own engine"):
            waited.append(stream.result(60))
    engine.close()
    engine.close()
    for call in (lambda: engine.submit("hi"), lambda: engine.generate("hi"), engine.start, engine.__enter__):
        with pytest.raises(EngineError, match="the engine is closed"):
            call()
    assert engine.metrics().running == 0


def test_a_mask_and_a_bias_that_leave_no_token_fail_their_request(model):
    def only_seven(_):
        mask = np.zeros(model.config.vocab_size, bool)
        mask[7] = True
        return mask

    with pdx.Engine(model, pdx.EngineConfig(slots=2, token_budget=16)) as engine:
        banned = SamplingOptions(max_tokens=2, logit_bias={7: -float("inf")})
        with pytest.raises(EngineError, match="allow at least one token"):
            engine.submit(EngineRequest((5, 6), banned, mask=only_seven)).result(60)
        allowed = EngineRequest((5, 6), SamplingOptions(max_tokens=2, ignore_eos=True), mask=only_seven)
        assert engine.submit(allowed).result(60).token_ids == [7, 7]
