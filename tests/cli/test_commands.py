"""How commands end: what is checked before work begins, one line for what goes wrong, and nothing left behind."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import typer
from typer.testing import CliRunner

import pdx
from pdx.cli import app, errors
from pdx.errors import ModelFileError, PdxError, RequestError
from pdx.io import outputs
from pdx.weights import checkpoint
from tests.support import tiny_model

COMMAND = [sys.executable, "-m", "pdx"]


def ended(monkeypatch, command, arguments=()):
    """The exit code of a command and what it says on standard error."""
    texts = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", threading.excepthook)
        patch.setattr(sys, "stdout", texts[0])
        patch.setattr(sys, "stderr", texts[1])
        return errors.run(command, list(arguments)), texts[1].buffer.getvalue().decode()


def failing(error):
    def command(_arguments):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RequestError("say this"), "error: say this"),
        (NotImplementedError("not here"), "error: not here"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "error: x.json: No such file or directory"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (MemoryError(), "error: there is not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of it"), "error: there is not enough memory"),
        (KeyError("k"), "error: unexpected error, which is a fault of pdx: KeyError: 'k'. --debug"),
        (ValueError("one\ntwo\n" * 500), "which is a fault of pdx: ValueError: one. --debug"),
        (RecursionError("deep"), "RecursionError: deep"),
        (UnicodeEncodeError("ascii", "é\ud800", 0, 1, "no"), "UnicodeEncodeError"),
        (ExceptionGroup("of two", [ValueError("x")]), "ExceptionGroup: of two"),
    ],
)
def test_an_error_is_one_line_and_debug_shows_where(monkeypatch, error, line):
    monkeypatch.delenv("PDX_DEBUG", raising=False)
    code, said = ended(monkeypatch, failing(error))
    assert code == 1
    assert line in said
    assert said.count("\n") == 1
    for arguments, variable in ((["x", "--debug"], ""), ([], "1")):
        monkeypatch.setenv("PDX_DEBUG", variable)
        code, said = ended(monkeypatch, failing(error), arguments)
        assert code == 1
        assert "Traceback (most recent call last)" in said
        assert line in said


def test_debug_is_taken_from_anywhere_but_behind_two_dashes(monkeypatch):
    seen = []
    ended(monkeypatch, seen.append, ["--debug", "generate", "--debug", "--", "--debug"])
    assert seen == [["generate", "--", "--debug"]]


def test_codes_of_ends_that_are_no_errors(monkeypatch):
    left = []
    monkeypatch.setattr(errors, "leave", lambda number: left.append(number) or errors.ENDS[number][0])
    for error, code in (
        (typer.Exit(3), 3),
        (SystemExit(4), 4),
        (SystemExit("text"), 1),
        (SystemExit(), 0),
        (KeyboardInterrupt(), 130),
        (errors.Terminated(), 143),
    ):
        assert ended(monkeypatch, failing(error)) == (code, "")
    # A pipe that is not standard output: what was to be written there is lost.
    assert ended(monkeypatch, failing(BrokenPipeError(32, "Broken pipe"))) == (1, "error: Broken pipe\n")
    assert left == [signal.SIGINT, signal.SIGTERM]


def shell(line, **environment):
    """A line of shell in which $PDX is the command; its exit code, output and errors."""
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PDX": " ".join(COMMAND)} | environment,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        ("$PDX models > /dev/full", 1, "", "error: No space left on device\n"),
        ("$PDX models >&-", 1, "", "error: Bad file descriptor\n"),
        ("$PDX models --json 2>&- | tail -c 2", 0, "\n", ""),
        ("$PDX generate - -m x <&-", 1, "", "error: standard input cannot be read: Bad file descriptor\n"),
        ("$PDX generate '' 2>/dev/full", 1, "", ""),
        ("$PDX --help | head -c 1; exit ${PIPESTATUS[0]}", 0, None, ""),
        ("$PDX models | true; exit ${PIPESTATUS[0]}", 0, "", ""),
        ("$PDX generate $'\\xff' -m x", 1, "", "error: the prompt holds bytes that are not utf-8 text\n"),
    ],
)
def test_streams_that_are_closed_full_or_broken(line, code, out, err):
    found = shell(line, PYTHONIOENCODING="", PYTHONUTF8="1")
    assert found[0] == code, found
    assert found[2] == err
    assert out is None or found[1].endswith(out)


def test_a_platform_that_is_not_here_is_named(tmp_path):
    tiny = tiny_model.make(tmp_path / "tiny")
    code, _, err = shell(f"$PDX generate hi -m {tiny}", JAX_PLATFORMS="nosuch")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: JAX_PLATFORMS=nosuch is not available")
    assert "Traceback" not in err


# A command that begins a folder and then: waits in Python; is in a call that does not come back to Python.
BUSY = """
import hashlib, sys, time
from pathlib import Path
from pdx.io import outputs
from pdx.cli import errors

def command(arguments):
    with outputs.unfinished(Path(arguments[0])) as part:
        part.mkdir()
        (part / "weights").write_bytes(bytes(1000))
        if arguments[1] == "python":
            time.sleep(60)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

sys.exit(errors.run(command, sys.argv[1:]))
"""


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # the child only starts the command
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("where", ["python", "a call"])
def test_a_signal_ends_it_at_any_moment_and_leaves_nothing(tmp_path, number, code, word, where):
    # pytest in the background of a shell ignores SIGINT, and a process that it starts would as well.
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, tmp_path / "out", where],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not (tmp_path / ".out.unfinished" / "weights").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, err) == (code, word + "\n")
    assert list(tmp_path.iterdir()) == []


# Checkpoints.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = pdx.load(str(tiny_model.make(tmp_path_factory.mktemp("commands") / "tiny")))
    assert loaded.tokenizer
    return loaded


def test_an_interrupted_checkpoint_leaves_nothing_and_a_killed_one_goes_at_the_next_start(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "CheckpointFile", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    for name in ("out", "another"):  # of runs that were killed
        (tmp_path / f".{name}.unfinished" / "params").mkdir(parents=True)
    held = tmp_path / ".held.unfinished"
    held.mkdir()
    (tmp_path / ".mine").mkdir()
    code = (
        "import sys; from pathlib import Path; from pdx.io.outputs import locked\nwith locked(Path(sys.argv[1]), ''):"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code}\n print(flush=True); input()", tmp_path / "held"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    try:
        with pytest.raises(RequestError, match="another process is writing"), checkpoint.reserved(tmp_path / "held"):
            pass
        with checkpoint.reserved(tmp_path / "out"):
            assert {p.name for p in tmp_path.iterdir()} >= {".held.unfinished", ".mine"}
            assert not list(tmp_path.glob(".*out.unfinished")) + list(tmp_path.glob(".another*"))
            checkpoint.save(model, tmp_path / "out")
    finally:
        other.communicate(b"\n")
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".held.unfinished", ".mine"}


def test_a_checkpoint_goes_where_links_lead_and_nowhere_else(model, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "private").mkdir(0o700)
    checkpoint.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "pdx.json").is_file()
    checkpoint.save(model, tmp_path / "private")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name in ("real", "file", "pipe", "file/x"):
        with pytest.raises((ModelFileError, RequestError)):
            checkpoint.check_target(tmp_path / name)
    with pytest.raises(ModelFileError, match="exists and is not a directory"):
        checkpoint.check_target("/dev/null")


# What is asked before work begins: each of these would otherwise say that there is no such model, or measure first.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare", "--csv", "none/x.csv"], "make it first"),
        (["compare", "--csv", "."], "is a directory"),
        (["compare", "--plot", "x.xyz"], "must end in one of"),
        (["report", "--out", "r", "--row", "nosuch", "-m", "no-model"], "no row 'nosuch'"),
        (["report", "--out", "file/r", "-m", "no-model"], "cannot be a folder"),
        (["report", "--out", "r", "--chip", "nosuch", "-m", "no-model"], "nosuch"),
        (["report", "--out", "r", "--chip", "v5e", "-m", "no-model"], "was not measured"),
        (["calibrate", "--name", "../x"], "a chip's name"),
        (["calibrate", "--out", "file/x"], "file"),
        (["tune", "decode_attention", "--target", "v5e", "--write", "--folder", "file"], "cannot be a folder"),
        (["bench", "load", "-m", "no-model", "--rate", "1", "--plot", "none/x.png"], "no such folder"),
        (["bench", "load", "-m", "no-model", "--rate", "1", "--kernels", "nosuch"], "kernels"),
        (["bench", "engine", "-m", "no-model", "--only", "nosuch"], "no figure"),
        (["bench", "model", "-m", "no-model", "--quantize", "int3"], "int3"),
        (["bench", "memory", "-m", "no-model", "--quantize", "int3"], "int3"),
        (["eval", "ppl", "no-model", "--kv-dtype", "nosuch"], "kv_dtype"),
        (["convert", "no-model", "file"], "name a new directory"),
        (["convert", "no-model", "/proc/nosuch/x"], "cannot be written"),
        (["quantize", "no-model", "q", "--quantize", "int3"], "int3"),
        (["quantize", "no-model", "q", "--calibration", "nosuch.txt"], "nosuch.txt"),
        (["generate", "x", "-m", "no-model", "--kernels", "nosuch"], "kernels"),
        (["generate", "--prompts", "in.jsonl", "--output", "none/o", "-m", "no-model"], "make it first"),
        (["generate", "--prompts", "in.jsonl", "--output", "in.jsonl", "-m", "no-model"], "file of requests"),
        (["batch", "in.jsonl", "file/o", "-m", "no-model"], "cannot be written"),
        (["batch", "in.jsonl", "o", "-m", "no-model", "--kv-dtype", "nosuch"], "kv_dtype"),
        (["chat", "-m", "no-model", "--kernels", "nosuch"], "kernels"),
    ],
)
def test_destinations_and_names_are_asked_before_work_begins(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDX_HOME", str(tmp_path / "home"))
    (tmp_path / "file").touch()
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, PdxError), result.output
    assert says in str(result.exception)
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "in.jsonl", "home"}


def test_what_was_measured_is_printed_where_it_cannot_be_written(tmp_path, monkeypatch):
    from pdx.bench import compare

    class Found:
        def to_dict(self):
            return {"rows": [1]}

        def write_csv(self, file):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare, "compare", lambda *args, **settings: Found())
    result = CliRunner().invoke(app, ["compare", "--csv", str(tmp_path / "x.csv"), "--json"])
    assert result.stdout.strip() == '{"rows": [1]}'
    assert isinstance(result.exception, OSError)


def test_a_folder_that_can_be_made_can_be_written(tmp_path):
    outputs.check_folder(tmp_path / "a" / "b")
    outputs.check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
