"""Requests of all kinds for an engine, and what it takes for two completions to be the same."""

from __future__ import annotations

import random

import pytest

from pdx.sampling.options import SamplingOptions

WORDS = ["a", "rain", "of ", "the long road", ", and", "\n", "Zürich", "12", "!"]
SHARED = "You are a helpful machine that answers in few words. "  # 52 tokens


def random_requests(rng: random.Random, n: int, tokens: int = 40):
    """Prompts and options of all kinds; a third of the prompts begin alike."""
    prompts, options = [], []
    for _ in range(n):
        text = "".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 12)))
        prompts.append((SHARED if rng.random() < 0.34 else "") + text)
        settings = {"max_tokens": rng.randrange(1, tokens), "ignore_eos": rng.random() < 0.7}
        if rng.random() < 0.5:
            settings |= {"temperature": rng.uniform(0.5, 1.5), "seed": rng.randrange(2**64)}
            settings |= rng.choice([{}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05, "top_k": 50}])
        settings |= rng.choice(
            [
                {},
                {},
                {"repetition_penalty": 1.4},
                {"presence_penalty": 1.0, "logit_bias": {9: -5.0}},
                {"frequency_penalty": 0.7},
            ]
        )
        settings |= rng.choice(
            [{}, {}, {"stop": ("e", "Ä")}, {"stop_token_ids": (40, 41)}, {"logprobs": 2}, {"logprobs": 0}]
        )
        options.append(SamplingOptions(**settings))
    return prompts, options


def same(got, expected):
    assert got.token_ids == expected.token_ids
    assert (got.text, got.finish_reason, got.prompt_tokens) == (
        expected.text,
        expected.finish_reason,
        expected.prompt_tokens,
    )
    assert (got.logprobs is None) == (expected.logprobs is None)
    for a, b in zip(got.logprobs or (), expected.logprobs or (), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=2e-4)
        assert [i for i, _ in a.top] == [i for i, _ in b.top]
