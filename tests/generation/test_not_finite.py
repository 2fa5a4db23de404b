"""Logits that are NaN or infinite end in an error that names the request and the token; no JSON holds such a value."""

import asyncio
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import pdx
from pdx.cli import app
from pdx.clients import batch_file
from pdx.clients.chat import Chat, converse
from pdx.errors import EngineError, NotFiniteError, RequestError
from pdx.generation.completion import TokenLogprobs
from pdx.generation.results import completion_fields
from pdx.io import strict_json
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import NO_TOKEN, sample
from tests.support import tiny_model

pytestmark = pytest.mark.thin(3)

INF, NAN = float("inf"), float("nan")
BAD = 40  # a token whose embedding overflows: whoever has read it has no next token


def break_token(model, token=BAD, value=NAN):
    """A copy of the model that overflows as soon as it reads `token`; the head stays sound."""
    params = dict(model.params)
    params["lm_head"] = params["embed"]
    params["embed"] = params["embed"].at[token].set(value)
    return dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def broken(sound):
    return break_token(sound)


def biased(token):
    return SamplingOptions(max_tokens=12, ignore_eos=True, logit_bias={token: 100.0})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_that_overflows_is_an_error(sound, value, temperature):
    model = break_token(sound, value=value)
    with pytest.raises(NotFiniteError, match=r"prompt 0: .*after token 2 .*NaN or infinite"):
        pdx.generate(model, [5, BAD, 6], max_tokens=4, temperature=temperature)


def test_an_answer_that_overflows_later_is_an_error_at_that_token(broken):
    pieces = []
    stream = pdx.stream(broken, [[5, 6, 7], [8, 9, 10], [11]], [biased(50), biased(BAD), biased(51)])
    with pytest.raises(NotFiniteError, match="prompt 1: the logits after token 3 "):
        pieces.extend(stream)
    shown = ["".join(p.text for p in pieces if p.index == i) for i in range(3)]
    assert [len(text) for text in shown] == [9, 1, 9]  # what came before it, the neighbours' whole step too
    assert set(shown[0]) == {broken.tokenizer.decode([50])}


def test_what_follows_an_end_is_nobodys_error(broken):
    options = SamplingOptions(max_tokens=12, stop_token_ids=(BAD,), logit_bias={BAD: 100.0})
    assert pdx.generate(broken, [5, 6], options)[0].token_ids == [BAD]
    one = dataclasses.replace(options, stop_token_ids=(), max_tokens=1)
    assert pdx.generate(broken, [5, 6], one)[0].token_ids == [BAD]


@pytest.mark.slow
def test_the_cache_of_a_failed_run_does_the_next_one_no_harm(sound, broken):
    expected = pdx.generate(sound, [[5, 6, 7], [8, 9]], max_tokens=9, ignore_eos=True)
    for _ in range(2):
        with pytest.raises(NotFiniteError):
            pdx.generate(broken, [[5] * 60 + [BAD], [BAD] * 70], max_tokens=9)
        found = pdx.generate(broken, [[5, 6, 7], [8, 9]], max_tokens=9, ignore_eos=True)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.slow
def test_the_engine_gives_the_same_error_and_shares_no_page_of_it(sound, broken):
    # sglang 33187: rows of NaN became random tokens, and their keys and values stayed behind.
    prompt = [5] * 70
    expected = pdx.generate(sound, [*prompt, 7], max_tokens=3, ignore_eos=True)[0].token_ids
    with pdx.Engine(broken, pdx.EngineConfig(slots=2, page_size=16, token_budget=80)) as engine:
        neighbour = engine.submit([8, 9], max_tokens=20, ignore_eos=True)
        with pytest.raises(NotFiniteError, match=r"after token 70 .*NaN or infinite"):
            engine.submit([*prompt, BAD], max_tokens=3).result(60)
        assert len(neighbour.result(60).token_ids) == 20
        done = engine.submit([*prompt, 7], max_tokens=3, ignore_eos=True).result(60)
        assert (done.token_ids, done.timing.hit_tokens) == (expected, 0)

        async def streamed():
            return [o async for o in engine.stream([5, BAD], max_tokens=3)]

        with pytest.raises(EngineError, match="after token 1 "):
            asyncio.run(streamed())


def test_decode_many_gives_no_token_where_there_is_none(broken):
    cfg = broken.config
    cache = pdx.init_cache(cfg, batch=3, capacity=128)
    _, cache = pdx.prefill(broken.params, cfg, np.full((3, 4), 7, np.int32), np.full(3, 4), cache)
    sampling = pdx.SamplingState.create([biased(50), biased(BAD), biased(51)], cfg.vocab_size)
    out = pdx.decode_many(broken.params, cfg, np.array([5, 6, 7], np.int32), cache, sampling, 5)
    assert out.tokens.tolist() == [[50] * 5, [BAD, *[NO_TOKEN] * 4], [51] * 5]


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}], ids=str)
def test_which_rows_have_no_token(setting):
    vocab = 300
    logits = np.tile(np.linspace(-3, 3, vocab, dtype=np.float32), (7, 1))
    logits[0] = NAN
    logits[1, 50] = NAN
    logits[2, 299] = INF
    logits[3] = -INF
    logits[4, :299] = -INF  # one token is left
    logits[5, 299] = -INF
    options = [SamplingOptions(seed=1, **setting)] * 6 + [SamplingOptions(seed=1, logit_bias={299: -INF}, **setting)]
    state = pdx.SamplingState.create(options, vocab)
    drawn = sample(jnp.asarray(logits), state, jnp.zeros(7, int), mark_broken=True).tokens
    assert (np.asarray(drawn) == NO_TOKEN).tolist() == [True, True, True, True, False, False, False]
    assert drawn[4] == 299
    assert 299 not in np.asarray(drawn)[5:].tolist()
    # A mask may hide the NaN of a row, and may leave one token only.
    allowed = np.zeros((7, vocab), bool)
    allowed[:, 7] = True
    masked = sample(jnp.asarray(logits), state, jnp.zeros(7, int), allowed=allowed, mark_broken=True).tokens
    assert masked.tolist() == [NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN, 7, 7]


def test_settings_that_f32_cannot_hold_break_nothing(sound):
    expected = pdx.generate(sound, "Hello", max_tokens=5, ignore_eos=True, logit_bias={50: 100.0})[0].token_ids
    for settings in (
        {"logit_bias": {50: 1e300, 3: -1e300}},
        {"logit_bias": {50: 1e300}, "repetition_penalty": 1e300},
        {"logit_bias": {50: 1e300}, "temperature": 1e300, "top_k": 1},
    ):
        assert pdx.generate(sound, "Hello", max_tokens=5, ignore_eos=True, **settings)[0].token_ids == expected


def test_json_has_no_nan_and_a_number_for_what_is_impossible(sound):
    # sonar 183, vLLM 10234: alternatives of -inf made the whole answer unserializable.
    assert strict_json.dumps({"a": [NAN, (1.5, -INF)], "b": INF}) == '{"a": [null, [1.5, null]], "b": null}'
    done = pdx.generate(sound, "Hello", max_tokens=1, ignore_eos=True, logprobs=1)[0]
    done = dataclasses.replace(done, logprobs=[TokenLogprobs(5, -INF, ((6, -0.5), (7, -INF)))])
    fields = json.loads(strict_json.dumps(completion_fields(done, "auto")), parse_constant=pytest.fail)
    assert fields["logprobs"] == [{"token_id": 5, "logprob": -9999.0, "top": [[6, -0.5], [7, -9999.0]]}]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model directory of finite weights whose logits are not."""
    directory = tiny_model.make(tmp_path_factory.mktemp("overflowing"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1e38)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * np.float32(1e3)
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.slow
def test_every_command_says_so_and_fails(overflowing, tmp_path):
    def run(*arguments):
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert isinstance(done.exception, NotFiniteError), done.output
        assert not done.stdout.strip()
        return str(done.exception)

    model = ("--model", overflowing, "--max-tokens", 3)
    for extra in ((), ("--json", "--logprobs", 2), ("--temperature", 1)):
        assert "prompt 0: the logits after token 4 " in run("generate", "hello", *model, *extra)
    requests = tmp_path / "requests.jsonl"
    requests.write_text('\n{"prompt": "hello"}\n')
    assert "requests.jsonl, line 2: the logits after token 4 " in run(
        "generate", "--prompts", requests, "--output", tmp_path / "answers.jsonl", *model
    )
    assert "window 0" in run("eval", "ppl", overflowing, "--max-tokens", 300, "--window", 128, "--stride", 64, "--json")


@pytest.mark.slow
def test_chat_says_so_and_goes_on(overflowing, capsys):
    with pdx.Engine(pdx.load(overflowing), pdx.EngineConfig(slots=1, token_budget=16)) as engine:
        converse(Chat(engine, SamplingOptions(max_tokens=3)), ["one", "two"])
    assert capsys.readouterr().err.count("NaN or infinite") == 2


def test_rows_of_requests_must_be_json(tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "a", "mine": NaN}\n')
    with pytest.raises(RequestError, match="line 1 is not JSON: NaN"):
        batch_file.read(requests, SamplingOptions())
