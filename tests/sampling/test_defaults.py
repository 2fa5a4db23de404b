"""Sampling settings in a model's own files: read, said, and applied to chats only."""

import json

import numpy as np
import pytest

import pdx
from pdx.clients import batch_job
from pdx.sampling.defaults import from_generation_config, from_gguf
from pdx.sampling.options import SamplingOptions
from pdx.weights.checkpoint import save
from tests.support import tiny_model

QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {}),
        ({"eos_token_id": 0, "transformers_version": "5"}, {}),
        (QWEN, {k: v for k, v in QWEN.items() if k != "do_sample"}),
        (QWEN | {"do_sample": False}, {"repetition_penalty": 1.05}),  # transformers takes the best token
        ({"temperature": 0.6}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": None}, {"temperature": 0.7}),
        ({"do_sample": True, "top_k": -1}, {"temperature": 1.0}),
        ({"stop_strings": ["END"]}, {"stop": ("END",)}),
    ],
)
def test_what_generation_config_says(config, settings):
    found = from_generation_config(config)
    assert found.settings == settings
    assert bool(found.notes) == bool(settings)


def test_what_pdx_does_not_have_is_named_and_what_is_off_is_not():
    found = from_generation_config({"suppress_tokens": [3], "no_repeat_ngram_size": 2, "num_beams": 1, "min_length": 0})
    (note,) = found.notes
    assert "suppress_tokens, no_repeat_ngram_size" in note
    assert "num_beams" not in note


@pytest.mark.parametrize("bad", [{"temperature": "hot"}, {"temperature": -1}, {"top_p": 2}, {"top_k": 0.5}])
def test_a_setting_out_of_range_is_said_and_left(bad):
    found = from_generation_config({"do_sample": True, "temperature": 0.5} | bad)
    assert next(iter(bad)) in found.notes[-1]
    assert not bad.keys() & found.settings.keys()


def test_what_a_gguf_file_says():
    prefix = "general.sampling."
    metadata = {
        f"{prefix}temp": np.float32(0.7),
        f"{prefix}top_k": np.int32(20),
        f"{prefix}top_p": np.float32(0.95),
        f"{prefix}penalty_repeat": np.float32(1.05),
        f"{prefix}mirostat": np.int32(2),
        "general.name": "x",
    }
    found = from_gguf(metadata)
    assert found.settings == {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    assert "mirostat" in found.notes[1]
    assert from_gguf({f"{prefix}top_k": 20}).settings == {"temperature": 1.0, "top_k": 20}
    off = {f"{prefix}penalty_repeat": 1.1, f"{prefix}penalty_last_n": 0}
    assert from_gguf(off).settings == {}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tiny_model.make(tmp_path_factory.mktemp("sampling") / "tiny")
    (path / "generation_config.json").write_text(json.dumps(QWEN))
    return path


@pytest.fixture(scope="module")
def model(directory):
    return pdx.load(directory)


def test_chats_of_a_batch_take_it_and_settings_that_are_given_win(tmp_path, model):
    chat = {"messages": [{"role": "user", "content": "x"}]}
    rows = [
        chat,
        chat | {"temperature": 0},
        {"custom_id": "a", "body": chat | {"top_k": 3, "temperature": None}},
        {"prompt": "x"},
        {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "x"}},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"top_p": 0.5}
    requests = batch_job.read(source, SamplingOptions(**asked), asked)
    settled = [batch_job.options_of(r, model) for r in requests]
    assert [(o.temperature, o.top_k, o.top_p) for o in settled] == [
        (0.6, 20, 0.5),
        (0.0, 20, 0.5),
        (0.6, 3, 0.5),
        (0.0, 0, 0.5),
        (0.0, 0, 0.5),
    ]


def test_the_chat_command_takes_it(directory, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from pdx.cli import app

    profile, seen = tiny_model.engine_profile(tmp_path), []
    monkeypatch.setattr("pdx.clients.chat.converse", lambda chat, lines, out: seen.append(chat.options))
    for given in ((), ("--temperature", "0")):
        done = CliRunner().invoke(app, ["chat", "-m", str(directory), "--engine", profile, "--seed", "1", *given])
        assert done.exit_code == 0, done.output
    assert [(o.temperature, o.top_k) for o in seen] == [(0.6, 20), (0.0, 20)]


def test_it_is_said_and_generate_stays_greedy(model):
    (note,) = [note for note in model.notes if "generation_config" in note]
    assert "temperature 0.6" in note
    assert "greedy unless asked" in note
    one, two = (pdx.generate(model, "x", max_tokens=4)[0].token_ids for _ in range(2))
    assert one == two == pdx.generate(model, "x", max_tokens=4, temperature=0.0)[0].token_ids


def test_a_checkpoint_keeps_it(tmp_path, model):
    assert pdx.load(save(model, tmp_path / "again")).sampling == model.sampling
