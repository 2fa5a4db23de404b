"""`pdx bench engine`: what the engine is held to, at a tiny size."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

import pdx
from pdx.bench import engine_figures
from pdx.bench.engine_runs import full_rate
from pdx.errors import RequestError
from pdx.metrics import ServedTiming
from tests.support import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("model"))


TINY = engine_figures.Sizes(
    slots=2,
    budget=32,
    context=128,
    prompt=8,
    outputs="uniform:3:9",
    requests=5,
    alone=2,
    steps=4,
    long_prompt=80,
    before=2,
    prefix=64,
    own=8,
    rounds=1,
)


@pytest.mark.slow
def test_a_figure_is_measured(directory):
    (found,), notes = engine_figures.run(pdx.load(directory), ["overhead"], sizes=TINY)
    assert found.value == pytest.approx(found.seen["engine ms"] / found.seen["loop ms"])
    assert notes == []
    with pytest.raises(RequestError, match="speed is no figure: there are throughput, gap"):
        engine_figures.run(None, ["speed"])


@pytest.mark.slow
def test_all_figures_are_measured(directory):
    figures, notes = engine_figures.run(pdx.load(directory), peer=False, sizes=TINY)
    seen = {f.name: f for f in figures}
    assert (list(seen), notes) == (["throughput", "gain", "gap", "prefix", "overhead"], [])
    assert all(f.value > 0 and math.isfinite(f.value) for f in figures)
    assert seen["prefix"].seen["found tokens"] == 64
    assert seen["throughput"].seen["compiles"] == 0
    assert 1 < seen["gain"].seen["predicted"] <= 2


def test_a_figure_beside_its_target():
    most = engine_figures.Figure("gap", "worst gap", 0.2, 0.25, at_least=False, seen={"chunked s": 0.5})
    least = engine_figures.Figure("rate", "tokens/s", 0.8, 0.9)
    assert (most.holds, replace(most, value=0.3).holds) == (True, False)
    assert (least.holds, replace(least, value=0.9).holds, replace(least, target=None).holds) == (False, True, None)
    table = engine_figures.table([most, least]).markdown()
    assert "| worst gap | 0.20 | <= 0.25 | holds | chunked s 0.5 |" in table
    assert "| tokens/s | 0.80 | >= 0.9 | falls short |" in table


def test_tokens_while_all_slots_were_taken():
    """From when the second of two slots was taken (0.5 s) until the last request got one (2 s)."""
    timings = [
        ServedTiming(4, 0.4, 4.0, queue_s=0.0, gaps_s=(0.6, 1.0, 1.0)),  # tokens at 0.4, 1.0, 2.0 and 3.0 s
        ServedTiming(3, 1.5, 2.5, queue_s=0.5, gaps_s=(1.0,)),
        ServedTiming(3, 3.5, 5.5, queue_s=2.0, gaps_s=(1.0, 1.0)),
    ]
    done = [SimpleNamespace(timing=t) for t in timings]
    assert full_rate(done, 2) == 3 / 1.5
