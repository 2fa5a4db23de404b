"""The load benchmark: what is sent, what is counted, and how it is told. Nothing here looks at a clock's figures."""

import json
import math
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import pdx
from pdx.bench import load
from pdx.bench.load import page, workload
from pdx.bench.load.workload import Arriving, Lengths, Load, Prompts
from pdx.cli import app
from pdx.engine.config import EngineConfig
from pdx.errors import ContextLengthError, EngineError, QueueFullError, RequestError
from pdx.metrics import Objectives, RequestTiming, ServedTiming, Spread, goodput
from tests import tiny_model


def rng(seed=0):
    return np.random.default_rng(seed)


def prompts(seed=0, shared=0):
    return Prompts(range(10_000), rng(seed), shared)


# What is sent.


@pytest.mark.parametrize(
    ("text", "mean", "low", "high"),
    [
        ("128", 128, 128, 128),
        ("uniform:32:256", 144, 32, 256),
        ("normal:100:10", 100, 40, 160),
        ("lognormal:100:0.5", 100 * math.exp(0.125), 1, 2000),
        ("zipf:10:12:1", (10 + 11 / 2 + 12 / 3) / (11 / 6), 10, 12),
    ],
)
def test_lengths_are_distributed_as_asked(text, mean, low, high):
    drawn = np.array(Lengths.parse(text).sample(rng(), 20_000))
    assert drawn.dtype == np.int64
    assert (low <= drawn.min(), drawn.max() <= high) == (True, True)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert (drawn == Lengths.parse(text).sample(rng(), 20_000)).all()


def test_both_ends_of_uniform_are_drawn_and_no_length_is_below_one():
    assert set(Lengths.parse("uniform:3:5").sample(rng(), 200)) == {3, 4, 5}
    assert min(Lengths.parse("normal:1:50").sample(rng(), 200)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "nan",
        "inf",
        "x",
        "uniform:5",
        "uniform:5:3",
        "uniform:0:3",
        "gauss:1:2",
        "lognormal:0:1",
        "normal:5:-1",
        "zipf:1:5",
        "uniform:1:2:3",
        "128:2",
    ],
)
def test_what_is_no_distribution_is_refused(text):
    with pytest.raises(RequestError, match="is no distribution of lengths"):
        Lengths.parse(text)


def gaps(process, rate, count=4001, burstiness=0.25):
    return np.diff(workload.arrivals(process, rate, count, rng(), burstiness))


def test_requests_come_at_the_rate_asked_for():
    for process in ("poisson", "burst"):
        assert gaps(process, 8.0).mean() == pytest.approx(1 / 8)
    assert gaps("poisson", math.inf).max() == 0
    # Of a gamma distribution of shape k, the spread is 1 / sqrt(k) of the mean.
    assert gaps("poisson", 8.0).std() * 8 == pytest.approx(1, rel=0.1)
    assert gaps("burst", 8.0).std() * 8 == pytest.approx(2, rel=0.1)
    # An exponential gap is longer than its mean with probability 1/e.
    assert (gaps("poisson", 1.0) > 1).mean() == pytest.approx(math.exp(-1), abs=0.03)


def test_one_seed_gives_the_same_sizes_at_every_rate():
    def made(rate, seed=1):
        sizes = Lengths.parse("uniform:4:40"), Lengths.parse("uniform:1:9")
        return workload.make("poisson", rate, 30, *sizes, prompts(), seed=seed)

    slow, fast, other = made(1.0), made(4.0), made(1.0, seed=2)
    assert [(r.prompt, r.output_tokens) for r in slow.requests] == [(r.prompt, r.output_tokens) for r in fast.requests]
    np.testing.assert_allclose([r.arrival_s for r in slow.requests], [4 * r.arrival_s for r in fast.requests])
    assert [r.output_tokens for r in slow.requests] != [r.output_tokens for r in other.requests]
    assert slow.longest == max(len(r.prompt) + r.output_tokens for r in slow.requests)


def test_prompts_share_what_they_should_and_no_more():
    cut = prompts(shared=20)
    first, second, short = cut.cut(50), cut.cut(50), cut.cut(5)
    assert (len(first), len(short)) == (50, 5)
    assert first[:20] == second[:20]
    assert first[20:] != second[20:]
    assert short == first[:5]
    assert prompts(1).cut(30) != prompts(2).cut(30)
    with pytest.raises(RequestError, match="cannot be cut out of a text of 10000"):
        prompts().cut(10_001)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"process": "gauss"}, "arrival 'gauss' is not one of poisson, burst, closed"),
        ({"count": 0}, "at least one"),
        ({"pressure": 0}, "above 0"),
        ({"pressure": -1.0}, "above 0"),
        ({"pressure": math.nan}, "above 0"),
        ({"burstiness": 0}, "burstiness is 0"),
        ({"process": "closed", "pressure": 1.5}, "whole number"),
        ({"process": "closed", "pressure": 0}, "0 clients"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(changes, says):
    settings = {"process": "poisson", "pressure": 1.0, "count": 3, "burstiness": 0.25} | changes
    burstiness = settings.pop("burstiness")
    with pytest.raises(RequestError, match=says):
        workload.make(*settings.values(), Lengths.parse("4"), Lengths.parse("4"), prompts(), burstiness=burstiness)


def test_a_trace_is_read_in_the_order_of_time(tmp_path):
    file = tmp_path / "trace.jsonl"
    rows = [(7.5, 12, 3), (5.0, 8, 2), (6.0, 20, 9)]
    file.write_text(
        "\n".join(json.dumps(dict(zip(("arrival_s", "prompt_tokens", "output_tokens"), r, strict=True))) for r in rows)
        + "\n\n",
        encoding="utf-8",
    )
    found = workload.read_trace(file, prompts())
    assert [(r.arrival_s, len(r.prompt), r.output_tokens) for r in found.requests] == [
        (0, 8, 2),
        (1, 20, 9),
        (2.5, 12, 3),
    ]
    assert found.pressure == pytest.approx(2 / 2.5)
    assert len(workload.read_trace(file, prompts(), 2).requests) == 2
    row = {"arrival_s": 0, "prompt_tokens": 3, "output_tokens": 1, "note": "a\u2028b"}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    assert len(workload.read_trace(file, prompts()).requests) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", ":2: "),
        ("[1, 2]", ":2: "),
        ('{"arrival_s": 1}', "'prompt_tokens' is missing"),
        ('{"arrival_s": -1, "prompt_tokens": 3, "output_tokens": 3}', "seconds of at least 0"),
        ('{"arrival_s": "now", "prompt_tokens": 3, "output_tokens": 3}', "seconds of at least 0"),
        ('{"arrival_s": NaN, "prompt_tokens": 3, "output_tokens": 3}', "seconds of at least 0"),
        ('{"arrival_s": 1, "prompt_tokens": 0, "output_tokens": 3}', "whole numbers"),
        ('{"arrival_s": 1, "prompt_tokens": 3, "output_tokens": 2.5}', "whole numbers"),
    ],
)
def test_a_trace_that_is_wrong_is_refused_by_its_line(tmp_path, line, says):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"arrival_s": 0, "prompt_tokens": 3, "output_tokens": 3}\n' + line, encoding="utf-8")
    with pytest.raises(RequestError, match=says):
        workload.read_trace(file, prompts())
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(RequestError, match="has no requests"):
        workload.read_trace(file, prompts())
    with pytest.raises(RequestError, match="not readable"):
        workload.read_trace(tmp_path / "none", prompts())


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
        "side": "",
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
    table = page.table([result(side="slots 1"), result(side="slots 8")]).markdown().splitlines()
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
        "gave their pages up 2 times",
    ):
        assert text in said, text
    assert page.notes([result(served=(load.Served(1, 0.0, ServedTiming(1, 0.1, 0.1)),), counted={})]) == []


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "load.png"
    page.check_plot(file)
    page.plot([result(side=s, pressure=p) for s in ("a", "b") for p in (1.0, 2.0)], file, "title")
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
    return workload.make(process, pressure, count, *sizes, prompts())


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
    found = load.run(engine, asked, Objectives(ttft_s=1.0), side="x")
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


# Settings side by side.


def test_all_combinations_of_what_varies():
    found = load.variants(EngineConfig(), None, ["chunked_prefill=on,off", "slots=1,4", "quantize=none,int8"])
    assert len(found) == 8
    first, last = found[0], found[-1]
    assert (first.name, first.config, first.quantize) == (
        "chunked_prefill on, slots 1, quantize none",
        EngineConfig(slots=1),
        None,
    )
    assert (last.config, last.quantize) == (EngineConfig(chunked_prefill=False, slots=4), "int8")
    assert load.variants(EngineConfig(slots=2), "w8a8", []) == [load.Variant("", EngineConfig(slots=2), "w8a8")]
    typed = load.variants(
        EngineConfig(), None, ["tpot_s=0.5", "token_budget=auto", "policy=shortest", "kv_dtype=int8"]
    )[0]
    assert typed.config == EngineConfig(tpot_s=0.5, policy="shortest", kv_dtype="int8")


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ("speed=on", "'speed' is no setting of an engine: there are slots"),
        ("slots", "with its values"),
        ("slots=", "with its values"),
        ("slots=x", "slots=x: it must be a number"),
        ("slots=0", "slots is 0"),
        ("chunked_prefill=maybe", "on or off"),
        ("policy=luck", "policy 'luck'"),
    ],
)
def test_what_cannot_vary_is_refused(vary, says):
    with pytest.raises(RequestError, match=says):
        load.variants(EngineConfig(), None, [vary])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("model"))


def test_settings_side_by_side_on_a_real_engine(directory, capsys):
    model = pdx.load(directory)
    shared = Prompts.of(model, shared=40)
    asked = [workload.make("closed", 2, 6, Lengths.parse("48"), Lengths.parse("uniform:2:5"), shared)]
    each = load.variants(EngineConfig(slots=2, token_budget=16), None, ["prefix_cache=on,off"])
    on, off = load.compare({None: model}, each, asked, Objectives(ttft_s=1e3))
    for found in (on, off):
        assert [t.tokens for t in found.timings] == [r.output_tokens for r in asked[0].requests]
        assert found.counted["compiles"] == 0
        assert found.good_share == 1
    assert (on.counted["hit_tokens"] >= 4 * 32, off.counted["hit_tokens"]) == (True, 0)
    assert on.counted["prefill_tokens"] + on.counted["hit_tokens"] == off.counted["prefill_tokens"] == 6 * 48
    assert "prefix_cache off: 2 clients (6 requests)" in capsys.readouterr().err


def test_the_command(directory, tmp_path):
    arguments = [
        "bench",
        "load",
        "--model",
        str(directory),
        "--rate",
        "200",
        "--rate",
        "inf",
        "--requests",
        "4",
        "--prompt-len",
        "uniform:4:20",
        "--output-len",
        "3",
        "--slots",
        "2",
        "--token-budget",
        "16",
        "--slo-ttft",
        "100000",
        "--plot",
        str(tmp_path / "load.svg"),
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [(r["load"], r["requests"], r["failed"], r["good_share"]) for r in found] == [
        ("200 req/s", 4, 0, 1.0),
        ("inf req/s", 4, 0, 1.0),
    ]
    assert all(r["tpot_s"]["count"] == 4 and r["itl_s"]["count"] == 8 for r in found)
    assert (tmp_path / "load.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --rate"),
        (["--arrival", "closed"], "needs --clients"),
        (["--clients", "2"], "takes --rate"),
        (["--arrival", "closed", "--rate", "1"], "takes --clients"),
        (["--trace", "x", "--rate", "1"], "--trace says when"),
        (["--rate", "1", "--slo-ttft", "0"], "for TTFT is 0 ms"),
        (["--rate", "1", "--vary", "x=1"], "no setting"),
        (["--rate", "1", "--plot", "x.txt"], "must end in"),
        (["--rate", "1", "--prompt-len", "x"], "no distribution"),
    ],
)
def test_the_command_refuses_before_it_loads_anything(arguments, says):
    done = CliRunner().invoke(app, ["bench", "load", "--model", "none-such", *arguments])
    assert isinstance(done.exception, RequestError)
    assert says in str(done.exception)
