"""The notebooks' installation cell: which runtime it sees, what it asks pip for, and where it stops.

The cell is run as it stands, `SOURCE` apart. pip is a stand-in that notes what it is asked for, and devices are played.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.installation.test_versions import install

ROOT = Path(__file__).parents[2]
CELL = ROOT / "notebooks" / "install.py"
WHEEL = "pdx_inference-0.1.0-py3-none-any.whl"
NAMED = ("COLAB", "TPU_", "JAX_PLATFORMS")  # variables that tell runtimes apart
# What stands before the cell: only the devices that a test names are there.
BEFORE = """
import glob, json, os, pathlib, shutil, sys
devices = {devices!r}
glob.glob = lambda pattern: [d for d in devices if pathlib.PurePath(d).match(pattern)]
shutil.which = lambda name: None
{before}
code = pathlib.Path({cell!r}).read_text(encoding="utf-8")
assert code.count('\\nSOURCE = ""  #') == 1
try:
    exec(compile(code.replace('\\nSOURCE = ""', '\\nSOURCE = ' + repr({source!r})), "cell", "exec"))
except SystemExit as stop:
    print("STOP", stop)
print("jax" if "jax" in sys.modules else "no jax")
"""
PIP = """
import json, pathlib, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
{does}
"""


def run(folder: Path, *, source="", devices=(), before="", pip="sys.exit('no such network')", bare=True, **env: str):
    """What the cell printed, and the arguments of each call of pip. `bare`: no package is installed but `folder`'s.

    `pip`: what it does beside noting its arguments; None: there is no pip.
    """
    log = folder / "pip.log"
    if pip is not None:
        (folder / "pip").mkdir(exist_ok=True)
        (folder / "pip" / "__init__.py").touch()
        (folder / "pip" / "__main__.py").write_text(PIP.format(log=str(log), does=pip))
    code = BEFORE.format(devices=list(devices), before=before, cell=str(CELL), source=source)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(NAMED)}
    (folder / "alone").mkdir(exist_ok=True)
    path = os.pathsep.join([str(folder), *([] if bare else [str(ROOT)])])
    done = subprocess.run(
        [sys.executable, *(["-S"] if bare else []), "-c", code],
        cwd=folder / "alone",
        text=True,
        capture_output=True,
        env=clean | {"PYTHONPATH": path} | env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.stdout, calls


RUNTIMES = {
    "Colab, TPU v5e-1": ({"COLAB_TPU_1VM": "1", "TPU_ACCELERATOR_TYPE": "v5e-1", "COLAB_GPU": ""}, (), {}, "[tpu]"),
    "a TPU of the first kind": ({"COLAB_TPU_ADDR": "10.0.0.2:8470"}, (), {}, "[tpu]"),
    "a TPU machine that names none": ({}, ("/dev/accel0",), {}, "[tpu]"),
    "Colab, libtpu is the only sign": (
        {"COLAB_RELEASE_TAG": "release", "COLAB_GPU": "0"},
        (),
        {"libtpu": "0.0.21.1"},
        "[tpu]",
    ),
    "libtpu without a TPU must fit too": ({}, (), {"libtpu": "0.0.21.1"}, "[tpu]"),
    "Colab, GPU": ({"COLAB_GPU": "1", "COLAB_TPU_1VM": ""}, ("/dev/nvidia0",), {}, "[cuda]"),
    "Colab, GPU by its variable": ({"COLAB_GPU": "1"}, (), {}, "[cuda]"),
    "a GPU machine": ({}, ("/dev/nvidia0", "/dev/nvidia1"), {}, "[cuda]"),
    "a GPU machine with a TPU's variables": ({"TPU_ACCELERATOR_TYPE": "v5e-1"}, ("/dev/nvidia0",), {}, "[cuda]"),
    "CUDA 13": ({}, ("/dev/nvidia0",), {"jax-cuda13-plugin": "0.7.2"}, "[cuda13]"),
    "a plugin without a GPU must fit too": ({}, (), {"jax-cuda12-plugin": "0.7.2"}, "[cuda]"),
    "Colab, CPU": ({"COLAB_GPU": "0", "COLAB_TPU_1VM": "", "COLAB_RELEASE_TAG": "release"}, (), {}, ""),
    "anywhere else": ({}, (), {}, ""),
}


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_runtime_is_told_without_jax(tmp_path, name):
    env, devices, there, extra = RUNTIMES[name]
    install(tmp_path, {"jax": "0.7.2", "jaxlib": "0.7.2"} | there)
    said, calls = run(tmp_path, source="git+https://host/owner/pdx.git", devices=devices, **env)
    assert [c[-1] for c in calls] == [f"pdx-inference{extra} @ git+https://host/owner/pdx.git"]
    assert "could not install it" in said
    assert "no such network" in said
    assert said.endswith("no jax\n")


SOURCES = {
    "pdx-inference": "pdx-inference[tpu]",
    "pdx-inference==0.1.0": "pdx-inference[tpu]==0.1.0",
    "git+https://host/owner/pdx@v0.1": "pdx-inference[tpu] @ git+https://host/owner/pdx@v0.1",
    "https://host/owner/pdx": "pdx-inference[tpu] @ git+https://host/owner/pdx",
    "git@host:owner/pdx.git": "pdx-inference[tpu] @ git+ssh://git@host/owner/pdx.git",
    f"https://host/{WHEEL}": f"pdx-inference[tpu] @ https://host/{WHEEL}",
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_source_becomes_one_requirement(tmp_path, source):
    _, calls = run(tmp_path, source=source, devices=("/dev/accel0",))
    assert len(calls) == 1
    assert calls[0][0] == "install"
    assert calls[0][-1] == SOURCES[source]


@pytest.mark.parametrize("where", ["my wheels", "."])
def test_a_wheel_or_a_folder_is_an_address_of_a_file(tmp_path, where):
    folder = tmp_path / "alone" / where
    folder.mkdir(parents=True)
    (folder / WHEEL).touch()
    for source in (folder / WHEEL, folder):
        _, calls = run(tmp_path, source=str(source))
        assert calls[-1][-1] == f"pdx-inference @ {source.resolve().as_uri()}"


def test_without_a_source_it_takes_the_wheel_beside_the_notebook_or_the_checkout_around_it(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "pdx").mkdir()
    assert run(tmp_path)[1][-1][-1] == f"pdx-inference @ {tmp_path.as_uri()}"
    (tmp_path / "alone" / WHEEL).touch()
    assert run(tmp_path)[1][-1][-1] == f"pdx-inference @ {(tmp_path / 'alone' / WHEEL).as_uri()}"


@pytest.mark.parametrize(
    ("source", "says"),
    [("", "set SOURCE"), ("no/such.whl", "'no/such.whl' is no file"), ("pdx_interference", "is no file")],
)
def test_without_anything_to_install_it_says_so(tmp_path, source, says):
    said, calls = run(tmp_path, source=source)
    assert said.startswith("STOP")
    assert says in said
    assert calls == []


def test_without_pip_it_takes_uv_for_this_python(tmp_path):
    options = {"source": "pdx-inference", "devices": ("/dev/accel0",), "pip": None}
    assert "There is neither pip nor uv here" in run(tmp_path, **options)[0]
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\necho "$@" 1>&2\nexit 1\n')
    uv.chmod(0o755)
    there = f"shutil.which = lambda name: name == 'uv'\nos.environ['PATH'] = {str(tmp_path)!r}"
    said = run(tmp_path, **options, before=there)[0]
    assert f"pip install -q --python {sys.executable} pdx-inference[tpu]" in said


# pip as it would end: jax and all that belongs to it of one release.
UPGRADES = """
import shutil
folder = pathlib.Path({folder!r})
for old in folder.glob("*.dist-info"):
    shutil.rmtree(old)
sys.path.insert(0, {root!r})
from tests.installation.test_versions import install
install(folder, {there!r})
"""
OLD = {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.21.1"}
TPU = {"JAX_PLATFORMS": "cpu", "COLAB_TPU_1VM": "1"}


def test_if_jax_was_imported_it_asks_for_a_restart_and_nothing_else(tmp_path):
    install(tmp_path, OLD)
    there = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "libtpu": "0.0.50.1"}
    upgrade = UPGRADES.format(folder=str(tmp_path), root=str(ROOT), there=there)
    loaded = "import types; sys.modules['jax'] = types.SimpleNamespace(__version__='0.7.2')"
    options = {"source": "pdx-inference", "before": loaded, "pip": upgrade, **TPU}
    first, calls = run(tmp_path, **options)
    assert [line for line in first.splitlines() if line.startswith("STOP")] == [
        "STOP Restart the runtime (Colab: Runtime > Restart session), then run from the first cell on."
    ]
    assert "backend" not in first
    # Once more without a restart: what is installed is right now, what is loaded is not.
    again, more = run(tmp_path, **options)
    assert "STOP Restart" in again
    assert len(more) == len(calls) + 1 == 2


def test_on_a_tpu_runtime_whose_jax_runs_on_the_cpu_it_stops_with_the_remedy(tmp_path):
    said, calls = run(tmp_path, bare=False, source="pdx-inference", pip="", **TPU)
    assert calls[0][-1].startswith("pdx-inference[")
    assert "STOP This is a TPU runtime, but JAX runs on cpu. JAX_PLATFORMS is 'cpu': remove it." in said
    assert "restart the runtime" in said


def test_what_still_does_not_fit_is_said_with_its_command(tmp_path):
    install(tmp_path, {"libtpu": "0.0.21.1"})
    said, _ = run(tmp_path, bare=False, source="pdx-inference", pip="")
    assert "STOP libtpu 0.0.21.1 does not belong to jax" in said
    assert 'pip install "jax[' in said
    assert said.endswith("no jax\n")


def test_where_all_is_there_nothing_is_installed(tmp_path):
    said, calls = run(tmp_path, bare=False, JAX_PLATFORMS="cpu")
    assert calls == []
    assert "cpu: jax " in said
    assert "STOP" not in said


def test_every_notebook_begins_with_the_cell():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first = next(c for c in cells if c["cell_type"] == "code")
        assert "".join(first["source"]) == CELL.read_text(encoding="utf-8").rstrip("\n"), path.name
