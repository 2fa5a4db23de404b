"""`generate(..., speculate=)`: the answers of plain decoding, what is counted, what is refused."""

import json
import time

import numpy as np
import pytest

import pdx
from pdx.errors import RequestError
from pdx.generation import kept
from pdx.generation.programs import Clock
from pdx.generation.speculation import SpeculativeGenerator
from pdx.speculative.options import Speculation
from tests.support import tiny_model

PROMPTS = ["ab ab ab ab ab", "hello world, hello", "x"]
CHOICES = ["ngram", "self:1", "draft"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("draft"), seed=1))


@pytest.fixture
def speculation(request, draft):
    name, length = request.param
    return Speculation("draft", length, model=draft) if name == "draft" else Speculation.parse(name, length)


choices = pytest.mark.parametrize(
    "speculation",
    [("ngram", "auto"), *(pytest.param((name, 3), marks=pytest.mark.slow) for name in ("self:1", "draft"))],
    indirect=True,
)


def ids(done):
    return [c.token_ids for c in done]


@choices
def test_greedy_answers_are_those_of_plain_decoding(model, speculation):
    settings = {"max_tokens": 30, "ignore_eos": True, "repetition_penalty": 1.1}
    plain = pdx.generate(model, PROMPTS, **settings)
    done = pdx.generate(model, PROMPTS, speculate=speculation, **settings)
    assert ids(done) == ids(plain)
    assert [c.text for c in done] == [c.text for c in plain]
    for completion in done:
        counts = completion.speculation
        assert counts.rounds + counts.kept == 29  # the first token comes from the prefill
        assert counts.kept <= counts.drafted
    assert plain[0].speculation is None


@pytest.mark.slow
def test_log_probabilities_and_stops_are_those_of_plain_decoding(model):
    plain = pdx.generate(model, PROMPTS, max_tokens=24, ignore_eos=True, logprobs=2)
    stop = plain[0].text[9:11]
    for settings in ({}, {"stop": stop}):
        a, b = (
            pdx.generate(model, PROMPTS, max_tokens=24, ignore_eos=True, logprobs=2, **settings, **more)
            for more in ({}, {"speculate": "ngram", "draft_length": 4})
        )
        assert ids(a) == ids(b)
        assert [c.finish_reason for c in a] == [c.finish_reason for c in b]
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose([t.logprob for t in x.logprobs], [t.logprob for t in y.logprobs], atol=2e-4)
            assert [[i for i, _ in t.top] for t in x.logprobs] == [[i for i, _ in t.top] for t in y.logprobs]
    assert "stop" in {c.finish_reason for c in a}


def test_ngrams_keep_the_tokens_of_a_seed(model):
    settings = {"max_tokens": 20, "temperature": 0.9, "seed": 3, "ignore_eos": True}
    plain, done = (pdx.generate(model, PROMPTS, **settings, **more) for more in ({}, {"speculate": "ngram"}))
    assert ids(plain) == ids(done)


def test_what_a_round_costs_is_measured_apart_from_the_plain_steps_beside_it(model, monkeypatch):
    """On a clock that a round of each level moves on by known seconds; where nothing matches, it is a plain step."""
    now, true, seen = [0.0], np.array([1.0, 1.5, 3.0]), np.zeros(3, int)
    speculate = SpeculativeGenerator.speculate

    def timed(*arguments):
        out = speculate(*arguments)
        rounds = np.asarray(out.rounds).max(axis=0)
        now[0] += float(rounds @ true)
        seen[:] += rounds * (rounds[1:].sum() > 0)
        return out

    monkeypatch.setattr(SpeculativeGenerator, "speculate", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    run = SpeculativeGenerator(model, speculation=Speculation("ngram"), rows=2, capacity=64, decode_tokens=8)
    run.begin([], run.new_cache(), Clock())
    np.testing.assert_allclose(run.costs, true, rtol=1e-6)
    assert (seen > 0).all(), "plain steps were among them"


def test_after_the_first_call_nothing_is_compiled(model):
    for _ in range(2):
        done = pdx.generate(model, PROMPTS, max_tokens=30, ignore_eos=True, speculate="ngram")
    assert {c.compile_s for c in done} == {0.0}


@pytest.mark.slow
def test_a_draft_model_is_loaded_once(model, tmp_path, monkeypatch):
    path, loaded = tiny_model.make(tmp_path), []
    monkeypatch.setattr(kept, "load", lambda *args, **settings: loaded.append(args) or pdx.load(*args, **settings))
    for tokens in (4, 300):  # two shapes
        pdx.generate(model, "ab ab", max_tokens=tokens, ignore_eos=True, speculate=f"draft:{path}", draft_length=2)
    assert loaded == [(str(path),)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"speculate": "self:2"}, "a part of the 2 layers"),
        ({"speculate": "medusa"}, "is not one of"),
        ({"speculate": "ngram", "draft_length": 99}, "draft_length"),
        ({"draft_length": 3}, "no effect"),
    ],
)
def test_what_is_not_possible_is_refused(model, settings, says):
    with pytest.raises(RequestError, match=says):
        pdx.generate(model, "a", max_tokens=2, **settings)


def test_a_draft_of_other_tokens_is_refused(model, tmp_path):
    path = tiny_model.make(tmp_path)
    file = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = file["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    (path / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    with pytest.raises(RequestError, match="must have the same tokens"):
        pdx.generate(model, "a", max_tokens=2, speculate=f"draft:{path}")
