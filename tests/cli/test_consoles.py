"""Consoles and encodings: what is printed, what is read, and what a chat does with a message that is refused."""

import io
import json
import os
import subprocess
import sys
import types
from functools import cache

import pytest

import pdx
from pdx.cli import app, generate, streams
from pdx.cli.app import main
from pdx.clients.chat import Chat, check_template, converse, input_lines
from pdx.errors import EngineError, RequestError
from pdx.io import inputs
from pdx.sampling.options import SamplingOptions
from tests.support import tiny_model

HARD = "é — 你好 🎉 \ud83d"  # one of cp1252, one not, two outside, one outside the basic plane, half a pair


def console(monkeypatch, encoding, errors="strict"):
    """Standard output of that encoding; its bytes."""
    text = io.TextIOWrapper(io.BytesIO(), encoding, errors, write_through=True)
    monkeypatch.setattr(sys, "stdout", text)
    streams.prepare()
    return text.buffer


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp932", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_json_is_valid_and_exact_on_every_console(monkeypatch, encoding, errors):
    out = console(monkeypatch, encoding, errors=errors)
    for ascii_only in (False, True):
        print(json.dumps({"text": HARD}, ensure_ascii=ascii_only))
    first, second = out.getvalue().decode(encoding).splitlines()
    assert json.loads(first)["text"] == json.loads(second)["text"] == HARD


def test_text_keeps_what_the_console_has_and_escapes_the_rest(monkeypatch):
    out = console(monkeypatch, "cp1252")
    print(HARD)
    assert out.getvalue().decode("cp1252") == "é — \\u4f60\\u597d \\ud83c\\udf89 \\ud83d\n"


def test_a_handler_that_the_user_chose_is_kept(monkeypatch):
    out = console(monkeypatch, "ascii", errors="replace")
    print("é")
    assert out.getvalue() == b"?\n"


def test_an_error_that_quotes_the_prompt_is_printed(monkeypatch):
    error = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stderr", error)
    console(monkeypatch, "ascii")
    print(f"error: {HARD}", file=sys.stderr)
    assert error.buffer.getvalue().startswith(b"error: \\xe9")


def test_help_texts_and_tables_fit_an_ascii_console():
    for arguments in (["--help"], ["models"], ["generate", "--nosuch"]):
        done = subprocess.run(
            [sys.executable, "-m", "pdx", *arguments],
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
        )
        said = done.stdout.decode("ascii") + done.stderr.decode("ascii")
        assert "pdx" in said or "smollm2" in said
        assert "Traceback" not in said


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("consoles") / "tiny")


def printed(monkeypatch, encoding, *arguments):
    with monkeypatch.context() as patch:
        out = console(patch, encoding)
        patch.setattr(sys, "argv", ["pdx", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return out.getvalue().decode(encoding)


def test_a_console_that_cannot_show_the_answer_loses_nothing(monkeypatch, directory):
    monkeypatch.setattr(generate, "load_model", cache(generate.load_model))  # one model and its programs for all
    asked = ("generate", "Grüße", "-m", directory, "--max-tokens", 24, "--ignore-eos")
    exact = json.loads(printed(monkeypatch, "utf-8", *asked, "--json"))
    assert not exact["text"].isascii()
    for encoding in ("ascii", "cp1252"):
        found = json.loads(printed(monkeypatch, encoding, *asked, "--json"))
        assert (found["text"], found["token_ids"]) == (exact["text"], exact["token_ids"])
        assert "\\ufffd" in printed(monkeypatch, encoding, *asked)


# What is read.


def piped(monkeypatch, data, encoding="utf-8"):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"hello\n", "hello"),
        (b"hello\r\n", "hello"),
        (b"hello\n\n", "hello\n"),
        (b"hello", "hello"),
        (b"a\r\nb\r\n", "a\r\nb"),
        (b"hello\r", "hello\r"),
        (b"\n", ""),
        (b"", ""),
        (b" \t\n", " \t"),
        (b"\xef\xbb\xbfhello\n", "hello"),
        ("Σήμερον\n".encode(), "Σήμερον"),
    ],
)
def test_one_newline_at_the_end_of_a_piped_prompt_is_taken_off(monkeypatch, data, text):
    piped(monkeypatch, data)
    assert streams.read_prompt() == text


def test_a_piped_prompt_is_read_in_the_encoding_of_the_console(monkeypatch):
    # Elsewhere text that is not ASCII was garbled when it came through a pipe (ggml-org/llama.cpp #6294).
    for encoding, of_console in (("utf-8", "ascii"), ("utf-8", "utf-8"), ("cp1252", "cp1252"), ("cp932", "cp932")):
        text = "日本" if encoding == "cp932" else "Grüße"
        piped(monkeypatch, f"{text}\r\n".encode(encoding), of_console)
        assert streams.read_prompt() == text


NO_TEXT = {
    b"a\xffb": "not readable as UTF-8 text",
    b"a\0b": "NUL bytes",
    "hi".encode("utf-16"): "it is UTF-16",
    b"\x80abc": "not readable as UTF-8 text",
    b"\xed\xa0\x80": "not readable as UTF-8",
}


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(RequestError, match=r"none cannot be read: No such file or directory$"):
        inputs.read(tmp_path / "none")
    with pytest.raises(RequestError, match=r"cannot be read: Is a directory$"):
        inputs.lines(tmp_path)


@pytest.mark.parametrize("data", NO_TEXT)
def test_what_is_no_text_is_refused_in_a_sentence(monkeypatch, tmp_path, data):
    piped(monkeypatch, data)
    with pytest.raises(RequestError, match=f"standard input: .*{NO_TEXT[data]}"):
        streams.read_prompt()
    (tmp_path / "file").write_bytes(data)
    for read in (inputs.read, inputs.lines):
        with pytest.raises(RequestError, match=NO_TEXT[data]):
            read(tmp_path / "file")


def test_a_text_file_may_begin_with_a_mark(tmp_path):
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfone\ntwo")
    assert inputs.lines(tmp_path / "file") == ["one", "two"]


def test_a_line_that_is_no_text_is_passed_over_in_a_chat(monkeypatch, capsys):
    piped(monkeypatch, b"\xef\xbb\xbfone\r\nt\xffwo\nthree\0\n" + "vier é".encode())
    assert [x.strip() for x in input_lines()] == ["one", "vier é"]
    said = capsys.readouterr().err
    assert "error: line 2 of standard input" in said
    assert "error: line 3 of standard input" in said


# Templates that refuse.


class Tokenizer:
    """One whose template takes no system message, and no message that says no."""

    def encode_chat(self, messages):
        if messages[0]["role"] == "system":
            raise RequestError("the chat template of x refuses these messages: System role not supported.")
        if any(m["content"] == "no" for m in messages):
            raise RequestError("the chat template of x refuses these messages: no means no")
        return [1]


class Engine:
    def __init__(self):
        self.model = types.SimpleNamespace(tokenizer=Tokenizer())
        self.config = types.SimpleNamespace(max_context=100)
        self.is_closed = False

    def submit(self, ids, options):
        if self.is_closed:
            raise EngineError("the engine is closed")
        timing = types.SimpleNamespace(hit_tokens=0, ttft_s=0.1, tpot_s=None)
        done = types.SimpleNamespace(
            speculation=None, text="answer", timing=timing, prompt_tokens=1, completion_tokens=1, finish_reason="stop"
        )

        class Stream(list):
            def result(self):
                return done

        return Stream([types.SimpleNamespace(text="answer")])


def test_what_a_template_refuses_ends_the_turn_and_not_the_chat():
    out, err = io.StringIO(), io.StringIO()
    talk = Chat(Engine(), SamplingOptions())
    converse(talk, ["no", "yes", "no", "/reset", "once more"], out, err)
    assert out.getvalue() == "answer\nanswer\n"
    assert err.getvalue().count("error: the chat template of x refuses these messages: no means no") == 2
    assert "/reset" in err.getvalue()
    assert [m["content"] for m in talk.messages] == ["once more", "answer"]


def test_an_engine_that_is_gone_ends_the_chat():
    engine = Engine()
    engine.is_closed = True
    with pytest.raises(EngineError):
        converse(Chat(engine, SamplingOptions()), ["hi", "again"], io.StringIO(), io.StringIO())


def test_a_system_message_is_tried_before_anything_is_compiled(directory, monkeypatch):
    check_template(Tokenizer(), None)
    with pytest.raises(RequestError, match=r"takes no --system message: .*System role not supported"):
        check_template(Tokenizer(), "be brief")
    from typer.testing import CliRunner

    def never(*args):
        raise AssertionError("an engine was made")

    monkeypatch.setattr(pdx, "Engine", never)
    monkeypatch.setattr("pdx.tokenizer.Tokenizer.encode_chat", lambda self, messages: Tokenizer().encode_chat(messages))
    result = CliRunner().invoke(app, ["chat", "-m", str(directory), "--system", "be brief"])
    assert "takes no --system message" in str(result.exception)
