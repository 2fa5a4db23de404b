"""What a model argument names, what is listed, and the hub through a server of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pdx.errors import ModelNotFoundError
from pdx.weights import resolve as module
from pdx.weights.builtin import BUILTIN
from pdx.weights.listing import list_models
from pdx.weights.resolve import resolve
from tests.support import tiny_model, weight_files


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty PDX_HOME, an empty current folder, no hub cache."""
    monkeypatch.setenv("PDX_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(module, "ensure", lambda model, report: Path("fetched") / model.file)
    return tmp_path / "home"


def test_built_in_names(home):
    got = resolve("smollm2-135m-instruct")
    assert (got.name, got.kind, got.notes) == ("smollm2-135m-instruct", "gguf", ())
    assert "https://ai.google.dev/gemma/terms" in resolve("gemma-3-270m").notes[0]


def test_files_and_directories(home):
    directory = tiny_model.make(Path("tiny"))
    assert (resolve("tiny").kind, resolve("tiny").name) == ("hf", "tiny")
    path = weight_files.write_gguf(Path("model.gguf"), weight_files.tensors(directory))
    assert (resolve("model.gguf").kind, resolve(path).name) == ("gguf", "model")
    Path("folder").mkdir()
    shutil.copy(path, "folder")
    assert resolve("folder").path == Path("folder/model.gguf")
    shutil.copy(path, "folder/second.gguf")
    with pytest.raises(ModelNotFoundError, match=r"2 GGUF files; name one of them: model\.gguf, second\.gguf"):
        resolve("folder")


def test_names_under_the_models_folder(home):
    tiny_model.make(home / "models" / "mine")
    assert resolve("mine").path == home / "models" / "mine"
    tiny_model.make(Path("mine"))
    with pytest.raises(ModelNotFoundError, match=r"'mine' is in .* and also a path here: write \./mine"):
        resolve("mine")
    assert resolve("./mine").path == Path("mine")


def test_a_path_with_a_built_in_name_is_ambiguous(home):
    tiny_model.make(Path("gemma-3-270m"))
    with pytest.raises(ModelNotFoundError, match=r"write \./gemma-3-270m"):
        resolve("gemma-3-270m")
    assert resolve("./gemma-3-270m").kind == "hf"
    assert resolve(Path("gemma-3-270m")).kind == "hf"


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_current_folder(home, name):
    tiny_model.make(Path("."))
    with pytest.raises(ModelNotFoundError, match="the name is empty"):
        resolve(name)
    assert resolve(".").kind == "hf"


def test_what_is_not_found_lists_what_is_known_and_near(home):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("smollm2-135m")
    said = str(caught.value)
    assert "Did you mean smollm2-135m-instruct?" in said
    assert all(name in said for name in BUILTIN)
    Path("models").mkdir()
    Path("models/small.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"Did you mean models/small\.gguf\?"):
        resolve("models/smal.gguf")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", "a directory, but not of a model: expected config.json with safetensors.*none of these"),
        ("weights.bin", "pickled and other framework files are not read"),
        ("weights.safetensors", "name the directory, its config.json and tokenizer are needed too"),
        ("notes.txt", r"does not end in \.gguf"),
    ],
)
def test_paths_that_are_no_models_say_what_is_expected(home, name, said):
    if "." in name:
        Path(name).touch()
    else:
        Path(name).mkdir()
    with pytest.raises(ModelNotFoundError, match=said):
        resolve(name)


def test_listing(home, tmp_path):
    rows = {r["name"]: r for r in list_models()}
    assert next(iter(rows)) == "smollm2-135m-instruct"
    assert not rows["gemma-3-270m"]["cached"]
    assert "https://ai.google.dev/gemma/terms" in rows["gemma-3-270m"]["license"]
    assert rows["smollm2-135m-instruct"]["size_mb"] == 93

    tiny_model.make(home / "models" / "mine")
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "abc"
    tiny_model.make(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    other = tmp_path / "hub" / "models--someone--mamba" / "snapshots" / "abc"
    tiny_model.make(other)
    weight_files.reconfigure(other, architectures=["MambaForCausalLM"])
    rows = {r["name"]: r for r in list_models()}
    assert (rows["mine"]["kind"], rows["mine"]["cached"]) == ("hf directory", True)
    assert (rows["someone/tiny"]["kind"], rows["someone/tiny"]["license"]) == ("hub cache", "mit")
    assert "someone/mamba" not in rows
    json.dumps(list(rows.values()))


def test_listing_and_resolving_import_no_jax():
    code = (
        "import sys, pdx.weights.listing, pdx.weights.resolve; pdx.weights.listing.list_models(); "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a snapshot download asks for. It answers only who brings the token."""

    root: Path
    asked: list[str]
    COMMIT = "a" * 40

    def log_message(self, *_):
        pass

    def _answer(self, code: int, body: bytes = b"", **headers: str):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer secret":
            return self._answer(401, b"{}", X_Error_Code="RepoNotFound")
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/tiny/"):
            files = [
                {"type": "file", "path": p.name, "rfilename": p.name, "size": p.stat().st_size, "oid": "b" * 40}
                for p in self.root.iterdir()
            ]
            if "/tree/" in path:
                return self._answer(200, json.dumps(files).encode())
            body = {"id": "someone/tiny", "sha": self.COMMIT, "siblings": files}
            return self._answer(200, json.dumps(body).encode())
        name = self.root / path.rpartition("/")[2]
        if path.startswith("/someone/tiny/resolve/") and name.is_file():
            body = name.read_bytes()
            return self._answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=self.COMMIT)
        return self._answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


def run(argument: str, environment: dict) -> subprocess.CompletedProcess:
    code = (
        "import sys; from pdx.weights.resolve import resolve; from pdx.errors import PdxError\n"
        "try:\n    print(resolve(sys.argv[1]).path)\nexcept PdxError as e:\n    sys.exit(f'{type(e).__name__}: {e}')"
    )
    return subprocess.run(
        [sys.executable, "-c", code, argument],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_hub_ids(tmp_path):
    """Through the real client: endpoint, token, which files, cache, offline mode."""
    Hub.root, Hub.asked = tiny_model.make(tmp_path / "served"), []
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (Hub.root / unwanted).write_bytes(b"not to be fetched")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "secret",
        "PDX_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    try:
        got = run("someone/tiny", environment)
        assert got.returncode == 0, got.stderr
        path = Path(got.stdout.strip())
        assert sorted(p.name for p in path.iterdir()) == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert not any("pytorch_model" in x or "consolidated" in x for x in Hub.asked)

        refused = run("someone/tiny", environment | {"HF_TOKEN": "wrong", "HF_HOME": str(tmp_path / "other")})
        assert "ModelNotFoundError: no model 'someone/tiny': the hub has no such repository" in refused.stderr
        assert "HF_TOKEN" in refused.stderr
        assert "Known by name: smollm2-135m-instruct" in run("someone/else", environment).stderr
    finally:
        server.shutdown()
        server.server_close()

    count = len(Hub.asked)
    offline = run("someone/tiny", environment | {"HF_HUB_OFFLINE": "1"})
    assert offline.stdout == got.stdout
    assert len(Hub.asked) == count
    missing = run("someone/other", environment | {"HF_HUB_OFFLINE": "1"})
    assert "DownloadError" in missing.stderr
    assert "HF_HUB_OFFLINE is set" in missing.stderr
