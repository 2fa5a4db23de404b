"""Plans: what fits, what it costs, and what is said about it."""

import json

import pytest
from typer.testing import CliRunner

from pallas_kernels import hardware
from pallas_kernels.analysis import targets
from pdx import plan
from pdx.cli import app
from pdx.cost import Setup
from pdx.errors import ModelFileError, ModelNotFoundError, RequestError, UnsupportedModelError
from pdx.plan import compiled, published, text
from pdx.weights.opening import open_model
from pdx.weights.resolve import resolve

# Parameters as their model cards give them, in billions; Gemma's from 4B on are those of the text model.
PUBLISHED = {
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "mistral-7b": 7.24,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0,
    "qwen3-8b": 8.2,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "smollm2-135m": 0.135,
    "gemma-3-270m": 0.268,
    "gemma-3-1b": 1.0,
    "gemma-3-4b": 3.88,
    "gemma-3-12b": 11.8,
    "gemma-3-27b": 27.0,
    "mixtral-8x7b": 46.7,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "deepseek-v3": 671.0,
    "qwen3-30b-a3b": 30.5,
}
# Those a token meets; gpt-oss's card leaves the embedding out, the others count it.
ACTIVE = {"mixtral-8x7b": 12.9, "gpt-oss-20b": 3.61, "gpt-oss-120b": 5.13, "deepseek-v3": 37, "qwen3-30b-a3b": 3.3}


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_every_shape_has_the_parameters_that_are_published():
    assert set(published.names()) == set(PUBLISHED)
    for name, billions in PUBLISHED.items():
        shape = published.shape(name)
        every, _ = shape.setup().parameters
        assert every / 1e9 == pytest.approx(billions, rel=0.015 if shape.runs else 0.01), name


def test_every_mixture_has_the_active_parameters_that_are_published():
    for name, billions in ACTIVE.items():
        shape = published.shape(name)
        active = shape.setup().parameters[1]
        active += 0 if name.startswith("gpt") else shape.config.vocab_size * shape.config.d_model
        assert active / 1e9 == pytest.approx(billions, rel=0.02), name


def test_every_shape_can_be_planned_with():
    for name in published.names():
        for quantize in (None, "int8", "int4"):
            found = plan.make(name, published.shape(name), "v5e-8", quantize=quantize, kv_dtype="int8", batch=4)
            assert found.to_dict()["decode"]["bound"] == "memory", name
            assert 0 < found.tpot < found.e2e
    for name in ("gpt-oss-20b", "gpt-oss-120b"):  # as published: MXFP4 experts, 12.8 and 60.8 GiB on disk
        stored = published.shape(name).setup(quantize="stored")
        assert sum(stored.weights.values()) / 2**30 == pytest.approx({"20b": 12.8, "120b": 60.8}[name[8:]], rel=0.01)


def test_a_shape_that_does_not_run_says_so():
    with pytest.raises(UnsupportedModelError, match="but not run yet"):
        published.config("mixtral-8x7b")
    with pytest.raises(RequestError, match="`stored` is what a file holds"):
        plan.make("mixtral-8x7b", published.shape("mixtral-8x7b"), "v5e", quantize="stored")
    with pytest.raises(RequestError, match="names no layer"):
        plan.make("mixtral-8x7b", published.shape("mixtral-8x7b"), "v5e", quantize="int8,*.v2_proj=int4")
    with pytest.raises(RequestError, match="do not divide rows of 2880"):
        plan.make("gpt-oss-20b", published.shape("gpt-oss-20b"), "v5e", quantize="int4:g128")
    done = run("deepseek-v3", "--chip", "h200-8", "--compile")
    assert isinstance(done.exception, UnsupportedModelError)
    assert "cannot run experts yet" in str(done.exception)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("name", "model"), [("smollm2-135m", "smollm2-135m-instruct"), ("gemma-3-270m",) * 2])
def test_a_shape_is_that_of_the_model(name, model):
    shape, real = Setup(published.config(name)), Setup(open_model(resolve(model)).config)
    assert shape.weights == real.weights
    assert shape.decode(3, 1500).bytes_by_part == real.decode(3, 1500).bytes_by_part
    assert shape.prefill(2, 700) == real.prefill(2, 700)


def test_the_json_has_both_phases():
    done = run("llama-3-8b", "--chip", "v5e-1", "--quantize", "int8", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["hbm_capacity_bytes"] == 16 << 30
    assert found["hbm_bytes"] == pytest.approx(8.04e9 + 2048 * 131072, rel=0.001)
    assert set(found["prefill"]) == set(found["decode"])
    assert {"flops", "bytes", "intensity_flops_per_byte", "bound", "seconds"} <= set(found["decode"])
    assert (found["prefill"]["bound"], found["decode"]["bound"]) == ("compute", "memory")
    assert found["decode"]["seconds"] == pytest.approx(found["decode"]["bytes"] / 819e9, rel=0.01)
    assert found["prefill"]["intensity_flops_per_byte"] > 100 > 10 > found["decode"]["intensity_flops_per_byte"]
    assert found["e2e_s"] == pytest.approx(found["ttft_s"] + 255 * found["tpot_s"])
    assert found["slo"] == {}


def test_objectives_are_judged():
    done = run(
        "llama-3-8b",
        "--chip",
        "v5e",
        "--quantize",
        "int8",
        "--batch",
        8,
        "--slo-ttft",
        50,
        "--slo-tpot",
        20,
        "--output-tokens",
        10,
        "--json",
    )
    found = json.loads(done.stdout)
    assert found["slo"]["ttft"] == {"asked_s": 0.05, "predicted_s": found["ttft_s"], "met": False}
    assert found["slo"]["tpot"]["met"]
    assert 8 < found["batch_within_slo"] <= found["largest_batch"]
    assert 0 < found["largest_chunk_within_slo_tokens"] == found["chunked_prefill"]["chunk_tokens"] < 1024
    chunked = found["chunked_prefill"]
    assert found["tpot_s"] < chunked["longest_step_s"] <= 0.02 < chunked["longest_step_unchunked_s"]
    assert chunked["ttft_s"] > found["ttft_s"]
    assert f"room for {chunked['chunk_tokens']} prompt tokens" in " ".join(found["advice"])


@pytest.mark.parametrize(
    ("chip", "chips", "name"),
    [("v5e", 1, "v5e"), ("v5e", 8, "v5e:2x4"), ("v5p", 8, "v5p:2x2x2"), ("h100", 8, "h100:8")],
)
def test_chips_are_compiled_for_as_slices(chip, chips, name):
    assert compiled.target(hardware.chip(chip), chips) == name
    with pytest.raises(RequestError, match="slices of 1, 4, 8"):
        compiled.target(hardware.chip("v5e"), 3)


def test_what_a_compiler_says_is_read(monkeypatch):
    found = plan.make("llama-3-8b", published.shape("llama-3-8b"), "v5e", batch=8)
    memory = {"argument": 7, "output": 2, "temp": 1, "alias": 2, "code": 0}
    answers = {
        "prefill": {"memory": memory, "accessed": 30e9, "seconds": 2.0},
        "decode_step": {
            "error": "JaxRuntimeError: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out "
            "of memory in memory space hbm. Used 17.87G of 15.75G hbm."
        },
    }
    asked = []
    monkeypatch.setattr(targets, "missing", lambda name: None)
    monkeypatch.setattr(compiled, "_run", lambda request: asked.append(request) or answers[request["step"]])
    prefill, decode = compiled.compiled(found)
    assert (prefill.fits, prefill.memory, prefill.error) == (True, memory, None)
    assert (decode.fits, decode.memory) == (False, None)
    assert decode.wanted == int(17.87 * 2**30)
    assert decode.planned == found.needed
    assert [(x["batch"], x["tokens"], x["target"]) for x in asked] == [(1, 1024, "v5e"), (8, 512, "v5e")]
    answers["prefill"] = {"error": "ValueError: no"}
    assert compiled.compiled(found)[0].fits is None
    text.show(found, [prefill, decode])


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(targets, "_installed", lambda module: False)
    for chip, says in (("v5e", "aot-tpu"), ("h100", "aot-gpu"), ("t4", "no Pallas compiler")):
        with pytest.raises(RequestError, match=says):
            compiled.compiled(plan.make("smollm2-135m", published.shape("smollm2-135m"), chip))


def test_what_does_not_fit_is_told_what_would():
    found = plan.make("llama-3-8b", published.config("llama-3-8b"), "v5e", batch=8)
    assert not found.fits
    first = plan.advice(found)[0]
    assert "does not fit" in first
    assert "--quantize int8" in first
    assert first.endswith("2 chips.")
    assert plan.make("llama-3-8b", found.setup.cfg, "v5e-2", batch=8).fits


def test_advice_follows_the_numbers():
    def said(**settings):
        return " ".join(plan.advice(plan.make("llama-3-8b", published.config("llama-3-8b"), "h100", **settings)))

    assert "A larger batch" in said(batch=1)
    assert "A larger batch" not in said(batch=200, quantize="int8", kv_dtype="int8")
    assert "--quantize" not in said(quantize="int8")
    assert "the other rows wait" in said(batch=8, prompt=8192, context=8192)
    assert "it never pays" in said(batch=4096, context=16, prompt=16)
    assert "The TPOT objective of 1.0 ms is below the floor" in said(slo_tpot=1e-3)


def test_the_table_is_on_one_screen():
    done = run("gemma-3-270m", "--chip", "v6e", "--batch", "8", "--slo-tpot", "5")
    assert done.exit_code == 0, done.output
    for words in ("prefill (TTFT)", "decode (TPOT)", "critical batch", "largest batch within", "left"):
        assert words in " ".join(done.stdout.split())
    assert len(done.stdout.splitlines()) < 40
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_types_have_the_names_of_the_other_commands():
    def stored(chip, **types):
        setup = plan.make("smollm2-135m", published.shape("smollm2-135m"), chip, **types).setup
        return setup.dtype, setup.kv_dtype

    assert stored("v5e") == stored("v5e", dtype="bf16", kv_dtype="auto") == ("bfloat16", None)
    assert stored("t4") == ("float32", None)  # it has no bf16
    assert stored("v5e", dtype="f32", kv_dtype="int8") == stored("v5e", dtype="float32", kv_dtype="int8")
    assert stored("v5e", kv_dtype="bf16") == ("bfloat16", "bfloat16")


def test_lengths_that_are_not_said_follow_from_the_others():
    def lengths(**given):
        found = plan.make("smollm2-135m", published.shape("smollm2-135m"), "v5e", **given)
        return found.prompt, found.context, found.output_tokens

    assert lengths() == (1024, 2048, 256)
    assert lengths(prompt=4096) == (4096, 4352, 256)
    assert lengths(prompt=8192) == (8192, 8192, 1)
    assert lengths(prompt=100, context=128) == (100, 128, 28)


def test_bad_requests_are_refused(tmp_path):
    cfg = published.config("smollm2-135m")
    for settings, says in (
        ({"on": "v9"}, "it has v4, v5e"),
        ({"on": "v5e", "batch": 0}, "must be at least 1"),
        ({"on": "v5e", "context": 10**6}, "has a context of 8192"),
        ({"on": "v5e", "prompt": 8000, "output_tokens": 256}, "8192 tokens, not of 8256"),
        ({"on": "v5e", "prompt": 3000, "context": 2048}, "a row of 2048 tokens cannot hold 3000"),
        ({"on": "v5e", "context": 2048, "output_tokens": 2000}, "cannot hold 3024"),
        ({"on": "v5e", "output_tokens": 0}, "must be at least 1"),
        ({"on": "v5e", "slo_tpot": float("nan")}, "objective for TPOT is nan ms"),
        ({"on": "v5e", "slo_ttft": -1.0}, "objective for TTFT is -1000 ms"),
        ({"on": "v5e", "slo_ttft": float("inf")}, "must be above 0"),
        ({"on": "v5e", "dtype": "int8"}, "dtype 'int8' is not one of auto, f32, bf16"),
        ({"on": "v5e", "kv_dtype": "int4"}, "kv_dtype 'int4' is not one of auto, f32, bf16, int8"),
        ({"on": "v5e", "quantize": "int4:g128"}, "do not divide rows of 576"),
        ({"on": "v5e", "quantize": "stored"}, "is what a file holds"),
        ({"on": "v5e", "quantize": "int8,nothing=none"}, "names no layer"),
    ):
        with pytest.raises(RequestError, match=says):
            plan.make("smollm2-135m", cfg, **settings)
    with pytest.raises(ModelNotFoundError, match="did you mean llama-3-8b"):
        published.config("llama-3-9b")
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("d_model = 3\nwindow = 3\n")
    with pytest.raises(ModelFileError, match="not the shape of a model"):
        published.config(wrong)
