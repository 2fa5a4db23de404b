"""The benchmarks run, and say what ran."""

import json

import pytest
from typer.testing import CliRunner

import pdx
from pdx.bench import memory, model
from pdx.bench.timing import Timing, read_bandwidth
from pdx.cli import app
from pdx.errors import PdxError
from tests.support import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_other_ways_of_storing_a_model_stand_beside_it(directory, monkeypatch):
    monkeypatch.setattr(model, "ROUNDS", 1)
    others = {"w8a8": pdx.load(directory, quantize="w8a8")}
    monkeypatch.setattr(model, "read_bandwidth", read_one_megabyte)
    result = model.run(pdx.load(directory), [16], [1], peer=True, kernels="auto", others=others)
    by_shape = {line.shape: line for line in result.lines}
    assert {"16 tokens", "16 tokens, weights w8a8", "batch 1", "batch 1, weights w8a8"} <= set(by_shape)
    line = by_shape["batch 1, weights w8a8"]
    assert line.gain == pytest.approx(by_shape["batch 1"].seconds / line.seconds)
    # Less is read, at the same speed or not.
    assert line.gb_per_s * line.seconds < 0.5 * by_shape["batch 1"].gb_per_s * by_shape["batch 1"].seconds
    assert any("llama.cpp did not run" in note for note in result.notes)
    table = result.table().markdown()
    assert "over float32" in table
    assert f"{line.gain:.2f}x" in table


class Peer:
    """A contestant that takes as long as it says."""

    class torch:
        __version__ = "0"

    def prefill(self, tokens):
        return lambda: Timing((20.0,))

    def decode(self, batch, context, count):
        return lambda: Timing((30.0,))


@pytest.mark.slow
def test_a_peer_stands_beside_both_phases(directory, monkeypatch):
    monkeypatch.setattr(model, "ROUNDS", 1)
    monkeypatch.setattr(model, "read_bandwidth", read_one_megabyte)
    monkeypatch.setattr(model, "transformers_or_reason", lambda path: (Peer(), ""))
    result = model.run(pdx.load(directory), [16], [1], peer=True, kernels="auto")
    seen = {(line.phase, line.shape): line.peer_seconds for line in result.lines}
    assert seen["prefill", "16 tokens"] == 20.0
    assert seen["decode", "batch 1"] == 30.0
    rows = [row for row in result.table().markdown().splitlines() if "30000.0 ms" in row]
    assert len(rows) == 1
    assert f"{30.0 / result.lines[1].seconds:.2f}x" in rows[0]


def read_one_megabyte():
    return read_bandwidth(megabytes=1)


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(directory):
    done = CliRunner().invoke(
        app, ["bench", "memory", "--model", str(directory), "--quantize", "none", "--quantize", "int8", "--json"]
    )
    assert done.exit_code == 0, done.output
    plain, small = json.loads(done.stdout)["results"]
    assert (plain["weights"], small["weights"]) == ("none", "int8")
    assert small["parameters_bytes"] < 0.6 * plain["parameters_bytes"]
    assert all(x["before_bytes"] < x["peak_bytes"] and x["before_bytes"] < x["after_bytes"] for x in (plain, small))
    with pytest.raises(PdxError, match="--quantize int3 failed"):
        memory.measure(str(directory), ["int3"])


@pytest.mark.slow
@pytest.mark.real
def test_quantized_loading_takes_less_than_the_floats_alone():
    plain, small = memory.measure("gemma-3-270m", ["none", "int8"])
    assert small.peak < plain.parameters < plain.peak
