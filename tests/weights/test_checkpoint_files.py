"""Which file of a Hugging Face directory a tensor is read from, and what lies beside the weights."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pdx.errors import ModelFileError, ModelNotFoundError
from pdx.weights.gguf_file import GgufFile
from pdx.weights.load import load
from pdx.weights.safetensors_file import open_safetensors
from tests.support import tiny_model, weight_files

DOWN = "model.layers.0.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path):
    return tiny_model.make(tmp_path / "tiny")


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def weight_map(directory) -> dict:
    return json.loads((directory / INDEX).read_text())["weight_map"]


def write_map(directory, where: dict) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def add_to_shard(directory, shard: str, extra: dict) -> None:
    save_file(load_file(directory / shard) | extra, directory / shard)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_copy_in_another_shard_is_nobodys(directory, shard):
    """Whichever shard is opened last: the index says where the tensor is."""
    good, content = load(directory), weight_files.tensors(directory)[DOWN]
    weight_files.shard(directory, 3)
    shards = sorted(set(weight_map(directory).values()))
    home = weight_map(directory)[DOWN]
    if shards[shard] != home:
        add_to_shard(directory, shards[shard], {DOWN: np.full_like(content, 7)})
    model = load(directory)
    assert same(model.params, good.params)
    assert len(model.notes) == (shards[shard] != home)
    assert all(f"{DOWN} in {shards[shard]}" in note for note in model.notes)


def test_the_index_can_name_the_copy(directory):
    """The comparison can fail: the index is obeyed in both directions."""
    weight_files.shard(directory, 2)
    where = weight_map(directory)
    other = next(s for s in set(where.values()) if s != where[DOWN])
    add_to_shard(directory, other, {DOWN: np.full((tiny_model.WIDTH, tiny_model.FF), 7, np.float32)})
    write_map(directory, where | {DOWN: other})
    assert bool((load(directory).params["layers"][0]["down_proj"] == 7).all())


def test_tensors_that_the_index_does_not_list(directory):
    """Nobody's, and said; one that the model needs is missing, and the error says where one lies."""
    good = load(directory)
    weight_files.shard(directory, 2)
    where = weight_map(directory)
    add_to_shard(directory, where[DOWN], {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)})
    model = load(directory)
    assert same(model.params, good.params)
    assert any("1 tensor in the shards" in note and "q_proj.bias" in note for note in model.notes)
    write_map(directory, {name: shard for name, shard in where.items() if name != DOWN})
    with pytest.raises(ModelFileError, match=rf"{DOWN} is missing.*{where[DOWN]} holds one, which the index does not"):
        load(directory)


def test_a_complete_file_wins_over_an_index_that_does_not_name_it(directory):
    good, names = load(directory), list(weight_files.tensors(directory))
    write_map(directory, dict.fromkeys(names, "model-00001-of-00002.safetensors"))
    model = load(directory)
    assert same(model.params, good.params)
    assert any(f"{INDEX} is ignored" in note for note in model.notes)
    for broken in ("{", "[]", '{"metadata": {"total_size": 1}}', '{"weight_map": {}}'):
        (directory / INDEX).write_text(broken)
        assert same(load(directory).params, good.params)


def test_an_index_that_names_the_single_file_is_obeyed(directory):
    content = weight_files.tensors(directory)
    save_file({DOWN: content.pop(DOWN)}, directory / "extra.safetensors")
    save_file(content, directory / "model.safetensors")
    write_map(directory, dict.fromkeys(content, "model.safetensors") | {DOWN: "extra.safetensors"})
    assert load(directory).notes == []


def test_shards_in_a_folder_below(directory):
    good = load(directory)
    weight_files.shard(directory, 2)
    (directory / "shards").mkdir()
    where = weight_map(directory)
    for shard in set(where.values()):
        (directory / shard).rename(directory / "shards" / shard)
    write_map(directory, {name: f"shards/{shard}" for name, shard in where.items()})
    assert same(load(directory).params, good.params)
    for outside in ("../x.safetensors", "shards/../../x.safetensors", "/x.safetensors", ""):
        write_map(directory, where | {DOWN: outside})
        with pytest.raises(ModelFileError, match="outside its own directory"):
            load(directory)


@pytest.mark.parametrize("index", ['{"metadata": {"total_size": 1}}', '{"weight_map": {}}', '{"weight_map": null}'])
def test_an_index_without_tensors_is_refused(directory, index):
    weight_files.shard(directory, 2)
    (directory / INDEX).write_text(index)
    with pytest.raises(ModelFileError, match=rf"{INDEX}.*weight_map"):
        load(directory)


def test_shards_without_an_index_are_refused(directory):
    """Also where a tensor is in both: nobody says which one counts."""
    weight_files.shard(directory, 2)
    (directory / INDEX).unlink()
    with pytest.raises(ModelFileError, match=f"2 safetensors files and no {INDEX}: copy the index too"):
        load(directory)


def test_pickled_checkpoints_are_refused(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x02")
    (directory / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelFileError, match=r"pytorch_model-00001-of-00002\.bin.*safetensors"):
        load(directory)


def test_an_adapter_is_not_applied_and_said(directory):
    """Elsewhere the base model answers as if the adapter were in it."""
    good = load(directory)
    save_file(
        {"base_model.model.x.lora_A.weight": np.ones((2, 32), np.float32)}, directory / "adapter_model.safetensors"
    )
    model = load(directory)
    assert same(model.params, good.params)
    assert any("adapter_model.safetensors is a LoRA adapter, which pdx does not apply" in note for note in model.notes)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"LoRA adapter.*merge"):
        load(directory)
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"a LoRA adapter.*merge it into the model first"):
        load(directory)


def test_pointers_of_git_lfs_are_named(directory, tmp_path):
    """A clone without `git lfs pull`: elsewhere "header too large"."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
    (directory / "model.safetensors").write_bytes(pointer)
    with pytest.raises(ModelFileError, match=r"model\.safetensors: is a Git LFS pointer.*git lfs pull"):
        open_safetensors(directory)
    (tmp_path / "x.gguf").write_bytes(pointer)
    with pytest.raises(ModelFileError, match=r"x\.gguf: is a Git LFS pointer.*git lfs pull"):
        GgufFile(tmp_path / "x.gguf")
