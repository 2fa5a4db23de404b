"""The command, as a user meets it: one process where that is the point, in-process otherwise."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pdx.cli import app
from pdx.errors import PdxError
from tests.support import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny_model.make(tmp_path_factory.mktemp("cli") / "tiny"))


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def test_help_and_import_are_light():
    code = (
        "import sys, pdx, pdx.cli; heavy = {'jax', 'flax', 'numpy', 'tokenizers', 'orbax'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-X", "importtime", "-m", "pdx", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "generate" in out.stdout
    imported = {line.rpartition("|")[2].strip() for line in out.stderr.splitlines()}
    assert "typer" in imported
    assert not {"jax", "flax", "numpy", "tokenizers", "orbax"} & imported


def test_json_has_every_field(directory):
    result = run("generate", "Hello", "-m", directory, "--max-tokens", 9, "--ignore-eos", "--json")
    assert result.exit_code == 0, result.output
    out = json.loads(result.stdout)
    fields = "text token_ids prompt_tokens completion_tokens finish_reason ttft_s tpot_s e2e_s compile_s device kernels"
    assert set(fields.split()) == set(out)
    assert (out["prompt_tokens"], out["completion_tokens"], out["finish_reason"]) == (5, 9, "length")
    assert out["e2e_s"] == pytest.approx(out["ttft_s"] + 8 * out["tpot_s"])
    assert "xla" in out["kernels"]["decode"]


def test_text_goes_to_standard_output_and_the_summary_to_standard_error(directory):
    result = run("generate", "-", "-m", directory, "--max-tokens", 5, "--ignore-eos", stdin="Hello")
    as_json = run("generate", "Hello", "-m", directory, "--max-tokens", 5, "--ignore-eos", "--json")
    assert result.stdout == json.loads(as_json.stdout)["text"] + "\n"
    for word in ("TTFT", "TPOT", "E2E", "compilation", "cpu", "xla", "5 prompt tokens"):
        assert word in result.stderr


def test_chat_and_system(directory):
    chat = json.loads(run("generate", "hi", "-m", directory, "--chat", "--max-tokens", 2, "--json").stdout)
    system = json.loads(run("generate", "hi", "-m", directory, "--system", "be", "--max-tokens", 2, "--json").stdout)
    assert 2 < chat["prompt_tokens"] < system["prompt_tokens"]


def test_a_file_of_requests(directory, tmp_path):
    rows = [
        {"prompt": "one", "max_tokens": 4, "id": "a"},
        {"messages": [{"role": "user", "content": "two"}], "max_tokens": 12},
        {"prompt": "three", "temperature": 1.0, "seed": 3, "max_tokens": 2, "ignore_eos": True, "mine": [1]},
        {"prompt": "four", "stop": ["zz"], "logprobs": 1},
        {"prompt": "five", "max_tokens": 7},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    arguments = ("generate", "-m", directory, "--prompts", source, "--output", target, "--batch-size", 2)
    result = run(*arguments, "--max-tokens", 6, "--ignore-eos")
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [a["completion_tokens"] for a in answers] == [4, 12, 2, 6, 7]
    for row, answer in zip(rows, answers, strict=True):
        kept = set(row) - {"logprobs"}  # asked for as a number, answered as a list
        assert {key: answer[key] for key in kept} == {key: row[key] for key in kept}
        assert {"text", "token_ids", "ttft_s", "e2e_s", "device"} <= set(answer)
    alone = json.loads(run("generate", "five", "-m", directory, "--max-tokens", 7, "--ignore-eos", "--json").stdout)
    assert answers[4]["token_ids"] == alone["token_ids"]
    again = run(*arguments)
    assert again.exit_code == 1
    assert "exists already" in str(again.exception)
    assert len(target.read_text(encoding="utf-8").splitlines()) == 5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "line 2 is not JSON"),
        ('{"text": "x"}', "line 2"),
        ('{"prompt": "x", "messages": []}', "line 2"),
        ('{"prompt": ""}', "line 2"),
        ('{"prompt": "x", "top_p": 7}', "top_p"),
        ('{"prompt": "x", "max_tokens": "many"}', "max_tokens"),
        ('{"prompt": "x", "logit_bias": {"a": 1}}', "line 2"),
        ('{"prompt": "x", "stop": 7}', "line 2"),
        ('{"prompt": "x", "temperature": 1' + 400 * "0" + "}", "line 2: temperature"),
        ('{"prompt": "x", "logit_bias": {"5": 1' + 400 * "0" + "}}", "line 2: logit_bias of token 5"),
        ('{"prompt": "x", "id": 1' + 5000 * "0" + "}", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"prompt": "x", "id": "\\ud800"}', "line 2 holds half a surrogate pair"),
        ('{"messages": ["hi"]}', "line 2: messages[0] must be an object"),
        ('{"messages": [{"role": "user", "content": "x"}, 5]}', "line 2: messages[1] must be an object"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages[0] has no content"),
        ('{"messages": [{"content": "x"}]}', "line 2: messages[0] needs a role"),
        ('{"messages": [{"role": "user", "content": 5}]}', "line 2: messages[0].content must be text"),
        # What only the model says:
        ('{"prompt": "x", "logit_bias": {"99999": 1}}', "line 2: logit_bias names token 99999"),
        (json.dumps({"prompt": "x" * 600}), "line 2: 600 tokens, but the context of"),
        ('{"prompt": "x", "max_tokens": 512}', "line 2: 1 tokens and 512 more asked for"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(directory, tmp_path, line, says):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    result = run("generate", "-m", directory, "--prompts", source, "--output", target, "--batch-size", 1)
    assert result.exit_code == 1
    assert isinstance(result.exception, PdxError)
    assert says in str(result.exception)
    assert str(source) in str(result.exception)
    assert not target.exists()


def test_only_a_line_feed_ends_a_line_and_a_mark_may_stand_before_the_first(directory, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["a\u2028b", "c\u2029d", "e\x85f", "plain"]
    rows = [json.dumps({"prompt": p, "max_tokens": 1}, ensure_ascii=False) for p in prompts]
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n\n")
    result = run("generate", "-m", directory, "--prompts", source, "--output", target)
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in target.read_bytes().decode().split("\n") if line]
    assert [a["prompt"] for a in answers] == prompts


@pytest.mark.thin(3)  # each starts a process
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "there is no prompt"),
        (["generate", "x", "--model", "no-such-model"], "no-such-model"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--prompts", "in.jsonl"], "go together"),
        (["generate", "x", "--prompts", "a", "--output", "b"], "not both"),
        (["generate", "x", "--model", ""], "the name is empty"),
    ],
)
def test_errors_end_the_process_with_one_line(arguments, says):
    done = subprocess.run([sys.executable, "-m", "pdx", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    *progress, error = done.stderr.splitlines()
    assert all(line.startswith("loading") for line in progress)
    assert error.startswith("error: ")
    assert says in error
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompts", "a", "--output", "b", "--chat"], 'rows with "messages" are chats'),
        (["--prompts", "a", "--output", "b", "--system", "x"], 'rows with "messages" are chats'),
        (["x", "--logprobs", "2"], "add --json"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, says):
    result = run("generate", *arguments)
    assert isinstance(result.exception, PdxError)
    assert says in str(result.exception)


def test_sizes_to_measure_are_at_least_one():
    for option in ("--batch", "--prompt-tokens"):
        result = run("bench", "model", "-m", "no-such-model", option, 0)
        assert result.exit_code == 2
        assert "Invalid value" in result.output


def test_convert_gives_the_same_tokens(directory, tmp_path):
    target = tmp_path / "converted"
    assert run("convert", directory, target).exit_code == 0
    outputs = [
        json.loads(run("generate", "Hello", "-m", m, "--max-tokens", 20, "--ignore-eos", "--json").stdout)
        for m in (directory, target)
    ]
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"]
    assert outputs[0]["text"] == outputs[1]["text"]


def test_models_lists_the_built_in_ones():
    rows = json.loads(run("models", "--json").stdout)["models"]
    assert {"smollm2-135m-instruct", "gemma-3-270m"} <= {row["name"] for row in rows}
    assert "Apache-2.0" in run("models").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mesh", "rows=2"], "data, model"),
        (["--mesh", "data=64"], "needs 64 devices"),
        (["--dtype", "f8"], "f32, bf16"),
        (["--kv-dtype", "int3"], "auto, f32, bf16"),
        (["--kernels", "cuda"], "auto, xla, pallas"),
    ],
)
def test_unknown_choices_are_errors_that_name_the_known_ones(directory, arguments, says):
    result = run("generate", "x", "-m", directory, *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, PdxError)
    assert says in str(result.exception)


def test_tune_needs_a_chip_or_a_target_and_an_op():
    for arguments, says in (
        (("decode_attention",), "--target"),
        (("nothing", "--target", "v5e"), "nothing"),
        (("decode_attention", "--target", "v99"), "v99"),
    ):
        result = run("tune", *arguments)
        assert isinstance(result.exception, PdxError)
        assert says in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--batch-size", "8"], "--batch-size would change nothing: it is for the requests"),
        (["generate", "x", "--top-p", "0.5"], "--top-p would change nothing: a temperature of 0"),
        (["generate", "x", "--seed", "0"], "--seed would change nothing"),
        (["generate", "--prompts", "a", "--output", "b", "--json"], "--json would change nothing"),
        (["quantize", "m", "d", "--quantize", "none"], "quantizes nothing: `pdx convert`"),
        (["quantize", "m", "d", "--method", "rtn", "--calibration", "t"], "--calibration would change nothing"),
        (["quantize", "m", "d", "--method", "rtn", "--sequences", "4"], "--sequences would change nothing"),
        (["tune", "decode_attention", "--folder", "f"], "--folder would change nothing"),
        (["compare", "decode_attention", "--model", "m"], "--model would change nothing"),
        (["compare", "--targets", "none", "--cycles"], "--cycles would change nothing"),
        (["compare", "decode_attention", "--all-layers"], "--all-layers would change nothing"),
        (["bench", "load", "--rate", "1", "--burstiness", "1"], "--burstiness would change nothing"),
        (["bench", "load", "--trace", "t", "--output-len", "5"], "--output-len would change nothing"),
    ],
)
def test_options_without_effect_are_refused(arguments, says):
    done = run(*arguments)
    assert done.exit_code == 1
    assert says in str(done.exception)


def test_versions_are_told_without_importing_jax():
    code = "import sys; from pdx.cli.app import versions; print(versions()); assert 'jax' not in sys.modules"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    said = run("--version").stdout.strip()
    assert said.startswith("pdx 0.")
    assert all(f"{name} " in said and name in told for name in ("pdx", "jax", "python"))


def test_saving_and_batches_say_what_they_did_as_json(directory, tmp_path):
    saved = json.loads(run("convert", directory, tmp_path / "saved", "--json").stdout)
    assert saved["size_bytes"] > 1000
    small = run("quantize", directory, tmp_path / "small", "--quantize", "int8", "--method", "rtn", "--json")
    assert json.loads(small.stdout)["directory"] == str(tmp_path / "small")
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "one", "max_tokens": 2, "ignore_eos": true}\n')
    done = run("batch", source, tmp_path / "out.jsonl", "-m", directory, "--slots", 1, "--token-budget", 16, "--json")
    assert json.loads(done.stdout) == {
        "output": str(tmp_path / "out.jsonl"),
        "rows": 1,
        "resumed_rows": 0,
        "failed_rows": 0,
        "completion_tokens": 2,
    }


def test_a_conversation_is_one_object(directory, tmp_path):
    engine = "--engine", tiny_model.engine_profile(tmp_path)
    done = run("chat", "-m", directory, *engine, "--max-tokens", 3, "--json", stdin="hi\n/unknown\nagain\n")
    said = json.loads(done.stdout)
    assert [m["role"] for m in said["messages"]] == ["user", "assistant"] * 2
    assert [turn["text"] for turn in said["turns"]] == [m["content"] for m in said["messages"][1::2]]
    assert all(turn["completion_tokens"] <= 3 for turn in said["turns"])
