"""The offline loop on a tiny model, through the loader: batches, chunks, stops, seeds, programs, meshes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pdx.errors import ContextLengthError, RequestError
from pdx.generation.generator import Generator
from pdx.generation.prompts import prepared_rows
from pdx.sampling.options import SamplingOptions
from tests.support import tiny_model

pytestmark = pytest.mark.thin(6)

PROMPTS = ["Hello", "a somewhat longer prompt, with a comma", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("model")))


WIDTH = 192  # of the sequences in `greedy`: one shape, one program


@partial(jax.jit, static_argnums=1)
def best_everywhere(params, cfg, ids):
    return pdx.forward(params, cfg, ids).logits.argmax(-1)


def greedy(model, ids, n):
    """The plain way: the whole sequence through `forward`, without a cache, for every token."""
    ids = list(ids)
    for _ in range(n):
        padded = np.zeros((1, WIDTH), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(best_everywhere(model.params, model.config, padded)[0, len(ids) - 1]))
    return ids[-n:]


def test_batch_equals_the_plain_way(model):
    done = pdx.generate(model, PROMPTS, max_tokens=21, ignore_eos=True)
    for prompt, completion in zip(PROMPTS, done, strict=True):
        assert completion.token_ids == greedy(model, model.tokenizer.encode(prompt), 21)
        assert completion.prompt_tokens == len(prompt)
        assert (completion.finish_reason, completion.completion_tokens) == ("length", 21)
        assert 0 < completion.timing.ttft_s < completion.timing.e2e_s


def test_more_prompts_than_rows_and_long_prompts_in_chunks(model):
    prompts = ["ab" * 30, "c", "hello " * 12, "z" * 77, "q"]
    run = Generator(model, rows=2, capacity=256, chunk=32)
    run._ladder = (16, 32)  # fewer programs to compile
    rows = prepared_rows(model, prompts, [SamplingOptions(max_tokens=9, ignore_eos=True)] * 5)
    for at in range(0, 5, 2):
        for _ in run.run(rows[at : at + 2]):
            pass
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.token_ids == greedy(model, model.tokenizer.encode(prompt), 9), prompt


def test_after_warm_up_a_generation_of_any_length_compiles_nothing(model, count_compiles):
    run = Generator(model, rows=2, capacity=512)
    run._ladder = (16, 64)

    def go(lengths, max_tokens, **options):
        prompts = [list(range(5, 5 + n)) for n in lengths]
        options = SamplingOptions(max_tokens=max_tokens, ignore_eos=True, **options)
        for _ in run.run(prepared_rows(model, prompts, [options] * len(prompts))):
            pass

    for rung in run._ladder:
        go([rung], 2)
    before = run.compile_s
    with count_compiles() as compiles:
        go([3, 60], 100)
        go([64], 1)
        go([17, 33], 37, temperature=0.9, top_k=5, top_p=0.9, seed=3)
        go([40, 2], 20, repetition_penalty=1.3, logit_bias={7: 2.0})
    assert compiles() == 0
    assert run.compile_s == before


def test_seeds(model):
    settings = {"max_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    one = pdx.generate(model, PROMPTS, seed=7, **settings)
    again = pdx.generate(model, PROMPTS[1], seed=7, **settings)[0]  # another batch size, another row
    other = pdx.generate(model, PROMPTS, seed=8, **settings)
    assert one[1].token_ids == again.token_ids
    assert all(a.token_ids != b.token_ids for a, b in zip(one, other, strict=True))


def test_each_request_has_its_own_options(model):
    options = [
        SamplingOptions(max_tokens=3, ignore_eos=True),
        SamplingOptions(max_tokens=40, ignore_eos=True),
        SamplingOptions(max_tokens=40, ignore_eos=True, temperature=1.5, seed=1, logprobs=2),
    ]
    done = pdx.generate(model, PROMPTS, options)
    assert [c.completion_tokens for c in done] == [3, 40, 40]
    assert done[1].token_ids == greedy(model, model.tokenizer.encode(PROMPTS[1]), 40)
    assert done[0].logprobs is None
    narrow = pdx.generate(model, PROMPTS, [options[0], replace(options[1], logprobs=1), options[2]])
    assert [{len(t.top) for t in c.logprobs} for c in narrow[1:]] == [{1}, {2}]
    assert len(done[2].logprobs) == 40
    for token in done[2].logprobs:
        assert token.top[0][1] >= token.top[1][1]
        assert token.logprob <= token.top[0][1] + 1e-6


def test_stop_strings_tokens_and_logprobs(model):
    whole = pdx.generate(model, "Hello", max_tokens=40, ignore_eos=True, logprobs=0)[0]
    stop = whole.token_ids[11]
    cut = pdx.generate(model, "Hello", max_tokens=40, ignore_eos=True, stop_token_ids=(stop,))[0]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    text = whole.text[4:7]
    cut = pdx.generate(model, "Hello", max_tokens=40, ignore_eos=True, stop=(text,))[0]
    assert cut.text == whole.text[: whole.text.find(text)]
    ids = model.tokenizer.encode("Hello") + whole.token_ids
    logits = jax.jit(pdx.forward, static_argnums=1)(model.params, model.config, jnp.asarray([ids])).logits[0]
    expected = jax.nn.log_softmax(logits, -1)[np.arange(4, 44), ids[5:]]
    np.testing.assert_allclose([t.logprob for t in whole.logprobs], expected, atol=1e-4)


def test_stream_shows_the_text_once(model):
    pieces = list(pdx.stream(model, PROMPTS, max_tokens=25, ignore_eos=True))
    done = {p.index: p.completion for p in pieces if p.completion}
    for index in range(3):
        assert "".join(p.text for p in pieces if p.index == index) == done[index].text


def test_an_abandoned_stream_leaves_the_generator_usable(model):
    expected = pdx.generate(model, "Hello", max_tokens=30, ignore_eos=True)[0].token_ids
    stream = pdx.stream(model, "Hello", max_tokens=30, ignore_eos=True)
    next(stream)
    stream.close()
    assert pdx.generate(model, "Hello", max_tokens=30, ignore_eos=True)[0].token_ids == expected


def test_chat_messages_go_through_the_template(model):
    messages = [{"role": "user", "content": "hi"}]
    done = pdx.generate(model, messages, max_tokens=2)[0]
    assert done.prompt_tokens == len(model.tokenizer.encode("<|start|>user\nhi<|end|>\n<|start|>assistant\n"))


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "says"),
    [
        ("", {}, RequestError, "empty"),
        ([], {}, RequestError, "empty"),
        ([5, 100_000], {}, RequestError, "100000"),
        ("x" * 600, {}, ContextLengthError, "context"),
        ("x" * 500, {"max_tokens": 100}, ContextLengthError, "at most 12"),
        ("x", {"max_tokens": 100, "capacity": 64}, ContextLengthError, "capacity"),
        ("x", {"temperature": -1}, RequestError, "temperature"),
        ("x", {"kernels": "cuda"}, ValueError, "kernels"),
    ],
)
def test_what_makes_no_sense_is_said(model, prompt, settings, error, says):
    with pytest.raises(error, match=says):
        pdx.generate(model, [prompt], **settings)


def test_token_ids_may_be_arrays(model):
    ids = [5, 6, 7]
    expected = pdx.generate(model, ids, max_tokens=3)[0].token_ids
    for one in (np.array(ids), jnp.array(ids), (5, 6, 7), list(np.array(ids)), list(jnp.array(ids)), range(5, 8)):
        found = pdx.generate(model, one, max_tokens=3)
        assert [(c.prompt_tokens, c.token_ids) for c in found] == [(3, expected)]
    for two in ([np.array(ids), jnp.array(ids)], np.array([ids, ids]), [ids, (5, 6, 7)]):
        found = pdx.generate(model, two, max_tokens=3)
        assert [(c.prompt_tokens, c.token_ids) for c in found] == [(3, expected)] * 2
    assert len(pdx.generate(model, np.array(["a", "b"]), max_tokens=3)) == 2


@pytest.mark.parametrize(
    "prompts",
    [
        None,
        5,
        b"hello",
        {"role": "user", "content": "x"},
        [5.9, 6.7],
        [[5.9, 6.7]],
        [True, False],
        [["hi"]],
        [None],
        np.array([5.9]),
        [np.array([[5, 6]])],
        np.array(5),
        [5, "x"],
        [["x", 5]],
        [[{"role": "user", "content": "x"}, "x"]],
        ["fine", None],
        ["fine", [{"role": "user"}]],
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_said(model, prompts):
    with pytest.raises(RequestError, match=r"a prompt is a text, chat messages or token ids|messages\["):
        pdx.generate(model, prompts)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"options": [SamplingOptions()]}, "1 options for 2 prompts: give one set for all, or one per prompt"),
        ({"options": {"temperature": 1}}, "options must be SamplingOptions or a list of them"),
        ({"options": [None, None]}, "options must be SamplingOptions or a list of them"),
        ({"batch_size": 0}, "batch_size is 0: it must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        (
            {"options": [SamplingOptions(), SamplingOptions(logit_bias={10_000: 1.0})]},
            "prompt 1: logit_bias names token",
        ),
    ],
)
def test_settings_that_do_not_fit_the_prompts_are_said_before_anything_runs(model, settings, says):
    with pytest.raises(RequestError, match=says):
        next(pdx.stream(model, ["a", "b"], **({"batch_size": 1} | settings)))


@pytest.mark.slow
def test_bfloat16_cache_and_parameters(tmp_path):
    model = pdx.load(tiny_model.make(tmp_path), dtype="bf16")
    assert model.params["embed"].dtype == jnp.bfloat16
    done = pdx.generate(model, PROMPTS, max_tokens=12, ignore_eos=True)
    assert [c.completion_tokens for c in done] == [12, 12, 12]
    mixed = pdx.generate(model, PROMPTS, max_tokens=12, ignore_eos=True, kv_dtype="f32")
    assert [c.completion_tokens for c in mixed] == [12, 12, 12]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,model=2", "model=4", "data=8"])
def test_mesh_gives_the_same_tokens(tmp_path, model, mesh):
    sharded = pdx.load(tiny_model.make(tmp_path), mesh=mesh)
    if mesh == "model=4":
        assert any("kv_heads (2) does not divide" in note for note in sharded.notes)
    for settings in ({}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}):
        ours = pdx.generate(sharded, PROMPTS, max_tokens=20, ignore_eos=True, **settings)
        reference = pdx.generate(model, PROMPTS, max_tokens=20, ignore_eos=True, **settings)
        assert [c.token_ids for c in ours] == [c.token_ids for c in reference]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "data=2,model=2"])
def test_the_second_call_of_a_step_compiles_nothing_for_a_loaded_model(tmp_path, count_compiles, mesh):
    model = pdx.load(tiny_model.make(tmp_path), mesh=mesh)
    cache = pdx.init_cache(model.config, batch=2, capacity=128, mesh=model.mesh)
    sampling = pdx.SamplingState.create([SamplingOptions()] * 2, model.config.vocab_size)
    tokens = np.full((2, 16), 7, np.int32)
    settings = {"check": False}

    def once(cache, sampling):
        _, cache = pdx.prefill(model.params, model.config, tokens, np.array([5, 9], np.int32), cache, **settings)
        _, cache = pdx.decode_step(model.params, model.config, tokens[:, 0], np.array([True, True]), cache, **settings)
        out = pdx.decode_many(model.params, model.config, tokens[:, 0], cache, sampling, 4, **settings)
        return out.cache, out.sampling

    cache, sampling = once(cache, sampling)
    with count_compiles() as compiles:
        once(cache, sampling)
    assert compiles() == 0
