"""The real models answer with drafts as without: 15 prompts of prose, code, chat, copies and other scripts."""

from __future__ import annotations

import pytest

import pdx
from pdx.bench.speculation import PROMPTS, TIE, gap_where_they_part

pytestmark = [pytest.mark.slow, pytest.mark.real]

TEXTS = [text for kind in PROMPTS.values() for text in kind]
TOKENS = 128
SETTINGS = {"max_tokens": TOKENS, "ignore_eos": True}
NGRAMS = {"speculate": "ngram", "draft_length": 4}


@pytest.mark.parametrize("way", ["generate", "engine"])
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_answers_are_those_without_drafts(name, way):
    model = pdx.load(name, dtype="f32")
    (parts_at_ties_alone if way == "generate" else answers_alike_bit_for_bit)(model)


def parts_at_ties_alone(model):
    """Greedy: where two answers part, the two best logits are closer than 1e-3; each such place is printed."""
    plain = pdx.generate(model, TEXTS, **SETTINGS)
    drafted = pdx.generate(model, TEXTS, **SETTINGS, **NGRAMS)
    pairs = zip(TEXTS, plain, drafted, strict=True)
    gaps = {a.index: gap for text, a, b in pairs if (gap := gap_where_they_part(model, text, a, b)) is not None}
    kept, rounds = (sum(getattr(c.speculation, name) for c in drafted) for name in ("kept", "rounds"))
    print(
        f"\n{model.name}: {len(TEXTS)} prompts, {len(TEXTS) * TOKENS} greedy tokens, {len(gaps)} answers part: "
        f"{', '.join(f'prompt {i} at a gap of {gap:.1e}' for i, gap in gaps.items()) or 'none'}; "
        f"{(rounds + kept) / rounds:.2f} tokens a round"
    )
    assert all(gap < TIE for gap in gaps.values())
    assert len(gaps) <= 3, "so many ties would excuse anything"
    assert (rounds + kept) / rounds > 1.2


def answers_alike_bit_for_bit(model):
    """In a deterministic engine: greedy and sampled requests at once, with log-probabilities."""
    options = [
        pdx.SamplingOptions(**SETTINGS, temperature=0.7 * (i % 2), seed=i, logprobs=0) for i in range(len(TEXTS))
    ]
    answers = []
    for drafts in ({}, NGRAMS):
        with pdx.Engine(
            model, pdx.EngineConfig(slots=8, deterministic=True, max_context=256, token_budget=72, **drafts)
        ) as engine:
            answers.append(engine.generate(TEXTS, options))
    for plain, drafted in zip(*answers, strict=True):
        assert drafted.token_ids == plain.token_ids, plain.index
        assert drafted.logprobs == plain.logprobs
    assert sum(c.speculation.kept for c in answers[1]) > 0
