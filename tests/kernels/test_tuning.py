"""Tiles: who wins, what a bucket holds together, what a table keeps, and that measuring measures."""

import json
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import problems, static, tuning
from pallas_kernels.hardware import chip
from pallas_kernels.tuning import Candidate


@dataclass(frozen=True)
class Call:
    op: str
    batch: int
    slots: int
    head_dim: int
    dtype: str
    window: int | None = None


@dataclass(frozen=True)
class Config:
    block: int
    splits: int = 1
    deep: bool = False

    def __post_init__(self):
        if self.block % 128:
            raise ValueError("block must be a multiple of 128")


CALL = Call("op", 5, 1000, 64, "bfloat16")
MODULE = SimpleNamespace(Config=Config, heuristic=lambda call, chip: Config(128))


def test_neighbours_in_size_share_a_bucket_and_nothing_else_does():
    assert tuning.bucket(CALL) == "batch=8 slots=1024 head_dim=64 dtype=bfloat16"
    assert tuning.bucket(replace(CALL, batch=8, slots=1024)) == tuning.bucket(CALL)
    for change in ({"batch": 9}, {"slots": 512}, {"head_dim": 80}, {"dtype": "float32"}, {"window": 512}):
        assert tuning.bucket(replace(CALL, **change)) != tuning.bucket(CALL)


def test_explicit_before_tuned_before_heuristic(tmp_path):
    v5e = chip("v5e")

    def resolve(**given):
        return tuning.resolve("op", MODULE, CALL, chip=v5e, folder=tmp_path, **given)

    assert resolve() == (Config(128), "heuristic")
    tuning.write("op", CALL, v5e, "static", Candidate(Config(512), 1e-3, {"bytes": 7}), tmp_path)
    assert resolve() == (Config(512), "tuned")
    assert resolve(config=Config(256)) == (Config(256), "explicit")
    assert tuning.resolve("op", MODULE, CALL, chip=chip("v6e"), folder=tmp_path)[1] == "heuristic"
    assert tuning.resolve("op", MODULE, CALL, folder=tmp_path)[1] == "heuristic"  # no chip here
    picky = SimpleNamespace(**vars(MODULE), fits=lambda call, config: config.block < call.slots // 4)
    assert tuning.resolve("op", picky, CALL, chip=v5e, folder=tmp_path)[1] == "heuristic"


def test_a_table_says_where_it_comes_from_and_keeps_what_was_measured(tmp_path):
    v5e, key = chip("v5e"), tuning.bucket(CALL)
    path = tuning.write("op", CALL, v5e, "static", Candidate(Config(512), 1e-3, {"bytes": 7}), tmp_path)
    entry = json.loads(path.read_text())["ops"]["op"][key]
    assert path.name == "v5e.json"
    assert entry["jax"] == jax.__version__
    assert len(entry["date"]) == len("2026-01-01")
    assert entry["figures"] == {"bytes": 7, "score_seconds": 1e-3}
    tuning.write("op", CALL, v5e, "measured", Candidate(Config(256), 2e-3), tmp_path)
    assert tuning.lookup("op", CALL, v5e, tmp_path)["rung"] == "measured"
    tuning.write("op", CALL, v5e, "static", Candidate(Config(512), 1e-3), tmp_path)
    assert tuning.lookup("op", CALL, v5e, tmp_path)["config"]["block"] == 256


def test_the_tables_in_the_package_name_configs_that_exist():
    for path in tuning.FOLDER.glob("*.json"):
        table = json.loads(path.read_text())
        where = chip(table["device"])
        assert where.name == path.stem
        for op, entries in table["ops"].items():
            module = __import__(f"pallas_kernels.{op}.{where.platform}", fromlist=["Config"])
            for entry in entries.values():
                module.Config(**entry["config"])
                assert {"rung", "jax", "date", "figures"} <= set(entry)


def test_neighbouring_configs_are_those_that_the_config_allows():
    assert tuning.neighbours(Config(256)) == [Config(128), Config(512), Config(256, 2)]
    assert tuning.neighbours(Config(128, 2)) == [Config(256, 2), Config(128, 1), Config(128, 4)]


def test_a_look_up_is_cheap(tmp_path):
    tuning.write("op", CALL, chip("v5e"), "static", Candidate(Config(512), 1e-3), tmp_path)
    tuning.lookup("op", CALL, chip("v5e"), tmp_path)
    started = time.perf_counter()
    for _ in range(100):
        tuning.lookup("op", CALL, chip("v5e"), tmp_path)
    assert time.perf_counter() - started < 0.1


def test_measuring_runs_every_loop():
    x = jnp.ones((256, 256))

    def work(n):
        return lambda x: jax.lax.fori_loop(0, n, lambda _, y: jnp.sin(y @ x), x)

    assert tuning.measure(work(40), [x], loops=3, repeats=3) > 4 * tuning.measure(work(2), [x], loops=3, repeats=3)


def test_without_a_device_candidates_are_ranked_by_static_figures_and_it_is_said(monkeypatch, capsys, tmp_path):
    (problem,) = problems.problems("decode_attention", "tpu", "one query head a KV head")
    seconds = iter((3e-3, 1e-3))

    def row(problem, target, config):
        if (value := next(seconds, None)) is None:
            return {"error": "RESOURCE_EXHAUSTED: too much VMEM\nmore"}
        return {"moved_seconds": value, "flops": 0, "cycles": None, "dynamic": True, "kernels": [], "bytes": 1}

    monkeypatch.setattr(static, "row", row)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning.jax, "__version__", "test")
    monkeypatch.setattr("pallas_kernels.targets.missing", lambda name: None)
    tuning.main(["decode_attention", "--target", "v5e", "--case", problem.name, "--write"])
    said = capsys.readouterr().out.splitlines()
    assert "ranked by static figures: nothing was measured" in said[0]
    assert said[1].split()[0] == "1000.0"
    assert said[2].split()[0] == "3000.0"
    assert all("too much VMEM" in line for line in said[3:-1])
    assert tuning.lookup("decode_attention", problem.call, chip("v5e"), tmp_path)["rung"] == "static"
    with pytest.raises(SystemExit, match="no chip to measure on here"):
        tuning.main(["decode_attention"])
