"""What a load benchmark counts and how it is told. Nothing here looks at a clock's figures."""

import json
import math
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdx.bench import load
from pdx.bench.load import page, workload
from pdx.bench.load.workload import Arriving, Lengths, Load, Prompts
from pdx.errors import ContextLengthError, EngineError, QueueFullError, RequestError
from pdx.metrics import Objectives, RequestTiming, ServedTiming, SpeculationCounts, Spread, goodput

# What is counted.


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_percentiles_are_those_of_numpy(values):
    spread = Spread.of(values)
    np.testing.assert_allclose([spread.p50, spread.p90, spread.p99], np.percentile(values, [50, 90, 99]), rtol=1e-9)
    assert (spread.count, spread.largest) == (len(values), max(values))
    np.testing.assert_allclose(spread.mean, np.mean(values), rtol=1e-9)


def test_no_values_have_no_percentiles():
    assert math.isnan(Spread.of([]).p50)
    assert Spread.of([]).count == 0


def test_goodput_counts_requests_that_met_every_objective():
    quick, slow, single = RequestTiming(5, 0.1, 0.5), RequestTiming(5, 0.3, 2.3), RequestTiming(1, 0.1, 0.1)
    served = [quick, slow, single]
    assert goodput(served, Objectives(), 2.0) == 1.5
    assert goodput(served, Objectives(ttft_s=0.1), 2.0) == 1.0  # at most: the limit itself is kept
    assert goodput(served, Objectives(tpot_s=0.1), 2.0) == 1.0  # one token has no TPOT to miss
    assert goodput(served, Objectives(ttft_s=0.3, e2e_s=2.0), 2.0) == 1.0
    assert goodput(served, Objectives(0.01, 0.01, 0.01), 2.0) == 0.0


def result(**changes):
    timings = [ServedTiming(3, 0.25, 1.25, queue_s=0.1, gaps_s=(0.25, 0.75)), ServedTiming(1, 0.5, 0.5)]
    served = (*(load.Served(10, 0.0, t) for t in timings), load.Served(7, 0.2, error="QueueFullError: full"))
    fields = {
        "settings": "",
        "load": "2 req/s",
        "pressure": 2.0,
        "duration_s": 4.0,
        "objectives": Objectives(ttft_s=0.3),
        "served": served,
        "counted": {"compiles": 1, "hit_tokens": 8, "occupancy": 0.5, "preemptions": 2},
    }
    return load.LoadResult(**fields | changes)


def test_a_result_counts_what_was_finished():
    found = result()
    assert (found.output_tokens_per_s, found.input_tokens_per_s, found.requests_per_s) == (1.0, 5.0, 0.5)
    assert (found.goodput, found.failed) == (0.25, 1)
    assert found.good_share == pytest.approx(1 / 3)
    spreads = found.spreads()
    assert spreads["ttft"].p50 == 0.375
    assert (spreads["tpot"].count, spreads["tpot"].mean) == (1, 0.5)
    assert (spreads["itl"].count, spreads["itl"].largest) == (2, 0.75)
    fields = json.loads(json.dumps(found.to_dict()))
    assert fields["e2e_s"]["largest"] == 1.25
    assert fields["errors"] == ["QueueFullError: full"]


def test_the_report_says_what_must_be_known(tmp_path):
    table = page.table([result(settings="slots 1"), result(settings="slots 8")]).markdown().splitlines()
    assert table[0].startswith("| settings | load |")
    assert table[2].startswith("| slots 1 | 2 req/s | 2/3 | 1.0 | 5.0 | 375 / 498 | 500 / 500 | 745 / 750 |")
    assert "0.25 (33%)" in table[3]
    assert page.table([result()]).markdown().startswith("| load |")
    said = " ".join(page.notes([result()]))
    for text in (
        "1 of 3 requests failed: QueueFullError: full",
        "200 ms late",
        "1 programs were compiled",
        "8 prompt tokens were found",
        "were preempted 2 times",
    ):
        assert text in said, text
    assert page.notes([result(served=(load.Served(1, 0.0, ServedTiming(1, 0.1, 0.1)),), counted={})]) == []


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "load.png"
    page.check_plot(file)
    page.plot([result(settings=s, pressure=p) for s in ("a", "b") for p in (1.0, 2.0)], file, "title")
    assert file.read_bytes().startswith(b"\x89PNG")
    for wrong, says in (("load.txt", "must end in one of"), ("none/load.png", "no such folder")):
        with pytest.raises(RequestError, match=says):
            page.check_plot(tmp_path / wrong)


# Who sends when: an engine that is a counter.


@dataclass
class FakeEngine:
    """Answers a request when `let_go` allows it; notes how many were open at a time."""

    config: object = field(default_factory=lambda: SimpleNamespace(max_context=10_000))
    open: int = 0
    most: int = 0
    seen: list = field(default_factory=list)
    refuse: tuple = ()
    break_down: tuple = ()

    def __post_init__(self):
        self.lock = threading.Lock()

    def metrics(self):
        return SimpleNamespace(
            speculation=SpeculationCounts(),
            steps=len(self.seen),
            decode_tokens=0,
            prefill_tokens=0,
            hit_tokens=0,
            preemptions=0,
            compiles=0,
            occupancy=0.5,
        )

    def submit(self, request):
        with self.lock:
            index = len(self.seen)
            self.seen.append(request)
            if index in self.refuse:
                raise QueueFullError("the queue is full")
            self.open += 1
            self.most = max(self.most, self.open)
        return SimpleNamespace(result=lambda: self.finish(request, index))

    def finish(self, request, index):
        threading.Event().wait(0.001)
        with self.lock:
            self.open -= 1
        if index in self.break_down:
            raise EngineError("the step failed")
        return SimpleNamespace(timing=ServedTiming(request.options.max_tokens, 0.1, 0.2))


def made(process, pressure, count=24):
    sizes = Lengths.parse("uniform:2:9"), Lengths.parse("uniform:1:9")
    return workload.make(process, pressure, count, *sizes, Prompts(range(10_000), np.random.default_rng(0)))


@pytest.mark.parametrize("clients", [1, 3, 50])
def test_clients_never_have_more_than_one_request_each(clients):
    engine, asked = FakeEngine(), made("closed", clients)
    found = load.run(engine, asked)
    assert engine.most <= clients
    assert clients == 50 or engine.most == clients
    assert [s.prompt_tokens for s in found.served] == [len(r.prompt) for r in asked.requests]
    assert [t.tokens for t in found.timings] == [r.output_tokens for r in asked.requests]
    assert found.counted["steps"] == 24


def test_requests_come_by_the_clock_whatever_becomes_of_the_others():
    engine, asked = FakeEngine(refuse=(3,), break_down=(5, 6)), made("burst", 2000.0)
    found = load.run(engine, asked, Objectives(ttft_s=1.0), settings="x")
    assert [r.prompt for r in engine.seen] == [r.prompt for r in asked.requests]
    assert all(r.options.ignore_eos for r in engine.seen)
    assert (len(found.served), found.failed) == (24, 3)
    failed = ["EngineError: the step failed"] * 2 + ["QueueFullError: the queue is full"]
    assert sorted(s.error for s in found.served if s.error) == failed
    assert found.good_share == 21 / 24
    assert found.duration_s >= asked.requests[-1].arrival_s


def test_a_request_that_no_engine_could_serve_is_refused_before_the_first_one():
    engine = FakeEngine(config=SimpleNamespace(max_context=10))
    with pytest.raises(ContextLengthError, match="has 12 tokens with its answer, but the context is 10"):
        load.run(engine, Load("poisson", 1.0, (Arriving(0.0, (1,) * 9, 3),)))
    assert engine.seen == []
