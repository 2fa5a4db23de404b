"""Settings of an engine side by side, and the command `pdx bench load`."""

import json
import re

import pytest
from typer.testing import CliRunner

import pdx
from pdx.bench import load
from pdx.bench.load import workload
from pdx.bench.load.workload import Lengths, Prompts
from pdx.cli import app
from pdx.engine.config import EngineConfig
from pdx.errors import RequestError
from pdx.metrics import Objectives
from tests.support import tiny_model


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
    said = capsys.readouterr().err
    assert "prefix_cache off: 2 clients (6 requests)" in said
    assert re.search(r"prefix_cache on: compiling the engine's programs \(\d+ programs\)", said)


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
        (["--trace", "x", "--rate", "1"], "--trace has the arrival times"),
        (["--rate", "1", "--slo-ttft", "0"], "for TTFT is 0 ms"),
        (["--rate", "1", "--vary", "x=1"], "no setting"),
        (["--rate", "1", "--plot", "x.txt"], "must end in"),
        (["--rate", "1", "--prompt-len", "x"], "not a distribution"),
    ],
)
def test_the_command_refuses_before_it_loads_anything(arguments, says):
    done = CliRunner().invoke(app, ["bench", "load", "--model", "none-such", *arguments])
    assert isinstance(done.exception, RequestError)
    assert says in str(done.exception)
