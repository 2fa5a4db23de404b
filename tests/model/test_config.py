"""ModelConfig: what it refuses, what it derives, and that JSON keeps all of it."""

import dataclasses
import json
from dataclasses import replace

import pytest

from pdx.config import ModelConfig, RopeConfig
from pdx.shapes import bucket, round_up
from tests.support.models import ALL, GEMMA, LLAMA, NINE, QWEN


@pytest.mark.parametrize("cfg", [*ALL.values(), NINE], ids=[*ALL, "nine heads"])
def test_json_keeps_everything(cfg):
    back = ModelConfig.from_json(cfg.to_json())
    assert back == cfg
    assert hash(back) == hash(cfg)  # a static argument of the steps: equal configs share a program


def test_json_keeps_every_field_that_is_not_its_default():
    """Each field changed by itself: none is dropped on the way."""
    other = {
        "family": "x",
        "activation": "gelu_tanh",
        "windows": (4, None),
        "attn_scale": 0.7,
        "attn_softcap": 3.0,
        "logit_softcap": 3.0,
        "rope": RopeConfig(7.0, (1.0, 2.0, 3.0, 4.0), 1.5),
        "rope_window": RopeConfig(3.0),
    }
    for field in dataclasses.fields(ModelConfig):
        value = getattr(LLAMA, field.name)
        if field.name in other:
            changed = other[field.name]
        elif isinstance(value, bool):
            changed = not value
        elif field.name in ("num_layers", "head_dim", "num_heads"):
            continue  # others hang on them; test_json_keeps_everything has them
        else:
            changed = value + 2
        cfg = replace(LLAMA, **{field.name: changed})
        assert getattr(ModelConfig.from_json(cfg.to_json()), field.name) == changed, field.name
        assert cfg != LLAMA


def test_json_with_an_unknown_or_a_missing_field_is_refused():
    data = json.loads(LLAMA.to_json())
    with pytest.raises(ValueError, match="unknown ModelConfig fields: experts, shards"):
        ModelConfig.from_json(json.dumps(data | {"shards": 2, "experts": 8}))
    del data["d_ff"]
    with pytest.raises(ValueError, match=r"incomplete ModelConfig: .*'d_ff'"):
        ModelConfig.from_json(json.dumps(data))


def test_json_may_leave_out_what_has_a_default():
    data = json.loads(LLAMA.to_json())
    for name in ("windows", "rope", "rope_window", "norm_eps", "attn_scale"):
        del data[name]
    assert ModelConfig.from_json(json.dumps(data)) == LLAMA


def test_what_is_derived():
    assert LLAMA.windows == (None, None)
    assert LLAMA.attn_scale == 8**-0.5
    assert GEMMA.attn_scale == 0.3
    assert [c.group_size for c in (LLAMA, GEMMA, QWEN, NINE)] == [2, 4, 3, 3]
    assert [GEMMA.layer_rope(i) for i in range(3)] == [GEMMA.rope_window, GEMMA.rope, GEMMA.rope_window]
    # A window by itself changes no base.
    assert replace(GEMMA, rope_window=None).layer_rope(0) == GEMMA.rope
    assert replace(LLAMA, rope_window=RopeConfig(5.0)).layer_rope(0) == LLAMA.rope


SIZES = ["vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_context"]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"ModelConfig.{name} must be at least 1, got 0"):
        replace(LLAMA, **{name: 0}, windows=())


def test_absurd_sizes_are_refused_before_tuples_are_made_of_them():
    for name in ("num_layers", "head_dim"):
        with pytest.raises(ValueError, match=f"ModelConfig.{name} must be at most .*, got 40000000000"):
            replace(LLAMA, **{name: 40_000_000_000}, windows=())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd: RoPE needs halves"),
        ({"windows": (4,)}, "windows has 1 entries for 2 layers"),
        ({"windows": (0, None)}, r"at least 1 position wide, got \(0, None\)"),
        ({"activation": "relu"}, "activation 'relu' is not one of 'silu', 'gelu_tanh'"),
        ({"rope": RopeConfig(divisors=(1.0,))}, "divisors has 1 entries, head_dim 8 needs 4"),
        ({"rope_window": RopeConfig(divisors=(1.0,))}, "divisors has 1 entries, head_dim 8 needs 4"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_named(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(LLAMA, **changes)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LLAMA.d_model = 64


def test_round_up_and_bucket():
    assert [round_up(n, 128) for n in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert [bucket(n, (16, 64, 256)) for n in (1, 16, 17, 256)] == [16, 16, 64, 256]
    with pytest.raises(ValueError, match="257 is more than the largest bucket, 256"):
        bucket(257, (16, 64, 256))
