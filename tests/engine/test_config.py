"""Settings of an engine, and profiles of them."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hardware
from pdx.engine import sizing
from pdx.engine.config import EngineConfig, profiles, types_of
from pdx.errors import RequestError
from pdx.model import param_specs
from pdx.plan import published
from pdx.quant import Policy, quantized_specs
from pdx.weights.load import Model


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
        ({"slots": 0}, "slots"),
        ({"token_budget": 8}, "above 8"),
        ({"policy": "lifo"}, "policy"),
        ({"pages": 0}, "pages"),
        ({"aging_s": 0}, "aging_s"),
        ({"memory_share": 2}, "memory_share"),
        ({"num_logprobs": 99}, "num_logprobs"),
        ({"deterministic": True, "chunked_prefill": False}, "one shape"),
        ({"deterministic": True, "token_budget": 20, "page_size": 16}, "page"),
        ({"prefill_rows": 1.5}, "whole number"),
    ],
)
def test_settings_that_make_no_sense(fields, says):
    with pytest.raises(RequestError, match=says):
        EngineConfig(**fields)


CHECKED = [f.name for f in dataclasses.fields(EngineConfig) if types_of(f.name)[0] is not str]


@pytest.mark.parametrize("name", CHECKED)
def test_every_setting_is_checked_by_its_declaration(name):
    for value in (object(), -1, "x", [1, 2.5]):
        with pytest.raises(RequestError, match=rf"^{name} "):
            EngineConfig(**{name: value})


def test_a_row_of_pages_and_an_open_setting_are_made_plain():
    config = EngineConfig(pages=np.array([3, 4]), slots=np.int64(2), tpot_s=1, page_size=None)
    assert (config.pages, type(config.slots), type(config.tpot_s), config.page_size) == ((3, 4), int, float, None)
    with pytest.raises(RequestError, match="slots is None"):
        EngineConfig(slots=None)


def test_ladders():
    config = EngineConfig(slots=8, token_budget=100)
    assert config.ladder(512) == (8, 16, 32, 64, 100)
    assert dataclasses.replace(config, deterministic=True).ladder(512) == (100,)
    assert dataclasses.replace(config, chunked_prefill=False).ladder(512)[-1] == 520


def test_the_budget_on_a_chip_knows_how_the_weights_are_stored(monkeypatch):
    cfg = published.config("llama-3-8b")
    specs = param_specs(cfg, jnp.bfloat16)
    monkeypatch.setattr(sizing, "detect", lambda: hardware.chip("v5e"))
    config = EngineConfig(slots=8, max_context=4096, tpot_s=0.015)

    def budget(params):
        return sizing.budget(Model(params, cfg, "llama", Path(), jnp.bfloat16), config, jnp.bfloat16)

    # Reading 16 GB of weights takes longer than a step may, reading 8 GB does not: a chunk fits.
    assert budget(specs) < budget(quantized_specs(specs, Policy.parse("int8")))
