"""The built-in models generate what transformers generates from the same files: committed tokens, no torch needed.

`tests/golden/make_tokens.py` made them; `tests/parity/test_real.py` makes the same comparison live.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pdx

pytestmark = [pytest.mark.slow, pytest.mark.real]

GOLDEN = json.loads(Path(__file__).with_name("tokens.json").read_text())
# Below this distance of transformers' two best logits either token is right.
TIE = 1e-3


@pytest.fixture(scope="module", params=[key for key in GOLDEN if key != "made_by"])
def named(request):
    """A model in f32 and its name; read once for all tests of it."""
    return request.param, pdx.load(request.param, dtype="f32")


def test_generate_gives_the_golden_tokens(named):
    """Short prompts as one ragged batch, then one that is longer than Gemma's window."""
    name, model = named
    for rows in (lambda n: n <= 128, lambda n: n > 128):
        chosen = {key: case for key, case in GOLDEN[name].items() if rows(len(case["prompt"]))}
        assert chosen
        assert all(case["smallest_gap"] > TIE for case in chosen.values()), "a prompt with a tie proves nothing"
        count = len(next(iter(chosen.values()))["tokens"])
        done = pdx.generate(model, [case["prompt"] for case in chosen.values()], max_tokens=count, ignore_eos=True)
        for key, completion in zip(chosen, done, strict=True):
            assert completion.token_ids == chosen[key]["tokens"], key


def test_pallas_kernels_give_the_golden_tokens(named):
    """The TPU's, interpreted: the first tokens behind the shortest prompt."""
    name, model = named
    case = min(GOLDEN[name].values(), key=lambda case: len(case["prompt"]))
    (done,) = pdx.generate(model, [case["prompt"]], max_tokens=8, ignore_eos=True, kernels="pallas")
    assert done.token_ids == case["tokens"][:8]


def test_weights_as_the_file_stores_them_give_the_golden_tokens():
    """SmolLM2's Q4_1 blocks, multiplied as they are: the same numbers summed in another order."""
    name = "smollm2-135m-instruct"
    case = min(GOLDEN[name].values(), key=lambda case: len(case["prompt"]))
    model = pdx.load(name, quantize="stored")
    assert model.params["layers"][0]["q_proj"].bits == 4
    (done,) = pdx.generate(model, [case["prompt"]], max_tokens=len(case["tokens"]), ignore_eos=True)
    assert done.token_ids == case["tokens"]


def test_an_engine_with_drafts_gives_the_golden_tokens():
    """All prompts at once, with n-grams. `tests/speculative/test_real_models.py` has both models."""
    name = "smollm2-135m-instruct"
    model, cases = pdx.load(name, dtype="f32"), GOLDEN[name]
    config = pdx.EngineConfig(slots=4, token_budget=64, max_context=768, speculate="ngram", draft_length=4)
    with pdx.Engine(model, config) as engine:
        count = len(cases["prose"]["tokens"])
        answers = engine.generate([c["prompt"] for c in cases.values()], max_tokens=count, ignore_eos=True)
        assert engine.metrics().speculation.kept > 0
    for (key, case), done in zip(cases.items(), answers, strict=True):
        assert done.token_ids == case["tokens"], key
