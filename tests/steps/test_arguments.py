"""Arguments of the Python API that do not fit: used-up caches, odd types and shapes, what makes no sense."""

import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pdx.engine.request import EngineRequest
from pdx.errors import DonatedError, ModelNotFoundError, PdxError, RequestError
from pdx.sampling.options import SamplingOptions
from tests.support.models import LLAMA, params

B = 2


# Caches that are used up.


def test_a_cache_that_was_given_to_a_step_is_named_as_such():
    weights, tokens = params(LLAMA), np.full((B, 3), 5, np.int32)
    lengths, active = np.array([3, 2]), np.ones(B, bool)

    def used_up():
        cache = pdx.init_cache(LLAMA, B, 128)
        pdx.decode_step(weights, LLAMA, tokens[:, 0], active, cache)
        return cache

    sampling = pdx.SamplingState.create([SamplingOptions()] * B, LLAMA.vocab_size)
    for call in (
        lambda c: pdx.prefill(weights, LLAMA, tokens, lengths, c, check=False),
        lambda c: pdx.prefill(weights, LLAMA, tokens, lengths, c),
        lambda c: pdx.decode_step(weights, LLAMA, tokens[:, 0], active, c, check=False),
        lambda c: pdx.verify(weights, LLAMA, tokens, lengths, c),
        lambda c: pdx.decode_many(weights, LLAMA, tokens[:, 0], c, sampling, 2),
        lambda c: pdx.forward(weights, LLAMA, tokens, c),
        lambda c: c.truncate(np.zeros(B, np.int32)),
        lambda c: pdx.prefill(weights, LLAMA, tokens, lengths, c.replace(lengths=jnp.zeros(B, jnp.int32))),
    ):
        with pytest.raises(DonatedError, match=r"this cache was given to an earlier step"):
            call(used_up())
    cache = pdx.init_cache(LLAMA, B, 128)
    out = pdx.decode_many(weights, LLAMA, tokens[:, 0], cache, sampling, 2)
    with pytest.raises(DonatedError, match="this sampling state was given"):
        pdx.decode_many(weights, LLAMA, tokens[:, 0], out.cache, sampling, 2)


def test_a_paged_cache_that_was_given_to_a_step_is_named_as_such():
    given = {"block_tables": np.zeros((1, 1, 1), int), "lengths": [2], "query_starts": [0, 2]}

    def step(cache):
        return pdx.mixed_step(params(LLAMA), LLAMA, [5, 6], cache, **given)

    cache = pdx.init_paged_cache(LLAMA, 2, page_size=16)
    _, after = step(cache)
    copied = pdx.copy_pages(after, 0, [0], [1])
    for used in (cache, after):
        for call in (step, lambda c: pdx.copy_pages(c, 0, [0], [1])):
            with pytest.raises(DonatedError, match="this cache was given"):
                call(used)
    step(copied)


# Types.


def test_lists_are_taken_as_arrays():
    weights = params(LLAMA)

    def both(convert):
        cache = pdx.init_cache(LLAMA, convert(2), convert(128))
        _, cache = pdx.prefill(weights, LLAMA, convert([[5, 6], [7, 0]]), convert([2, 1]), cache)
        logits, cache = pdx.decode_step(weights, LLAMA, convert([8, 9]), convert([True, False]), cache)
        return np.asarray(logits[0]), cache.truncate(convert([1, 1])).lengths.tolist()

    plain = both(lambda x: x)
    for convert in (np.array, jnp.array):
        logits, lengths = both(convert)
        np.testing.assert_array_equal(logits, plain[0])
        assert lengths == plain[1] == [1, 1]


TOKENS, LENGTHS, ACTIVE = np.full((B, 3), 5, np.int32), np.array([3, 2]), np.ones(B, bool)


@pytest.mark.parametrize(
    ("step", "arguments", "says"),
    [
        ("prefill", (TOKENS[:, 0], LENGTHS), r"tokens must be whole numbers \[B, T\] = \[2, any\], not of shape \[2\]"),
        ("prefill", (TOKENS.astype(float), LENGTHS), "tokens must be whole numbers .*, not float64"),
        ("prefill", ([[5, 6], [7]], [2, 1]), "tokens must be whole numbers .*cannot be made an array"),
        ("prefill", (TOKENS, [3]), r"lengths must be whole numbers \[B\] = \[2\], not of shape \[1\]"),
        ("prefill", (TOKENS, [3, 1.5]), "lengths must be whole numbers .*, not float64"),
        ("prefill", (TOKENS, [True, False]), "lengths must be whole numbers .*, not bool"),
        ("prefill", (TOKENS + 200, LENGTHS), "tokens hold 205, but the model's tokens are 0 to 95"),
        ("prefill", ([[5, 6], [7, -1]], [2, 2]), "tokens hold -1"),
        ("verify", (TOKENS, LENGTHS[:, None]), r"lengths must be .* not of shape \[2, 1\]"),
        ("decode_step", (TOKENS[:, :1], ACTIVE), r"tokens must be whole numbers \[B\] = \[2\], not of shape \[2, 1\]"),
        ("decode_step", (TOKENS[:1, 0], ACTIVE), "tokens must be"),
        ("decode_step", (TOKENS[:, 0], [1, 0]), "active must be bool .*, not int64"),
        ("decode_step", (TOKENS[:, 0], [True]), r"active must be bool \[B\] = \[2\], not of shape \[1\]"),
        ("decode_step", ([5, 96], ACTIVE), "tokens hold 96"),
        ("decode_step", (None, ACTIVE), "tokens must be whole numbers .*, not object"),
    ],
)
def test_arguments_of_steps_that_do_not_fit(step, arguments, says):
    cache = pdx.init_cache(LLAMA, B, 128)
    with pytest.raises(RequestError, match=says):
        getattr(pdx, step)(params(LLAMA), LLAMA, *arguments, cache)
    # What takes no part is not looked at, and the cache is still there.
    padded = np.array([[5, 6, -1], [7, 999, 0]])
    pdx.prefill(params(LLAMA), LLAMA, padded, [2, 1], cache)


def decode_many(n=2, **settings):
    sampling = settings.pop("sampling", None) or pdx.SamplingState.create([SamplingOptions()] * B, LLAMA.vocab_size)
    cache = settings.pop("cache", None) or pdx.init_cache(LLAMA, B, 128)
    return pdx.decode_many(params(LLAMA), settings.pop("cfg", LLAMA), [5, 6], cache, sampling, n, **settings)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: decode_many(0), "n is 0: it must be a whole number of at least 1"),
        (lambda: decode_many(True), "n is True"),
        (lambda: decode_many(2, steps=-1), "steps is -1: it must be a whole number"),
        (
            lambda: decode_many(2, sampling=SamplingOptions()),
            "sampling is SamplingOptions: it must be what SamplingState",
        ),
        (lambda: decode_many(2, cache={"k": 1}), "cache is dict: it must be a DenseCache, which pdx.init_cache makes"),
        (lambda: decode_many(2, cfg="llama"), "cfg is str: it must be a ModelConfig"),
        (lambda: pdx.init_cache(LLAMA, 0, 128), "batch 0, .* must be at least 1"),
        (lambda: pdx.init_cache(LLAMA, 1.5, 128), "batch is 1.5: it must be a whole number"),
        (lambda: pdx.init_cache(LLAMA, 1, True), "capacity is True: it must be a whole number"),
        (lambda: pdx.init_cache(LLAMA, 1, 128, dtype=jnp.int32), "of a cache is not one of f32, bf16, f16, int8"),
        (lambda: pdx.init_cache(LLAMA, 1, 128, dtype="int4"), "'int4' of a cache is not one of"),
        (lambda: pdx.init_cache(LLAMA, 1, 128, dtype=None), "None of a cache is not one of"),
        (lambda: pdx.init_paged_cache(LLAMA, 2, dtype=bool), "of a cache is not one of"),
        (lambda: pdx.init_paged_cache(LLAMA, 2.5), "pages is 2.5: it must be a whole number"),
        (lambda: pdx.init_cache("llama", 1, 128), "cfg is str: it must be a ModelConfig"),
        (lambda: pdx.load(5), "model is 5: it must be a name"),
        (lambda: pdx.load(""), "the name is empty"),
        (lambda: pdx.load(None), "model is None: it must be a name"),
        (lambda: pdx.generate("smollm2", "hi"), "model is 'smollm2': it must be what pdx.load returns"),
        (lambda: pdx.Engine("smollm2"), "model is str: it must be a .*Model"),
        (lambda: EngineRequest("hi"), "prompt is 'hi': an EngineRequest takes token ids"),
        (lambda: EngineRequest((1, 2.5)), "a token id of prompt is 2.5"),
        (lambda: EngineRequest((1,), timeout_s=-1), "timeout_s is -1"),
        (lambda: EngineRequest((1,), {"max_tokens": 3}), "options is .*: it must be SamplingOptions"),
        (lambda: EngineRequest((1,), mask=[True]), "mask is .*: it must be a function"),
        (lambda: pdx.EngineConfig(slots=True), "slots is True"),
        (lambda: pdx.EngineConfig(overlap="no"), "overlap is 'no': it must be true or false"),
        (lambda: pdx.EngineConfig(tpot_s=float("nan")), "tpot_s is nan"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(call, says):
    with pytest.raises(PdxError, match=says) as caught:
        call()
    assert isinstance(caught.value, RequestError | ModelNotFoundError)
