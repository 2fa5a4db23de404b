"""`save` and loading again: bit-equal, whole or not at all, restorable by orbax, and broken files named."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pdx.errors import ModelFileError
from pdx.model import forward
from pdx.weights import checkpoint
from pdx.weights.checkpoint import CheckpointFile, check_target, named_leaves, save
from pdx.weights.load import load
from tests.support import tiny_model, weight_files


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """With biases of zero: an array of nothing but zeros is easily left out of a file."""
    directory = tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")
    weight_files.reconfigure(directory, architectures=["Qwen2ForCausalLM"], model_type="qwen2")

    def add_biases(tensors):
        for i in range(tiny_model.LAYERS):
            for x in "qkv":
                rows = tensors[f"model.layers.{i}.self_attn.{x}_proj.weight"].shape[0]
                tensors[f"model.layers.{i}.self_attn.{x}_proj.bias"] = np.zeros(rows, np.float32)

    weight_files.rewrite(directory, add_biases)
    return load(directory)


@pytest.fixture(scope="module")
def saved_once(original, tmp_path_factory):
    return save(original, tmp_path_factory.mktemp("saved") / "copy")


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy that a test may break."""
    import shutil

    return shutil.copytree(saved_once, tmp_path / "copy")


def test_what_was_saved_is_loaded_bit_for_bit(original, saved):
    again = load(saved)
    assert (again.name, again.config, again.dtype) == ("copy", original.config, original.dtype)
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), original.params, again.params)
    assert jax.tree.all(same)
    text = "the same ids: çà, 日本 🙂"
    assert again.tokenizer.encode(text) == original.tokenizer.encode(text)
    assert again.tokenizer.eos_ids == original.tokenizer.eos_ids
    messages = [{"role": "user", "content": "hi"}]
    assert again.tokenizer.apply_chat_template(messages) == original.tokenizer.apply_chat_template(messages)


def test_the_same_logits_come_out(original, saved):
    again = load(saved)
    tokens = np.asarray([original.tokenizer.encode("one two three")])
    first, second = (forward(m.params, m.config, tokens).logits for m in (original, again))
    np.testing.assert_array_equal(first, second)


def test_bf16_and_a_mesh_round_trip(original, tmp_path):
    model = load(original.path, dtype="bf16", mesh="model=4")
    again = load(save(model, tmp_path / "bf16"), dtype="bf16", mesh="data=2,model=2")
    for (name, x), (_, y) in zip(named_leaves(model.params), named_leaves(again.params), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)
    assert again.params["layers"][0]["up_proj"].sharding.spec == PartitionSpec("model", None)
    widened = load(tmp_path / "bf16", dtype="f32")
    np.testing.assert_array_equal(widened.params["embed"], model.params["embed"].astype(jnp.float32))


def test_orbax_restores_the_parameters_by_itself(original, saved):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        restored = checkpointer.restore(saved / "params")
    assert dict(named_leaves(restored)).keys() == dict(named_leaves(original.params)).keys()
    for (name, x), (_, y) in zip(named_leaves(original.params), named_leaves(restored), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def test_license_and_terms_go_along(original, tmp_path):
    import dataclasses

    model = dataclasses.replace(original, license="some terms", terms=("read them",), notes=["read them", "other"])
    again = load(save(model, tmp_path / "terms"))
    assert (again.license, again.terms, again.notes) == ("some terms", ("read them",), ["read them"])


def test_a_directory_that_is_taken_is_left_alone(original, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    for target in (taken, taken / "file"):
        with pytest.raises(ModelFileError, match="exists and is not empty: name a new directory"):
            save(original, target)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    (tmp_path / "empty").mkdir()
    assert check_target(tmp_path / "new") == tmp_path / "new"
    assert load(save(original, tmp_path / "empty")).name == "empty"


def test_a_save_that_fails_leaves_nothing(original, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.os, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        save(original, tmp_path / "deep" / "copy")
    assert list((tmp_path / "deep").iterdir()) == []


NAME = "layers.1.q_proj"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "params" / NAME / "0.0").unlink(), rf"{NAME}/0\.0: the data of parameter {NAME} is missing"),
        (lambda d: (d / "params" / NAME / "0.0").write_bytes(b"1234"), f"{NAME} has 4 bytes, expected 4096 bytes"),
        (lambda d: (d / "params" / NAME / ".zarray").unlink(), f"parameter {NAME} is missing or its description"),
        (lambda d: (d / "params" / NAME / ".zarray").write_text("{"), f"parameter {NAME} is missing or its descr"),
        (lambda d: edit(d / "params" / NAME / ".zarray", shape=[64, 16]), rf"{NAME} is stored as <f4 of .* \[64, 16\]"),
        (lambda d: edit(d / "params" / NAME / ".zarray", dtype="<i4"), rf"{NAME} is stored as <i4 .* expected float32"),
        (lambda d: edit(d / "params" / NAME / ".zarray", compressor={"id": "zstd"}), "one uncompressed chunk"),
        (lambda d: (d / "pdx.json").write_text("no"), r"pdx\.json: not the description of a pdx checkpoint"),
        (lambda d: (d / "pdx.json").write_text("[" * 100_000), r"pdx\.json: not the description of a pdx checkpoint"),
        (lambda d: edit(d / "pdx.json", version=99), "version 99, expected 'pdx-checkpoint' version 1: convert the"),
        (lambda d: edit(d / "pdx.json", config={"family": "x"}), "incomplete ModelConfig"),
        (lambda d: edit(d / "pdx.json", params={}), r"tensor embed and \d+ more is missing"),
    ],
)
def test_broken_checkpoints_are_named(saved, damage, said):
    damage(saved)
    with pytest.raises(ModelFileError, match=said):
        load(saved)


def test_other_shapes_than_the_configuration_and_nan_are_named(saved):
    head = json.loads((saved / "pdx.json").read_text())
    edit(saved / "pdx.json", config=head["config"] | {"d_ff": 50})
    with pytest.raises(ModelFileError, match=r"down_proj has shape \[32, 48\], expected \[32, 50\]"):
        load(saved)
    edit(saved / "pdx.json", config=head["config"])
    chunk = saved / "params" / NAME / "0.0"
    values = np.fromfile(chunk, np.float32)
    values[33] = np.nan
    values.tofile(chunk)
    with pytest.raises(ModelFileError, match=rf"{NAME}.* has 1 values that are NaN .* at \[1, 1\]"):
        load(saved)


def test_rows_can_be_selected(saved):
    file = CheckpointFile(saved)
    whole = file.read(NAME, np.float32)
    np.testing.assert_array_equal(file.read(NAME, np.float32, np.array([3, 1])), whole[[3, 1]])
