"""`pdx compare --with`: one's own kernel beside XLA's and pdx's, measured, interpreted and counted."""

import json

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from pallas_kernels.analysis import targets
from pdx.bench import compare as comparing
from pdx.bench.compare import ceiling, paths
from pdx.cli import app
from pdx.errors import RequestError
from tests.support import own_kernel, tiny_model
from tests.support.compare_cases import CPU, NAMES, tell_the_time

CASE = NAMES["decode_attention"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tell_the_time(monkeypatch)
    monkeypatch.setattr(ceiling, "device_roofline", lambda: (CPU, "told by a test"))


def plain(q, k, v, *, starts, lengths, scale, layout):
    """Everything that a row holds, by XLA; K and V heads_first."""
    logits = jnp.einsum("bthd,bhsd->bhts", q, jnp.repeat(k, q.shape[2] // k.shape[1], 1)) * scale
    logits = jnp.where(jnp.arange(k.shape[2]) < lengths[:, None, None, None], logits, -1e30)
    v = jnp.repeat(jnp.nan_to_num(v), q.shape[2] // v.shape[1], 1)
    return jnp.einsum("bhts,bhsd->bthd", jax.nn.softmax(logits), v)


@pytest.mark.slow
def test_a_function_is_timed_beside_the_others_and_in_the_step(tmp_path):
    model = str(tiny_model.make(tmp_path / "tiny"))
    found = comparing.compare(
        ["decode_attention", "steps"], shapes=CASE, targets=[], model=model, rounds=1, extra={"mine": plain}
    )
    mine = [r for r in found.rows if r.path == "mine"]
    assert [r.op for r in mine] == ["decode_attention", "decode", "decode"]
    assert [(r.rung, r.note, r.wrong) for r in mine] == [("measured", "", False)] * 3
    assert all(r.seconds for r in mine)
    assert {v["path"] for v in found.verdicts() if v["op"] == "decode_attention"} >= {"mine"}


def test_a_wrong_one_is_marked():
    def wrong(q, k, v, starts, lengths, scale, layout):
        return jnp.zeros_like(q)

    found = comparing.compare(["decode_attention"], shapes=CASE, targets=[], rounds=1, extra={"wrong": wrong})
    (row,) = [r for r in found.rows if r.path == "wrong"]
    assert row.wrong


def test_the_documents_kernel_is_interpreted_and_counted(monkeypatch, tmp_path):
    own_kernel.module(monkeypatch, tmp_path)
    monkeypatch.setattr(targets, "missing", lambda name: "no compiler, says a test")
    case = "SmolLM2 135M, float32"
    done = CliRunner().invoke(
        app,
        [
            "compare",
            "decode_attention",
            "--shapes",
            case,
            "--with",
            "my_kernel:decode",
            "--targets",
            "v5e,h100",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    rows = [r for r in json.loads(done.stdout)["rows"] if r["path"] == "decode"]
    assert [(r["device"], r["rung"]) for r in rows] == [("cpu", "interpreted"), ("v5e", "counted"), ("h100", "counted")]
    assert rows[0]["relative_error"] < 1e-5
    assert all(r["moved_bytes"] >= r["bytes"] for r in rows[1:])


@pytest.mark.parametrize(
    ("extra", "ops", "says"),
    [
        ({"xla": plain}, ["decode_attention"], "'xla' is the name of one of pdx's own paths"),
        ({"mine": plain}, ["decode_attention", "flash_attention"], "its op is not known"),
        ({"mine": 3}, ["decode_attention"], "implementation 3 is neither"),
        ({"mine": "no.such.module:f"}, ["decode_attention"], "give package.module:function, importable from here"),
    ],
)
def test_what_cannot_be_compared_is_named(extra, ops, says):
    with pytest.raises(RequestError, match=says):
        paths.own(extra, ops)


def test_what_only_this_process_knows_is_not_compiled_elsewhere(monkeypatch):
    found = comparing.absent_chips._not_importable(
        [("decode_attention", next(c for c in comparing.selection.cases("decode_attention", CASE, "cpu")))],
        targets.Target.get("v5e"),
        {"decode_attention": {"mine": lambda q, k, v, **rest: q}},
    )
    assert "give it as package.module:function" in found[0].note
