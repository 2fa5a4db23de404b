"""What a load benchmark sends: arrivals, lengths, prompts, traces."""

import json
import math

import numpy as np
import pytest

from pdx.bench.load import workload
from pdx.bench.load.workload import Lengths, Prompts
from pdx.errors import RequestError


def rng(seed=0):
    return np.random.default_rng(seed)


def prompts(seed=0, shared=0):
    return Prompts(range(10_000), rng(seed), shared)


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
    with pytest.raises(RequestError, match="is not a distribution of lengths"):
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


def test_a_trace_without_requests_or_without_a_file_is_refused(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(RequestError, match="has no requests"):
        workload.read_trace(file, prompts())
    with pytest.raises(RequestError, match="none cannot be read: No such file"):
        workload.read_trace(tmp_path / "none", prompts())
