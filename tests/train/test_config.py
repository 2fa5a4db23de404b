"""The configuration of `pdx distill`: what is wrong is refused, and the text names the field."""

import pytest

from pdx.errors import RequestError
from pdx.train.config import DistillConfig, Draft, Train, check_kind
from pdx.train.texts import HELD_OUT_EVERY, read_prompts, split
from tests.test_architecture import loaded_by


def test_what_is_left_out_has_its_default(tmp_path):
    file = tmp_path / "draft.toml"
    file.write_text('[train]\nsteps = 7\n[data]\ntext = "own.txt"\n', encoding="utf-8")
    config = DistillConfig.from_toml(file)
    assert config.train == Train(steps=7)
    assert config.draft == Draft()
    assert config.data.text == str(tmp_path / "own.txt")
    assert DistillConfig.from_toml(None) == DistillConfig()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[train]\nsteps = 0", "train.steps is 0"),
        ("[train]\nlearning_rate = 0.0", "train.learning_rate is 0.0"),
        ("[train]\nlearning_rate = nan", "train.learning_rate is nan"),
        ('[draft]\nd_model = "256"', "draft.d_model is '256'"),
        ("[data]\nlength = 8", "data.length is 8"),
        ("[data]\ntext_share = 2", "data.text_share is 2"),
        ("[data]\nprompts = 3", "data.prompts is 3"),
        ("[eagle]\nfeedback = true", "eagle.feedback is True"),
        ("[train]\nstep = 3", "sets train.step, .* has steps, batch"),
        ("[trains]\nsteps = 3", "sets trains, .* has data, draft"),
        ("train = 3", "train is 3: it must be a table"),
        ("[train", "no configuration of pdx distill"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, says):
    file = tmp_path / "wrong.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=says) as error:
        DistillConfig.from_toml(file)
    assert "wrong.toml" in str(error.value)


def test_a_missing_file_and_another_head_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"none.toml is no configuration"):
        DistillConfig.from_toml(tmp_path / "none.toml")
    with pytest.raises(RequestError, match="head 'medusa' is not one of draft, eagle"):
        check_kind("medusa")


@pytest.mark.parametrize(
    ("text", "says"), [("a = 3", "a in .* list of texts"), ("", "no prompts"), ("a = ['']", "a in"), ("a =", "no TOML")]
)
def test_wrong_prompts_are_refused(tmp_path, text, says):
    file = tmp_path / "prompts.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=f"data.prompts: .*{says}"):
        read_prompts(str(file))


def test_the_prompts_that_measure_speculation_are_not_trained_on():
    from pdx.bench.speculation import PROMPTS

    prompts = read_prompts(None)
    every = {text for texts in prompts.values() for text in texts}
    assert sum(map(len, prompts.values())) == len(every) > 120
    measured = [text for texts in PROMPTS.values() for text in texts]
    said = {text.removeprefix("User: ").removesuffix("\nAssistant:") for text in measured}
    assert not every & (said | set(measured))


def test_held_out_prompts_are_apart():
    prompts = {"a": [str(i) for i in range(20)], "b": ["x"]}
    kept, held_out = split(prompts)
    assert held_out == {"a": [str(HELD_OUT_EVERY - 1), str(2 * HELD_OUT_EVERY - 1)]}
    assert sorted(kept["a"] + held_out["a"], key=int) == prompts["a"]
    assert kept["b"] == ["x"]


def test_the_configuration_needs_no_jax():
    assert not {"jax", "flax"} & set(loaded_by("import pdx.train.config, pdx.speculative.shipped"))
