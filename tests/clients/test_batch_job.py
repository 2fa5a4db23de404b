"""`pdx batch`: a file of requests through the engine, and what a killed run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from pdx.cli import app
from pdx.clients import batch_job
from pdx.errors import RequestError
from pdx.generation.prompts import encode
from pdx.sampling.options import SamplingOptions
from tests.support import tiny_model

ENGINE = ("--slots", "3", "--token-budget", "16", "--max-tokens", "6")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny_model.make(tmp_path_factory.mktemp("batch") / "tiny"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments):
    return CliRunner().invoke(app, ["batch", *(str(a) for a in arguments)])


def rows(count):
    return [
        {"prompt": f"Row {i} says " + "la " * (i % 5), "id": i, "ignore_eos": True, "max_tokens": 1 + i % 6}
        for i in range(count)
    ]


def test_answers_are_those_of_generate_in_the_order_of_the_input(directory, tmp_path):
    source, target = write(tmp_path / "in.jsonl", rows(12)), tmp_path / "out.jsonl"
    done = run(source, target, "-m", directory, *ENGINE)
    assert done.exit_code == 0, done.output
    other = tmp_path / "other.jsonl"
    CliRunner().invoke(app, ["generate", "-m", directory, "--prompts", str(source), "--output", str(other)])
    for a, b, row in zip(read(target), read(other), rows(12), strict=True):
        assert {k: a[k] for k in row} == row
        assert a["token_ids"] == b["token_ids"]
        assert a["completion_tokens"] == row["max_tokens"]
        assert a["kernels"]["mixed"].startswith("paged_attention: xla")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "other.jsonl", "out.jsonl"]


def test_openai_rows_are_answered_as_openai_answers_them(directory, tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        [
            {
                "custom_id": "a",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": "m",
                    "messages": [{"role": "user", "content": "Hi"}],
                    "max_completion_tokens": 4,
                    "logprobs": True,
                    "top_logprobs": 0,
                },
            },
            {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "Hello", "max_tokens": 3, "seed": 1}},
        ],
    )
    target = tmp_path / "out.jsonl"
    done = run(source, target, "-m", directory, *ENGINE)
    assert done.exit_code == 0, done.output
    chat, text = read(target)
    assert (chat["custom_id"], chat["error"], chat["response"]["status_code"]) == ("a", None, 200)
    body = chat["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["usage"]["completion_tokens"] <= 4
    assert len(body["pdx"]["logprobs"]) == body["usage"]["completion_tokens"]
    assert text["response"]["body"]["object"] == "text_completion"


def test_a_row_that_cannot_be_served_fails_alone(directory, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "short"}, {"prompt": "x" * 600}, {"prompt": "also short"}])
    target = tmp_path / "out.jsonl"
    done = run(source, target, "-m", directory, *ENGINE)
    assert done.exit_code != 0
    assert "1 of 3 requests failed" in str(done.exception)
    fine, failed, last = read(target)
    assert failed["error"]["code"] == "ContextLengthError"
    assert "600" in failed["error"]["message"]
    assert fine["token_ids"]
    assert last["token_ids"]


def test_whatever_a_row_fails_of_the_others_go_on(directory, tmp_path, monkeypatch):
    def failing(model, prompt):
        if prompt == "break":
            raise ValueError("broken")
        return encode(model, prompt)

    monkeypatch.setattr("pdx.engine.engine.encode", failing)
    asked = [{"prompt": p} for p in ("one", "break", "two", "x", "three")]
    asked[3]["logit_bias"] = {"99999": 1}
    source = write(tmp_path / "in.jsonl", asked)
    target = tmp_path / "out.jsonl"
    done = run(source, target, "-m", directory, *ENGINE)
    assert "2 of 5 requests failed" in str(done.exception)
    answers = read(target)
    assert answers[1]["error"] == {"code": "ValueError", "message": "broken"}
    assert answers[3]["error"]["code"] == "RequestError"
    assert "logit_bias names token 99999" in answers[3]["error"]["message"]
    assert all(answers[i]["token_ids"] for i in (0, 2, 4))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"custom_id": "a", "body": {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}}, "tools"),
        ({"custom_id": "a", "body": {"prompt": "x", "n": 2}, "url": "/v1/completions"}, "n is not supported"),
        ({"custom_id": "a", "body": {}, "url": "/v1/embeddings"}, "/v1/completions"),
        ({"body": {"prompt": "x"}}, "custom_id"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"text": "x"}, "prompt"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"custom_id": "a", "body": {"messages": [{"role": 1, "content": "x"}]}}, r"messages\[0\] needs a role"),
    ],
)
def test_a_bad_row_is_known_before_anything_runs_and_fails_alone(tmp_path, row, message):
    source = write(tmp_path / "in.jsonl", [{"prompt": "fine"}, row])
    fine, bad = batch_job.read(source, SamplingOptions())
    assert fine.error is None
    assert bad.line == 2
    with pytest.raises(RequestError, match=message):
        raise bad.error


def test_one_custom_id_twice_is_refused(tmp_path):
    row = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "x"}]}}
    with pytest.raises(RequestError, match="line 2: custom_id 'a'"):
        batch_job.read(write(tmp_path / "in.jsonl", [row, row]), SamplingOptions())


def test_a_journal_is_taken_up_and_one_of_another_job_is_not(tmp_path):
    output = tmp_path / "out.jsonl"
    journal = batch_job.Journal(output, "job")
    journal.add(3, {"text": "é\n"})
    journal.add(1, {"text": "b"})
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'2 {"text": "cut sh')
    again = batch_job.Journal(output, "job")
    assert again.done == {3: '{"text": "é\\n"}', 1: '{"text": "b"}'}
    again.add(2, {"text": "whole"})
    again.finish([1, 2, 3])
    assert [row["text"] for row in read(output)] == ["b", "whole", "é\n"]
    assert not journal.path.exists()
    batch_job.Journal(output, "job").close()
    with pytest.raises(RequestError, match="another job"):
        batch_job.Journal(output, "other job")


@pytest.mark.slow
def test_killed_at_any_time_and_run_again_nothing_is_lost_or_doubled(directory, tmp_path):
    source, target = write(tmp_path / "in.jsonl", rows(60)), tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.journal"
    command = [sys.executable, "-m", "pdx", "batch", str(source), str(target), "-m", directory, *ENGINE]
    for least in (5, 25):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 1 + least):
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read().decode()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not target.exists()
    kept = journal.read_bytes().count(b"\n") - 1
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"resuming: {kept} of 60" in done.stderr
    answers = read(target)
    assert [a["id"] for a in answers] == list(range(60))
    assert all(a["completion_tokens"] == 1 + i % 6 for i, a in enumerate(answers))
    assert not journal.exists()
