"""`distill` on a tiny target: what it makes drafts, what it stored is found again, what does not fit is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pdx.errors import ModelFileError, RequestError
from pdx.train import data, texts
from pdx.train.config import DistillConfig, Train
from pdx.train.distill import distill
from pdx.train.draft import DraftStudent
from pdx.train.head import HeadStudent
from pdx.train.loop import make_optimizer, make_step, rows_of
from tests.support import distilling

PROMPTS = ["ab ab ab ab ab", "hello world, hello"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    target, config = distilling.make(folder)
    return pdx.load(target), DistillConfig.from_toml(config), folder


@pytest.fixture(scope="module")
def lessons(world):
    model, config, folder = world
    return data.make(model, config.data, folder / "out" / "data")


@pytest.fixture(scope="module", params=["draft", pytest.param("eagle", marks=pytest.mark.slow)])
def made(request, world, lessons):
    model, config, folder = world
    return distill(model, folder / "out", config, kind=request.param)


def test_lessons_are_what_the_target_says(world, lessons):
    model, config, _ = world
    train, held_out = lessons
    assert len(train.lengths) + len(held_out.lengths) == config.data.sequences
    starts = texts.starts(model, config.data)
    greedy = [i for i, s in enumerate(starts[:4]) if s.temperature == 0]
    assert greedy
    for row in greedy:
        length, count = int(train.lengths[row]), len(starts[row].tokens)
        ids = train.tokens[row, :length]
        assert tuple(ids[:count]) == starts[row].tokens
        out = pdx.forward(model.params, model.config, ids[None])
        np.testing.assert_array_equal(ids[count:], np.asarray(out.logits.argmax(-1))[0, count - 1 : -1])
        np.testing.assert_allclose(train.hidden[row, :length], out.final_hidden[0], atol=2e-2)
        best, top = jax.lax.top_k(jax.nn.log_softmax(out.logits[0]), config.data.top_k)
        np.testing.assert_allclose(train.top_logprobs[row, :length], best, atol=1e-2)
        assert (train.top_ids[row, :length, 0] == top[:, 0]).mean() > 0.9


def test_more_sequences_begin_with_the_same_ones(world):
    model, config, _ = world
    few, many = (texts.starts(model, dataclasses.replace(config.data, sequences=n)) for n in (5, 9))
    assert many[:5] == few


def test_lessons_of_other_settings_are_refused(world, lessons):
    model, config, folder = world
    with pytest.raises(RequestError, match="another top_k"):
        data.make(model, dataclasses.replace(config.data, top_k=3), folder / "out" / "data")


def test_the_loss_falls(made):
    first, last = (np.mean([line["divergence"] for line in part]) for part in (made.log[:5], made.log[-5:]))
    assert last < 0.7 * first
    assert [line["step"] for line in made.log] == list(range(1, 31))


def test_it_drafts_and_the_answers_stay(world, made):
    model = world[0]
    plain = pdx.generate(model, PROMPTS, max_tokens=40, ignore_eos=True)
    done = pdx.generate(
        model, PROMPTS, max_tokens=40, ignore_eos=True, speculate=f"{made.kind}:{made.path}", draft_length=3
    )
    assert [c.token_ids for c in done] == [c.token_ids for c in plain]
    assert sum(c.speculation.kept for c in done) > 0


def test_the_card_says_how_it_was_made(made):
    card = (made.path / "README.md").read_text(encoding="utf-8")
    for text in ("target", "steps = 30", f"{made.tokens:,} tokens", "| prose |", "pdx distill target OUT"):
        assert text in card
    assert (made.path.parent / "loss.png").stat().st_size > 1000
    assert json.loads(json.dumps(made.to_dict()))["last"]["step"] == 30
    stored = json.loads((made.path / "pdx.json").read_text(encoding="utf-8"))
    assert {x["bits"] for x in stored["quantized"].values()} == {8}
    assert not (made.path / "tokenizer").exists()


def test_a_finished_run_is_not_trained_again(world, made):
    model, config, folder = world
    again = distill(model, folder / "out", config, kind=made.kind)
    assert again.log == made.log
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=31))
    with pytest.raises(RequestError, match=r"another train.steps"):
        distill(model, folder / "out", other, kind=made.kind)


def test_one_kind_is_not_taken_for_the_other(world, made):
    other = {"draft": "eagle", "eagle": "draft"}[made.kind]
    with pytest.raises(ModelFileError, match=f"no {other} that"):
        pdx.generate(world[0], "a", max_tokens=2, speculate=f"{other}:{made.path}")


@pytest.mark.parametrize("kind", ["draft", "eagle"])
def test_an_untrained_student_begins_near_its_target(world, lessons, kind):
    """The embedding begins as a projection, the head as the best linear prediction."""
    model, config, _ = world
    if kind == "draft":
        student = DraftStudent(model, dataclasses.replace(config.draft, d_model=32), lessons[0])
        table = np.asarray(model.params["embed"])
        own = np.asarray(student.init(jax.random.key(0))["embed"])
        similar, wanted = own @ own.T, table @ table.T
        np.testing.assert_allclose(similar / similar.max(), wanted / wanted.max(), atol=1e-5)
    else:
        train = lessons[0]
        fc = HeadStudent(model, config.eagle, train).init(jax.random.key(0))["fc"]
        real = np.arange(1, train.tokens.shape[1]) < train.lengths[:, None]
        hidden = train.hidden.astype(np.float32)
        embedded = np.asarray(model.params["embed"])[train.tokens[:, 1:]]
        found = np.concatenate([embedded, hidden[:, :-1]], axis=-1) @ fc.T
        errors = [np.square(x - hidden[:, 1:])[real].mean() for x in (found, hidden[:, :-1], 0.0)]
        assert errors[0] < 0.7 * min(errors[1:])


def test_only_embedding_and_head_learn_slowly(world, lessons):
    model, config, _ = world
    student = DraftStudent(model, config.draft, lessons[0])
    optimizer = make_optimizer(Train(steps=2, warmup=0, learning_rate=0.1, weight_decay=0.0), student.SLOW)
    params = student.init(jax.random.key(0))
    step, _ = make_step(student, optimizer)
    batch = lessons[0].take(np.arange(4))
    state, _ = step({"params": params, "optimizer": optimizer.init(params)}, student.frozen, batch, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, state["params"])
    assert moved["lm_head"] == pytest.approx(0.025, rel=0.1)
    assert moved["layers"][0]["q_proj"] == pytest.approx(0.1, rel=0.1)


def test_each_epoch_has_every_sequence_once():
    settings = Train(batch=4)
    rows = np.concatenate([rows_of(step, settings, 6) for step in range(3)])
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    assert rows[:6].tolist() != rows[6:].tolist()
