import subprocess
import sys

import pytest

from pdx.errors import RequestError
from pdx.sampling.options import SamplingOptions

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 2.5, "whole number"),
        ("max_tokens", True, "whole number"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", NAN, "number"),
        ("temperature", INF, "finite"),
        ("temperature", "hot", "number"),
        ("temperature", True, "number"),
        ("top_k", -1, "at least 0; 0 switches it off"),
        ("top_k", 1.5, "whole number"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", NAN, "number"),
        ("min_p", -0.01, "at least 0 and at most 1"),
        ("min_p", 1.5, "at most 1"),
        ("repetition_penalty", 0, "above 0"),
        ("repetition_penalty", INF, "finite"),
        ("presence_penalty", 2.1, "at least -2 and at most 2"),
        ("frequency_penalty", -2.1, "at least -2 and at most 2"),
        ("logit_bias", {3: NAN}, "token 3"),
        ("logit_bias", {3: INF}, "token 3"),
        ("logit_bias", {-1: 0.0}, "at least 0"),
        ("logit_bias", {"x": 0.0}, "whole number"),
        ("logit_bias", [1], "map token ids"),
        ("logit_bias", dict.fromkeys(range(301), 1.0), "301 entries: it must have at most 300"),
        ("seed", -1, "from 0 to"),
        ("seed", 2**64, "from 0 to"),
        ("stop", ("",), "non-empty"),
        ("stop", (3,), "non-empty"),
        ("stop", 3, "list"),
        ("stop_token_ids", (-1,), "at least 0"),
        ("stop_token_ids", 5, "list"),
        ("ignore_eos", 1, "true or false"),
        ("logprobs", 21, "from 0 to 20"),
        ("logprobs", -1, "from 0 to 20"),
    ],
)
def test_an_error_names_option_value_and_range(name, value, said):
    with pytest.raises(RequestError) as error:
        SamplingOptions(**{name: value})
    assert name in str(error.value)
    assert said in str(error.value)
    if not isinstance(value, (dict, tuple)):
        assert repr(value) in str(error.value)


def test_edges_of_the_ranges_are_allowed():
    SamplingOptions(
        max_tokens=1,
        temperature=0,
        top_k=0,
        top_p=1,
        min_p=1,
        repetition_penalty=0.01,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={0: -INF},
        seed=2**64 - 1,
        stop=["a"],
        stop_token_ids=[0],
        logprobs=20,
    )


def test_what_json_gives_is_brought_into_form():
    options = SamplingOptions(temperature=1, stop="end", stop_token_ids=[3, 4], logit_bias={"12": 1, "7": -2.5})
    assert options.stop == ("end",)
    assert options.stop_token_ids == (3, 4)
    assert options.logit_bias == {12: 1.0, 7: -2.5}
    assert isinstance(options.temperature, float)


def test_the_given_bias_is_not_shared():
    bias = {1: 1.0}
    options = SamplingOptions(logit_bias=bias)
    bias[1] = 5.0
    assert options.logit_bias == {1: 1.0}


def test_options_do_not_import_jax():
    code = "import sys, pdx.sampling.options; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
