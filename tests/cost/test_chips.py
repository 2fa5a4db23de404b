"""A user's chips: read, refused, found by name, planned for; and what measured rates foretell."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pallas_kernels import hardware
from pdx.cli import app
from pdx.cost import Setup, chips, model_matrices
from pdx.cost.chips import MeasuredChip
from pdx.cost.measured_rates import Rates, Surface
from pdx.errors import RequestError
from pdx.model import param_specs
from tests.support import models

DESCRIBED = 'platform = "gpu"\nhbm_gbps = 500\nhbm_gib = 24.0\nf32_tflops = 40\nbf16_tflops = 80\n'
FLAT = Surface((1,), (1,), ((2e9,),))


def measured(**rates) -> MeasuredChip:
    return MeasuredChip("mine", "cpu", ("cpu",), 0.1, 0.2, 20.0, 16.0, 2, 1.0, 0.15, rates=Rates(**rates))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PDX_HOME", str(tmp_path))
    return tmp_path


def described(tmp_path, text, name="own.toml"):
    file = tmp_path / name
    file.write_text(text)
    return file


def test_a_chip_is_described_in_a_file(tmp_path):
    found = chips.chip(described(tmp_path, DESCRIBED))
    assert (found.name, found.platform, found.int8_tops, found.cores) == ("own", "gpu", None, 1)
    assert found.tflops("bfloat16") == found.tflops("int8") == 80
    assert found.seconds(0, 500e9) == 1
    assert not isinstance(found, MeasuredChip)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (DESCRIBED.replace("hbm_gbps = 500\n", ""), "hbm_gbps missing; every chip needs platform"),
        (DESCRIBED + "speed = 3", "no field 'speed'; the fields are bf16_tflops"),
        (DESCRIBED.replace('"gpu"', '"npu"'), "platform 'npu' is not one of cpu, gpu, tpu"),
        (DESCRIBED.replace("500", "-1"), "hbm_gbps must be a positive number, not -1"),
        (DESCRIBED.replace("500", "nan"), "hbm_gbps must be a positive number"),
        (DESCRIBED.replace("500", "'fast'"), "hbm_gbps must be a positive number, not 'fast'"),
        (DESCRIBED + "cores = 1.5", "cores must be a whole number"),
        (DESCRIBED + "kinds = 'x'", "kinds must be a list of texts"),
        (DESCRIBED + "[rates]\nrest = 3", "not a chip"),
        (DESCRIBED + "[rates]\nspeed = 3", "has no 'speed'"),
        (
            DESCRIBED + "[rates.rest]\nfirst = [1]\nsecond = [1, 2]\nvalues = [[1.0]]",
            "1 rows of rates for 1 x 2 points",
        ),
        (DESCRIBED + "[rates.rest]\nfirst = [1]\nsecond = [2, 1]\nvalues = [[1.0, 1.0]]", "must ascend"),
        (DESCRIBED + "[rates.rest]\nfirst = [1]\nsecond = [2]\nvalues = [[0.0]]", "must be positive"),
        (DESCRIBED + "[rates.rest]\nfirst = [1]\nvalues = [[1.0]]", "'second' is missing or unknown"),
        ("platform = ", "not a chip"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path, text, says):
    with pytest.raises(RequestError, match=says) as raised:
        chips.chip(described(tmp_path, text))
    assert "own.toml" in str(raised.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="not a chip"):
        chips.chip(tmp_path / "none.toml")


def test_what_is_saved_is_read_again(home):
    first = measured(
        products={"float32": Surface((1, 8), (10, 100), ((1.0, 2.0), (3.0, 4.5e9)))},
        decode_attention={"int8": FLAT},
        rest=FLAT,
        made='a "device"',
    )
    assert chips.save(first) == home / "chips" / "mine.toml"
    again = chips.chip("mine")
    assert again == first
    assert again.rates == first.rates
    with pytest.raises(RequestError, match="letters, digits"):
        chips.save(dataclasses.replace(first, name="../x"))


def test_published_chips_are_saved_and_read_alike(tmp_path):
    for one in hardware.CHIPS.values():
        assert chips.read(chips.save(one, tmp_path / f"{one.name}.toml")) == one


def test_own_chips_are_found_and_listed(home):
    assert chips.chip("v5e") is hardware.chip("v5e")
    chips.save(dataclasses.replace(measured(), name="laptop"))
    with pytest.raises(RequestError, match=r"it has v4.*your own: laptop; or a .toml file"):
        chips.chip("nothing")


def test_plan_takes_them(home, tmp_path):
    chips.save(dataclasses.replace(measured(), name="laptop"))
    for name in ("laptop", str(described(tmp_path, DESCRIBED)), "laptop-2"):
        done = CliRunner().invoke(app, ["plan", "smollm2-135m", "--chip", name, "--json"])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["chip"] == ("own" if name.endswith("toml") else "laptop")
    assert found["chips"] == 2
    assert "estimates, at measured rates" in " ".join(
        CliRunner().invoke(app, ["plan", "smollm2-135m", "--chip", "laptop"]).stdout.split()
    )
    wrong = CliRunner().invoke(app, ["plan", "smollm2-135m", "--chip", str(tmp_path / "no.toml")])
    assert isinstance(wrong.exception, RequestError)


GRID = Surface((1, 4, 16), (10, 1000), ((1.0, 100.0), (4.0, 400.0), (16.0, 1600.0)))


@given(x=st.floats(0.1, 100), y=st.floats(1, 10_000))
def test_powers_are_interpolated_exactly(x, y):
    """x * y / 10 is a plane in logarithms; outside the grid the edge holds."""
    inside = min(max(x, 1), 16) * min(max(y, 10), 1000) / 10
    assert GRID(x, y) == pytest.approx(inside, rel=1e-9)


def test_a_step_takes_what_its_pieces_take():
    setup = Setup(models.LLAMA, "float32")
    chip = measured(products={"float32": FLAT}, decode_attention={"float32": FLAT}, rest=FLAT)
    step = setup.decode(2, 100)
    count = sum(m.size for m in model_matrices.matrices(param_specs(models.LLAMA)) if m.part != "embedding")
    width = (
        sum(
            m.out + m.columns for m in model_matrices.matrices(param_specs(models.LLAMA)) if m.name.startswith("layers")
        )
        / 2
    )
    parts = chip.rates.parts(step.work)
    assert parts["products"] == pytest.approx(count / 2e9)
    assert parts["attention"] == pytest.approx(step.bytes_by_part["kv read"] / 2e9)
    assert parts["rest"] == pytest.approx(2 * 2 * width / 2e9)
    assert step.seconds(chip) == pytest.approx(sum(parts.values()))
    assert step.floor(chip) == sum(max(pair) for pair in step.parts(chip).values())
    assert step.seconds(chip, chips=2) == step.floor(chip, 2)
    assert step.seconds(hardware.chip("v5e")) == step.floor(hardware.chip("v5e"))


def test_what_was_not_measured_is_the_floor():
    step = Setup(models.LLAMA, "float32", "int8").decode(1, 100)
    chip = measured(products={"float32": FLAT}, rest=FLAT)
    assert chip.rates.parts(step.work)["products"] is None
    floors = [max(pair) for pair in step.parts(chip).values()]
    assert step.seconds(chip) == pytest.approx(sum(floors) + chip.rates.parts(step.work)["rest"])


def test_prefill_and_verification_take_their_own_rates():
    setup = Setup(models.LLAMA, "float32")
    fast, slow = Surface((1,), (1,), ((1e12,),)), Surface((1,), (1,), ((1.0,),))
    chip = measured(prefill_attention={"float32": slow}, decode_attention={"float32": fast})
    assert setup.prefill(1, 64).seconds(chip) > 1e3 > setup.verify(1, 64, 4).seconds(chip)
    # Twice as many rows, twice as long; a window sees less.
    one, two = (chip.rates.parts(setup.prefill(b, 64).work)["attention"] for b in (1, 2))
    assert two == pytest.approx(2 * one)
    gemma = Setup(models.GEMMA, "float32").decode(1, 100).work
    assert {(a.layers, a.seen) for a in gemma.attention} == {(1, 100), (2, 8)}
    assert not math.isnan(one)


def test_without_flash_attention_scores_are_moved():
    setup = Setup(models.LLAMA, "float32")
    dense = dataclasses.replace(setup, flash=False).prefill(2, 10)
    pairs = 2 * 10 * 10 * models.LLAMA.num_layers * models.LLAMA.num_heads
    assert dense.bytes_by_part["scores"] == 16 * pairs
    assert dense.flops_by_part["attention"] == 4 * models.LLAMA.head_dim * pairs
    assert "scores" not in setup.prefill(2, 10).bytes_by_part
    assert dense.seconds(hardware.chip("v5e")) > setup.prefill(2, 10).seconds(hardware.chip("v5e"))


def test_a_chip_is_read_from_a_file_of_any_name(tmp_path):
    file = tmp_path / "my own.chip"
    chips.save(hardware.chip("v5e"), file)
    assert chips.chip(file).hbm_gbps == hardware.chip("v5e").hbm_gbps
    assert chips.chip(str(file)) == chips.chip(file)
