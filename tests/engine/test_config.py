"""Profiles of engines."""

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
