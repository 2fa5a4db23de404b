"""What a plan says that speculation is worth."""

import json

import pytest
from typer.testing import CliRunner

from pdx.cli import app
from pdx.cost import tradeoffs
from pdx.errors import RequestError
from pdx.plan import make, published, speculation
from pdx.speculative.options import Speculation


def plan(on="v5e", **load):
    load = {"quantize": "int8", "prompt": 512, "output_tokens": 256} | load
    return make("llama-3-8b", published.shape("llama-3-8b"), on, **load)


def by_acceptance(found):
    return {p.acceptance: p for p in found}


def test_a_fixed_length_is_the_formula_over_the_cost_of_its_steps():
    one = plan()
    (found,) = speculation.predict(one, Speculation("ngram", 4), [0.8])
    verify = tradeoffs.verify_cost(one.setup, one.chip, 1, one.context, 4)
    assert found.decode_speed == pytest.approx(tradeoffs.speculation(0.8, 4, 0.0, verify))
    assert found.tokens_per_round == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert found.e2e_s == pytest.approx(found.ttft_s + 255 * found.tpot_s)
    assert found.ttft_s == one.ttft


def test_what_it_is_worth_grows_with_acceptance_and_falls_with_the_cost_of_drafts_and_the_batch():
    one = plan()
    free = by_acceptance(speculation.predict(one, Speculation("ngram")))
    assert [free[a].decode_speed for a in (0.5, 0.7, 0.9)] == sorted(free[a].decode_speed for a in (0.5, 0.7, 0.9))
    assert free[0.5].draft_length < free[0.9].draft_length
    paid = by_acceptance(speculation.predict(one, Speculation("draft", model="llama-3.2-1b")))
    assert all(1 <= paid[a].decode_speed < free[a].decode_speed for a in free)
    assert paid[0.9].ttft_s > free[0.9].ttft_s  # the draft model reads the prompt too
    many = by_acceptance(speculation.predict(plan(batch=64, context=1024), Speculation("ngram")))
    assert many[0.7].decode_speed < free[0.7].decode_speed


def test_short_answers_do_not_pay_for_a_draft_models_prompt():
    long, short = (
        speculation.predict(plan(prompt=1500, output_tokens=n), Speculation("draft", model="llama-3.2-1b"), [0.7])[0]
        for n in (400, 4)
    )
    assert long.draft_length > 0
    assert (short.draft_length, short.e2e_speed) == (0, 1.0)


def test_self_drafts_cost_their_share_of_a_step():
    one = plan()
    (found,) = speculation.predict(one, Speculation("self", 2, layers=16), [1.0])
    verify = one.setup.verify(1, one.context, 2).seconds(one.chip)
    assert found.round_s == pytest.approx(verify + 2 * one.tpot / 2)


@pytest.mark.parametrize(
    ("asked", "says"),
    [(Speculation("synthetic", acceptance=0.5), "draft:SHAPE"), (Speculation("draft"), "draft:SHAPE")],
)
def test_a_proposer_of_unknown_cost_is_refused(asked, says):
    with pytest.raises(RequestError, match=says):
        speculation.predict(plan(), asked)


def test_the_command_prints_it():
    asked = ["plan", "llama-3-8b", "--quantize", "int8", "--speculate", "ngram", "--acceptance", "0.7"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "tokens a round" in shown.stdout
    (row,) = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)["speculation"]
    assert row["acceptance"] == 0.7
    assert row["decode_speed"] > 1
    for wrong, says in ((["--acceptance", "1.5"], "acceptance"), (["--speculate", "none"], "no effect")):
        result = CliRunner().invoke(app, [*asked, *wrong])
        assert isinstance(result.exception, RequestError)
        assert says in str(result.exception)


def test_a_plan_knows_no_token_trees():
    with pytest.raises(RequestError, match="3x2x1: a plan predicts chains"):
        speculation.predict(plan(batch=1, context=1024), Speculation("self", "3x2x1", layers=4), [0.8])
