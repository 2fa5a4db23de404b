"""Settings of an engine, and profiles of them."""

import dataclasses

import pytest

from pdx.engine.config import EngineConfig, profiles
from pdx.errors import RequestError


@pytest.mark.parametrize("name", profiles())
def test_every_profile_reads(name):
    assert EngineConfig.from_toml(name).slots >= 1


def test_profiles_are_found_and_changed():
    assert "cpu" in profiles()
    assert EngineConfig.from_toml("cpu", slots=3).slots == 3


def test_a_file_may_be_given(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("slots = 2\npolicy = 'shortest'\n")
    assert (EngineConfig.from_toml(file).slots, EngineConfig.from_toml(file).policy) == (2, "shortest")
    file.write_text("slot = 2\n")
    with pytest.raises(RequestError, match="slot"):
        EngineConfig.from_toml(file)
    with pytest.raises(RequestError, match=r"there are .*cpu"):
        EngineConfig.from_toml("no-such")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"slots": 0}, "slots"), ({"token_budget": 8}, "above 8"), ({"policy": "lifo"}, "policy"),
        ({"pages": 0}, "pages"), ({"aging_s": 0}, "aging_s"), ({"memory_share": 2}, "memory_share"),
        ({"num_logprobs": 99}, "num_logprobs"), ({"deterministic": True, "chunked_prefill": False}, "one shape"),
        ({"deterministic": True, "token_budget": 20, "page_size": 16}, "page"), ({"prefill_rows": 1.5}, "whole number"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(fields, says):
    with pytest.raises(RequestError, match=says):
        EngineConfig(**fields)


def test_ladders():
    config = EngineConfig(slots=8, token_budget=100)
    assert config.ladder(512) == (8, 16, 32, 64, 100)
    assert dataclasses.replace(config, deterministic=True).ladder(512) == (100,)
    assert dataclasses.replace(config, chunked_prefill=False).ladder(512)[-1] == 520
