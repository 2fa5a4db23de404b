"""Tiles: who wins, what a bucket holds together, what a table keeps, and that measuring measures."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hardware, tiles
from pallas_kernels.analysis import problems, static, tuning
from pallas_kernels.analysis.tuning import Candidate
from pallas_kernels.hardware import chip


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


def resolve(folder, config=None, platform="tpu", **misfit):
    module = SimpleNamespace(PLATFORM=platform, Config=Config, heuristic=lambda call, chip: Config(128), **misfit)
    return tiles.resolve("op", CALL, config, module, folder)


def be_on(monkeypatch, name):
    """This process' device is the chip called `name`; None: a CPU."""
    platform, kind = (chip(name).platform, chip(name).kinds[0]) if name else ("cpu", "cpu")
    monkeypatch.setattr(hardware, "_default_device", lambda: SimpleNamespace(platform=platform, device_kind=kind))


def test_neighbours_in_size_share_a_bucket_and_nothing_else_does():
    assert tiles.bucket(CALL) == "batch=8 slots=1024 head_dim=64 dtype=bfloat16"
    assert tiles.bucket(replace(CALL, batch=8, slots=1024)) == tiles.bucket(CALL)
    for change in ({"batch": 9}, {"slots": 512}, {"head_dim": 80}, {"dtype": "float32"}, {"window": 512}):
        assert tiles.bucket(replace(CALL, **change)) != tiles.bucket(CALL)


def test_explicit_before_tuned_before_heuristic(monkeypatch, tmp_path):
    be_on(monkeypatch, "v5e")
    assert resolve(tmp_path) == (Config(128), "heuristic")
    tuning.write("op", CALL, chip("v5e"), "static", Candidate(Config(512), 1e-3, {"bytes": 7}), tmp_path)
    assert resolve(tmp_path) == (Config(512), "tuned")
    assert resolve(tmp_path, Config(256)) == (Config(256), "explicit")
    assert resolve(tmp_path, platform="gpu") == (Config(128), "heuristic")
    be_on(monkeypatch, "v6e")
    assert resolve(tmp_path) == (Config(128), "heuristic")
    be_on(monkeypatch, None)
    assert resolve(tmp_path) == (Config(128), "heuristic")


def test_tiles_that_do_not_suit_the_call_are_passed_over_or_named(monkeypatch, tmp_path):
    be_on(monkeypatch, "v5e")
    tuning.write("op", CALL, chip("v5e"), "static", Candidate(Config(512), 1e-3), tmp_path)

    def large(call, config):
        return "too large" if config.block > call.slots // 4 else None

    assert resolve(tmp_path, misfit=large) == (Config(128), "heuristic")
    with pytest.raises(ValueError, match=r"op: Config.*512.*does not fit: too large"):
        resolve(tmp_path, Config(512), misfit=large)


KEY = tiles.bucket(CALL)


def entry_of(**config) -> str:
    """A table with one entry."""
    return json.dumps({"ops": {"op": {KEY: {"config": config}}}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", 'must be an object with "ops"'),
        ('{"device": "v5e"}', 'must be an object with "ops"'),
        ('{"ops": []}', 'must be an object with "ops"'),
        ('{"ops": {"op": []}}', "an object of entries under op"),
        (json.dumps({"ops": {"op": {KEY: {"rung": "static"}}}}), f'without a "config" object, op, {KEY!r}'),
        (entry_of(block=128, old=1), f"{KEY!r}.*'old'.*block, splits, deep"),
        (entry_of(block=100), f"{KEY!r}.*a multiple of 128"),
        (entry_of(block="128"), f"{KEY!r}.*remove the entry, or tune again"),
    ],
    ids=[
        "no JSON",
        "a list",
        "no ops",
        "ops a list",
        "entries a list",
        "no config",
        "an old field",
        "a wrong value",
        "a wrong type",
    ],
)
def test_a_table_that_cannot_be_read_is_named(monkeypatch, tmp_path, text, says):
    be_on(monkeypatch, "v5e")
    (tmp_path / "v5e.json").write_text(text)
    with pytest.raises(ValueError, match=f"the tuned table .*v5e.json .*{says}"):
        resolve(tmp_path)
    assert resolve(tmp_path, Config(256)) == (Config(256), "explicit")
    if "block" not in text:  # what cannot be read is not overwritten
        with pytest.raises(ValueError, match="remove the file and tune again"):
            tuning.write("op", CALL, chip("v5e"), "static", Candidate(Config(512), 1e-3), tmp_path)


CHIPS = {"tpu": "v5e", "gpu": "a100"}
KERNELS = [(platform, name, op) for platform, name in CHIPS.items() for op in problems.ops(platform)]


@pytest.mark.parametrize(("platform", "name", "op"), KERNELS)
def test_every_kernel_takes_the_tuned_tiles(monkeypatch, tmp_path, op, platform, name):
    """Traced for the chip, the kernel is built from what the table says, and not from the heuristic's choice."""
    problem = next(p for p in problems.problems(op, platform, large_only=True) if not p.unsupported)
    module, where = problem.module, chip(name)
    others = [c for c in tuning.candidates(problem, where) if c != module.heuristic(problem.call, where)]
    tuning.write(op, problem.call, where, "static", Candidate(others[0], 1e-3), tmp_path)
    monkeypatch.setenv(tiles.ENVIRONMENT, str(tmp_path))
    be_on(monkeypatch, name)
    taken = []
    cost = module.cost
    monkeypatch.setattr(module, "cost", lambda *a: taken.append(a) or cost(*a))
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem.arrays.values())
    tuned = str(jax.make_jaxpr(problem.fn())(*shapes))
    assert taken
    assert tuned == str(jax.make_jaxpr(problem.fn(others[0]))(*shapes))
    monkeypatch.setenv(tiles.ENVIRONMENT, str(tmp_path / "none"))
    assert tuned != str(jax.make_jaxpr(problem.fn())(*shapes))


def test_a_table_says_where_it_comes_from_and_keeps_what_was_measured(tmp_path):
    v5e, key = chip("v5e"), tiles.bucket(CALL)
    path = tuning.write("op", CALL, v5e, "static", Candidate(Config(512), 1e-3, {"bytes": 7}), tmp_path)
    entry = json.loads(path.read_text())["ops"]["op"][key]
    assert path.name == "v5e.json"
    assert entry["jax"] == jax.__version__
    assert len(entry["date"]) == len("2026-01-01")
    assert entry["figures"] == {"bytes": 7, "score_seconds": 1e-3}
    tuning.write("op", CALL, v5e, "measured", Candidate(Config(256), 2e-3), tmp_path)
    assert tiles.lookup("op", CALL, v5e, tmp_path)["rung"] == "measured"
    tuning.write("op", CALL, v5e, "static", Candidate(Config(512), 1e-3), tmp_path)
    assert tiles.lookup("op", CALL, v5e, tmp_path)["config"]["block"] == 256


def test_the_tables_in_the_package_name_configs_that_exist():
    for path in tiles.FOLDER.glob("*.json"):
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


def test_a_table_is_read_once(monkeypatch, tmp_path):
    tuning.write("op", CALL, chip("v5e"), "static", Candidate(Config(512), 1e-3), tmp_path)
    tiles.lookup("op", CALL, chip("v5e"), tmp_path)
    (tmp_path / "v5e.json").unlink()
    assert tiles.lookup("op", CALL, chip("v5e"), tmp_path)["config"]["block"] == 512


def test_measuring_runs_every_loop():
    calls = []

    def work(x):
        jax.debug.callback(lambda: calls.append(1))
        return x * 2

    assert tuning.measure(work, [jnp.ones((4, 4))], loops=3, repeats=2) > 0
    jax.effects_barrier()
    assert len(calls) == 3 * (1 + 2)  # one run to warm up


def test_without_a_device_candidates_are_ranked_by_static_figures_and_it_is_said(monkeypatch, capsys, tmp_path):
    (problem,) = problems.problems("decode_attention", "tpu", "one query head a KV head")
    seconds = iter((3e-3, 1e-3))

    def row(problem, target, config):
        if (value := next(seconds, None)) is None:
            return {"error": "RESOURCE_EXHAUSTED: too much VMEM\nmore"}
        return {"moved_seconds": value, "flops": 0, "cycles": None, "dynamic": True, "kernels": [], "bytes": 1}

    monkeypatch.setattr(static, "row", row)
    monkeypatch.setenv(tiles.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(tuning.jax, "__version__", "test")
    monkeypatch.setattr("pallas_kernels.analysis.targets.missing", lambda name: None)
    tuning.main(["decode_attention", "--target", "v5e", "--case", problem.name, "--write"])
    said = capsys.readouterr().out.splitlines()
    assert "ranked by static figures: nothing was measured" in said[0]
    assert said[1].split()[0] == "1000.0"
    assert said[2].split()[0] == "3000.0"
    assert all("too much VMEM" in line for line in said[3:-1])
    assert tiles.lookup("decode_attention", problem.call, chip("v5e"))["rung"] == "static"
    with pytest.raises(SystemExit, match="no chip to measure on here"):
        tuning.main(["decode_attention"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("flash_attention --target v5e:3", "v5e has no slice 3"),
        ("nosuch", "no op 'nosuch'; there are flash"),
        ("flash_attention --target v5e --case zzz", "'zzz' in its name; there are 'Llama 3 8B, bf16, no mask'"),
    ],
    ids=["slice", "op", "case"],
)
def test_what_is_not_there_is_told_with_what_there_is(arguments, says):
    with pytest.raises(SystemExit, match=says):
        tuning.main(arguments.split())


def test_a_case_without_any_working_candidate_fails(monkeypatch, capsys):
    name = "one query head a KV head"
    monkeypatch.setattr(static, "row", lambda *a: {"error": "RESOURCE_EXHAUSTED: too much VMEM\nmore"})
    monkeypatch.setattr("pallas_kernels.analysis.targets.missing", lambda name: None)
    with pytest.raises(SystemExit, match=f"v5e: no candidate works for {name} .RESOURCE_EXHAUSTED: too much VMEM.$"):
        tuning.main(["decode_attention", "--target", "v5e", "--case", name, "--write"])
    assert "kept" not in capsys.readouterr().out
