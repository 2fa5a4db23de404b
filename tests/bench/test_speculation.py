"""`pdx bench speculation`: both ways over real texts, and how their answers differ."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pdx.bench import speculation
from pdx.generation.completion import Completion
from pdx.metrics import RequestTiming
from pdx.speculative.options import Speculation
from tests.support import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pdx.load(tiny_model.make(tmp_path_factory.mktemp("model")), dtype="f32")


@pytest.mark.slow
def test_each_kind_and_batch_size_is_a_row(model, monkeypatch):
    monkeypatch.setattr(speculation, "PROMPTS", {"copy": ("ab ab ab", "x"), "prose": ("no no no",)})
    seen = []
    found = speculation.run(
        model,
        Speculation("ngram"),
        (1, 2),
        kinds=("copy", "prose"),
        tokens=12,
        progress=lambda *told: seen.append(told),
    )
    assert [(r.kind, r.batch) for r in found] == [("copy", 1), ("prose", 1), ("copy", 2), ("prose", 2)]
    for r in found:
        assert r.faults == r.ties == 0
        assert r.speed == pytest.approx(r.plain_s / r.drafted_s)
        assert sum(r.by_length.values()) > 0
        # What was predicted says no more than that every round were a plain one, at least a little more or less.
        assert 0 < r.predicted_speed < 8
    assert seen[-1][1:] == (4, 4)
    table = speculation.table(found)
    assert {len(line) for line in table.rows} == {len(table.head)}


def answer(ids):
    return Completion(0, "", ids, 1, "length", RequestTiming(len(ids), 0.1, 0.2), 0.0)


def test_answers_that_part_are_told_apart_by_the_gap_of_the_logits(model):
    prompt = "hello"
    ids = model.tokenizer.encode(prompt)
    logits = np.asarray(pdx.forward(model.params, model.config, jnp.asarray([ids]), logits="last").logits[0])
    order = np.argsort(logits)[::-1]
    gap = logits[order[0]] - logits[order[1]]
    found = speculation.gap_where_they_part(model, prompt, answer([int(order[0])]), answer([int(order[1])]))
    assert found == pytest.approx(gap, abs=1e-5)
    assert speculation.gap_where_they_part(model, prompt, answer([1, 2]), answer([1, 2])) is None


def test_faults_stand_in_the_table():
    row = speculation.Row("ngram", "copy", 1, 0.02, 0.01, 1.5, None, None, {0: 3}, 1, 2)
    assert speculation.table([row]).rows[0][-1] == "1, 2 FAULTS"
    assert dataclasses.replace(row, faults=0).to_dict()["speed"] == 2
