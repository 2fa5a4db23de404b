"""The report: what is judged how, what rows measure, and that its errors are those of the predictions."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import pdx
from pdx import steps
from pdx.bench import calibrate, report
from pdx.bench.report import batching, optimizations, page, pitfalls, verification
from pdx.bench.report.optimizations import Experiment
from pdx.bench.report.verdicts import CLAIMS, Comparison, judge
from pdx.bench.timed_work import ModelUnderTest, TimedWork, token_ids
from pdx.bench.timing import Timing
from pdx.cli import app
from pdx.cost import Setup, chips
from pdx.cost.chips import MeasuredChip
from pdx.cost.measured_rates import Rates, Surface
from pdx.errors import PdxError, RequestError
from pdx.weights.loaded import Model
from tests.support import models, tiny_model

SETUP = Setup(models.LLAMA, "float32")
SIZES = dataclasses.replace(optimizations.QUICK, prompts=(16,), batches=(1,))


def chip(rate: float) -> MeasuredChip:
    """A device that does everything at one rate."""
    flat = Surface((1,), (1,), ((rate,),))
    rates = Rates({"float32": flat}, {"float32": flat}, {"float32": flat}, flat, "made up")
    return MeasuredChip("here", "cpu", ("cpu",), 0.1, 0.2, 20.0, 16.0, 2, 1.0, 0.15, rates=rates)


def side(tokens: float = 1, setup: Setup = SETUP, phase: str = "decode") -> TimedWork:
    return TimedWork("a load", phase, lambda: Timing((1.0,)), tokens, setup, lambda s: [s.decode(1, 100)])


def found(claim: str, off: list[float], on: list[float], **of):
    of = Comparison(side(), side(**of))
    return judge(claim, of, Timing(tuple(off)), Timing(tuple(on)), chip(1e9), {"here": chip(1e9)})


@pytest.mark.parametrize(
    ("claim", "on", "verdict"),
    [
        ("huge", [0.4] * 4, "holds"),
        ("huge", [0.6] * 4, "does not hold"),
        ("yes", [0.8] * 4, "holds"),
        ("yes", [1.2] * 4, "does not hold"),
        ("no", [1.0] * 4, "holds"),
        ("no", [0.5] * 4, "does not hold"),
        ("small", [0.5] * 4, "does not hold"),
        ("small", [1.2] * 4, "does not hold"),
        ("small", [0.8] * 4, "holds"),
        ("costs a little", [1.2] * 4, "holds"),
        ("costs a little", [2.0] * 4, "does not hold"),
        # The middle half decides: one round out of five is noise, half of them are not.
        ("huge", [0.4, 0.4, 0.4, 0.4, 3.0], "holds"),
        ("yes", [2.0, 1.5, 1.5, 0.5, 1.5], "does not hold"),
    ],
)
def test_verdicts_follow_the_clock(claim, on, verdict):
    assert found(claim, [1.0] * len(on), on).verdict == verdict


def test_gains_are_tokens_a_second():
    seen = found("huge", [1.0, 1.0], [2.0, 4.0], tokens=8)
    assert seen.gains == (4.0, 2.0)
    assert seen.gain == 3.0
    # Both sides cost the same, but one makes eight tokens of it.
    assert seen.predicted == {"here": pytest.approx(8.0)}
    assert "reading weights" in seen.why
    assert "1.00x the FLOPs" not in seen.why
    assert "0.12x the FLOPs" in seen.why


def test_why_names_the_bound_and_how_near_it_came():
    quantized = found("huge", [1.0] * 3, [2.0] * 3, setup=Setup(models.LLAMA, "float32", "int8"))
    assert quantized.verdict == "does not hold"
    assert "is reading weights" in quantized.why
    assert "with it." in quantized.why


def test_every_claim_of_the_table_is_measured_or_said_not_to_be():
    names = [row.name for row in optimizations.ROWS]
    assert len(names) == len(set(names))
    for words in (
        "larger batch",
        "FlashAttention",
        "weight quantization int8",
        "weight quantization int4",
        "KV-cache quantization",
        "speculative decoding",
        "GQA / MQA",
        "continuous batching",
        "chunked prefill",
    ):
        assert any(words in name for name in names), words
    with pytest.raises(ValueError, match="no claim 'enormous'"):
        optimizations.row("x", prefill="no", decode="enormous")
    assert all(low < high for low, high in CLAIMS.values())


def test_a_feature_adds_its_row(monkeypatch):
    monkeypatch.setattr(optimizations, "ROWS", [])

    @optimizations.row("nothing", prefill="no", decode="huge")
    def nothing(experiment):
        yield Comparison(side(), side())
        raise optimizations.NotBuilt("the prefill of it")

    seen = optimizations.measure(optimizations.ROWS[0], Experiment(None, chip(1e9), SIZES), {})
    assert (seen.verdict, seen.why) == ("not built", "the prefill of it")
    assert [f.verdict for f in seen.findings] == ["does not hold"]


@pytest.fixture(scope="module")
def model():
    return ModelUnderTest(models.LLAMA, models.params(models.LLAMA), np.dtype("float32"))


def experiment_of(model: ModelUnderTest) -> Experiment:
    return Experiment(Model(model.params, model.cfg, "tiny", Path(), model.dtype), chip(1e9), SIZES)


def test_repeated_heads_say_the_same(model):
    whole = experiment_of(model).multihead
    assert whole.cfg.num_kv_heads == whole.cfg.num_heads
    optimizations._check_same_logits(whole, model)
    wrong = jax.tree.map(lambda x: -x, whole.params)
    with pytest.raises(PdxError, match="must not change the logits"):
        optimizations._check_same_logits(dataclasses.replace(whole, params=wrong), model)
    outcome = optimizations.measure(
        next(r for r in optimizations.ROWS if r.name.startswith("GQA")), experiment_of(whole), {}
    )
    assert outcome.verdict == "not applicable here"


def test_dense_attention_is_the_same_function(model):
    ids = token_ids(model.cfg, 2, 24)
    found = []
    for kernels in ("auto", "dense"):
        cache = dataclasses.replace(model, kernels=kernels).cache(2, 128)
        logits, cache = steps.prefill(model.params, model.cfg, ids, np.array([24, 9]), cache, kernels=kernels)
        step, _ = steps.decode_step(model.params, model.cfg, ids[:, 0], np.array([True, True]), cache, kernels=kernels)
        found.append((logits, step))
    models.close(found[0][0], found[1][0])
    models.close(found[0][1], found[1][1])


def test_answers_must_be_long_enough():
    assert pitfalls.shortest_answer(1.0, 0.1, 2.0) == pytest.approx(21)
    assert pitfalls.shortest_answer(1.0, 0.1, 1.0) is None
    # At that length both take as long: the draft's prefill is made up for.
    n, tpot = 21, 0.1
    assert 1.0 + (n - 1) * tpot / 2.0 == pytest.approx((n - 1) * tpot)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def seen(directory):
    chosen = ["larger batch", "continuous batching", "chunked prefill", "speculative decoding"]
    model, here = pdx.load(directory), chip(1e9)
    found = report.run(model, here, {"v5e": chips.chip("v5e")}, SIZES, only=chosen)
    experiment = Experiment(model, here, SIZES)
    return dataclasses.replace(found, pitfalls=pitfalls.run(experiment), verifications=verification.measure(experiment))


def test_answers_are_of_mixed_length():
    lengths = batching.mixed_lengths(400, 16)
    assert len(lengths) == 400
    assert np.mean(lengths) == pytest.approx(16, rel=0.05)
    assert np.median(lengths) == pytest.approx(16 * np.log(2), rel=0.1)
    assert (min(lengths), max(lengths) > 80) == (1, True)
    assert lengths != sorted(lengths)


def test_slots_are_filled_as_they_fall_free():
    """Every token of every request has its step, behind those before it; never more rows than slots."""
    prompt, outputs, slots = 5, [3, 1, 4, 1, 2], 2
    seen = list(batching._schedule(prompt, outputs, slots))
    assert seen == [
        [(5, 0), (5, 0)],  # the first two; the second ends at once
        [(1, 5), (5, 0)],
        [(1, 6), (1, 5)],  # the last token of the first
        [(1, 6), (5, 0)],  # the fourth ends at once
        [(1, 7), (5, 0)],  # the last of the third
        [(1, 5)],
    ]


@pytest.mark.slow
def test_both_sides_serve_the_same_requests(seen):
    outcome = next(o for o in seen.outcomes if o.name == "continuous batching")
    assert [f.phase for f in outcome.findings] == ["prefill", "decode"]
    assert not outcome.verdict
    for f in outcome.findings:
        # Tokens are equal, so the gain is that of the times.
        assert f.gain == pytest.approx(np.median([a / b for a, b in zip(f.off_s.seconds, f.on_s.seconds, strict=True)]))
        assert "static batches of 2 → an engine of 2 slots" in f.load
    # The prediction: batches that wait for their longest answer compute more.
    assert outcome.findings[1].predicted["v5e"] > 1.05


@pytest.mark.slow
def test_errors_are_those_of_the_predictions(seen, directory):
    """What a chip is said to do goes into the prediction, and what that is off by is said."""
    assert [(p.phase, p.batch, p.tokens) for p in seen.points] == report.loads(SIZES)
    cfg = pdx.load(directory).config
    step = seen.points[-1]
    assert step.predicted_s == pytest.approx(Setup(cfg, "float32").decode(1, step.tokens - 4).seconds(seen.chip))
    said = dataclasses.replace
    right = said(seen, points=tuple(said(p, predicted_s=p.measured.median * 1.1) for p in seen.points))
    assert right.error("prefill") == right.error("decode") == pytest.approx(0.1)
    assert "TTFT 10% off (median of 1 loads; 1 of them within 25%, the worst +10%)" in page.errors(right)


def test_a_chip_with_wrong_figures_is_far_off(directory):
    far = report.run(pdx.load(directory), chip(1e4), {}, SIZES, only=[])
    assert far.error("decode") > 10
    assert "0 of them within 25%" in page.errors(far)
    assert (far.pitfalls, far.verifications) == (None, ())
    assert "Pitfalls" not in page.to_markdown(far, [])


@pytest.mark.slow
def test_what_a_verification_costs_is_measured_and_explained(seen, directory):
    cfg, found = pdx.load(directory).config, seen.verifications
    assert [(v.rows, v.drafted) for v in found] == [(rows, n) for rows in (1, SIZES.rows) for n in verification.DRAFTS]
    for v in found:
        cost = Setup(cfg, "float32").verify(v.rows, SIZES.context + 1, v.drafted)
        assert sum(v.predicted_s.values()) == pytest.approx(cost.seconds(seen.chip))
        assert min(v.measured.seconds) > 0
    lines = page.verified(found).rows
    assert [line[3] for line in lines if line[1] == "0"] == ["1.00", "1.00"]
    assert "## What a verification costs" in page.to_markdown(seen, [])


@pytest.mark.slow
def test_it_is_written(seen, tmp_path):
    files = report.write(seen, tmp_path / "out")
    assert [f.name for f in files] == [
        "report.md",
        "report.json",
        "ttft.png",
        "tpot_batch.png",
        "tpot_context.png",
        "roofline.png",
    ]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files[2:])
    text, data = files[0].read_text(), json.loads(files[1].read_text())
    for words in (
        "| larger batch | decode | huge |",
        "| speculative decoding | prefill | no |",
        "drafts of",
        "TTFT",
        "![",
        "Pitfalls",
        "one number says",
        "chunked prefill, decode: ",
    ):
        assert words in text, words
    assert data["median_error"]["tpot"] == pytest.approx(seen.error("decode"), rel=1e-4)
    (batch, spec, _, chunked) = data["outcomes"]
    assert batch["findings"][1]["gain"] == pytest.approx(seen.outcomes[0].findings[1].gain, rel=1e-4)
    assert set(batch["findings"][0]["predicted"]) == {"here", "v5e"}
    assert [f["phase"] for f in spec["findings"]] == ["prefill", "decode"]
    assert [f["phase"] for f in chunked["findings"]] == ["prefill", "decode"]
    table = page.table(seen)
    assert {len(line) for line in table.rows} == {len(table.head)}


def test_unknown_rows_are_refused(directory):
    with pytest.raises(RequestError, match="no row 'magic'; there are larger batch"):
        report.run(pdx.load(directory), chip(1e9), {}, SIZES, only=["magic"])


@pytest.mark.slow
def test_the_commands(directory, tmp_path, monkeypatch):
    """Calibrated once, stored, found again; a report needs a chip that was measured."""
    monkeypatch.setenv("PDX_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "Plan", lambda: calibrate.TINY)
    monkeypatch.setattr(report, "Sizes", lambda: SIZES)
    done = CliRunner().invoke(app, ["calibrate", "--name", "mine", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    mine = chips.chip("mine")
    assert mine.hbm_gbps == pytest.approx(told["hbm_gbps"], rel=1e-3)
    assert isinstance(mine, MeasuredChip)
    assert {"float32", "w8a8"} == set(mine.rates.products)
    assert set(mine.rates.decode_attention) == set(mine.rates.prefill_attention) == {"float32", "int8"}
    arguments = [
        "report",
        "--model",
        str(directory),
        "--out",
        str(tmp_path / "out"),
        "--row",
        "continuous batching",
        "--quick",
        "--chip",
    ]
    done = CliRunner().invoke(app, [*arguments, "mine"])
    assert done.exit_code == 0, done.output
    assert "Predicted by the cost model" in " ".join(done.stdout.split())
    assert (tmp_path / "out" / "report.json").exists()
    wrong = CliRunner().invoke(app, [*arguments, "v5e"])
    assert "was not measured" in str(wrong.exception)
