"""`--speculate`, `--draft-length` and `--compare` on the command line."""

import json

import pytest
from typer.testing import CliRunner

from pdx.cli import app
from pdx.errors import RequestError
from tests.support import tiny_model

REPEATS = "ab cd ab cd ab cd ab"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny_model.make(tmp_path_factory.mktemp("cli") / "tiny"))


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


@pytest.mark.slow
def test_compare_answers_twice_and_says_both_speeds(directory):
    asked = (
        "generate",
        REPEATS,
        "-m",
        directory,
        "--speculate",
        "ngram",
        "--compare",
        "--max-tokens",
        20,
        "--ignore-eos",
    )
    result = run(*asked)
    assert result.exit_code == 0, result.output
    assert "tokens a round" in result.stderr
    assert "without drafts: TPOT" in result.stderr
    assert "the same tokens" in result.stderr
    out = json.loads(run(*asked, "--json").stdout)
    assert out["plain"]["token_ids"] == out["token_ids"]
    assert "speculation" not in out["plain"]


def test_compare_without_drafts_has_no_effect_and_says_so(directory):
    for more in ((), ("--speculate", "none")):
        result = run("generate", "x", "-m", directory, "--compare", *more)
        assert isinstance(result.exception, RequestError)
        assert "--compare" in str(result.exception)


@pytest.mark.slow
def test_chat_and_batch_draft_and_answer_alike(directory, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": p, "ignore_eos": True}) + "\n" for p in (REPEATS, "x", "Hello")))
    answers = []
    for number, more in enumerate(((), ("--speculate", "ngram", "--draft-length", "3"))):
        target = tmp_path / f"{number}.jsonl"
        result = run("batch", source, target, "-m", directory, "--slots", 2, "--max-tokens", 24, *more)
        assert result.exit_code == 0, result.output
        answers.append([json.loads(line) for line in target.read_text().splitlines()])
    assert [row["text"] for row in answers[0]] == [row["text"] for row in answers[1]]
    assert answers[1][0]["speculation"]["drafted"] > 0
    assert "speculation" not in answers[0][0]
    talk = run(
        "chat", "-m", directory, "--speculate", "ngram", "--max-tokens", 12, "--temperature", 0, stdin="ab ab ab\n"
    )
    assert talk.exit_code == 0, talk.output
    assert "; drafts: " in talk.stderr


@pytest.mark.parametrize("command", ["chat", "batch", "bench load"])
def test_what_makes_no_sense_is_said_before_a_model_is_loaded(command, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    needed = {"batch": (source, tmp_path / "out.jsonl"), "bench load": ("--rate", "1")}.get(command, ())
    for more, says in (
        (("--speculate", "ngrams"), "ngrams"),
        (("--speculate", "ngram", "--draft-length", "99"), "draft_length"),
        (("--draft-length", "3"), "draft_length"),
    ):
        result = run(*command.split(), *needed, "-m", "no-such-model", *more)
        assert isinstance(result.exception, RequestError)
        assert says in str(result.exception)


@pytest.mark.parametrize("command", ["chat", "bench load"])
def test_engines_refuse_token_trees_before_a_model_is_loaded(command):
    needed = ("--rate", "1") if command == "bench load" else ()
    result = run(*command.split(), *needed, "-m", "no-such-model", "--speculate", "draft", "--draft-length", "3x2x1")
    assert isinstance(result.exception, NotImplementedError)
    assert "take no token tree" in str(result.exception)


@pytest.mark.slow
def test_generate_verifies_a_token_tree(directory):
    asked = ("generate", REPEATS, "-m", directory, "--max-tokens", 12, "--ignore-eos", "--json")
    plain, drafted = (
        json.loads(run(*asked, *more).stdout) for more in ((), ("--speculate", "self:1", "--draft-length", "3x2"))
    )
    assert drafted["token_ids"] == plain["token_ids"]
    counts = drafted["speculation"]
    assert counts["rounds_by_draft_length"]["2"] > 0
    assert counts["drafted"] > 3 * counts["kept"]
