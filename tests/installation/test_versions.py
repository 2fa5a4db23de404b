"""Releases of jax, jaxlib, libtpu and CUDA plugins that do not fit: said in one line, before anything crashes.

What is installed is played by folders of metadata, as pip leaves them.
"""

import os
import re
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest

from pdx.errors import PdxError, VersionError
from pdx.installation import versions

ROOT = Path(__file__).parents[2]
FITTING = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1"}


def jax_needs(version: str, libtpu: str) -> list[str]:
    """The lines of a jax's metadata that say what belongs to it."""
    exactly = f"<={version},>={version}"
    return [
        f"Requires-Dist: jaxlib<={version},>=0.11.2",
        "Provides-Extra: tpu",
        f'Requires-Dist: jaxlib{exactly}; extra == "tpu"',
        f'Requires-Dist: libtpu=={libtpu}; extra == "tpu"',
        *(
            line
            for n in ("12", "13")
            for local in ("", "-local")
            for line in (
                f"Provides-Extra: cuda{n}{local}",
                f'Requires-Dist: jaxlib{exactly}; extra == "cuda{n}{local}"',
                f'Requires-Dist: jax-cuda{n}-plugin{exactly}; extra == "cuda{n}{local}"',
            )
        ),
    ]


def install(folder: Path, distributions: dict[str, str]) -> Path:
    """Write the metadata of `distributions` into `folder`."""
    for name, version in distributions.items():
        of = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        of.mkdir(parents=True)
        needs = jax_needs(version, {"0.7.2": "0.0.23"}.get(version, "0.0.50.*")) if name == "jax" else []
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *needs]
        (of / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def only(tmp_path, monkeypatch):
    """`only({...})`: these distributions are installed, and no others."""

    def installed(distributions: dict[str, str], without_files: tuple[str, ...] = ()) -> None:
        install(tmp_path, distributions)

        def distribution(name):
            found = next(metadata.distributions(name=name, path=[str(tmp_path)]), None)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        said = {
            "distribution": distribution,
            "version": lambda n: distribution(n).version,
            "requires": lambda n: distribution(n).requires,
            "metadata": lambda n: distribution(n).metadata,
            "PackageNotFoundError": metadata.PackageNotFoundError,
        }
        monkeypatch.setattr(versions, "metadata", types.SimpleNamespace(**said))
        files = {name.replace("-", "_") for name in distributions} - set(without_files)
        monkeypatch.setattr(versions, "find_spec", lambda name: name if name in files else None)
        monkeypatch.setattr(versions, "_loaded", lambda here: iter(()))
        monkeypatch.setattr(versions, "_checked", False)
        monkeypatch.delenv(versions.IGNORE, raising=False)

    return installed


FIT = {
    "no accelerator": FITTING,
    "tpu": FITTING | {"libtpu": "0.0.50.1"},
    "an older jaxlib that jax allows": FITTING | {"jaxlib": "0.11.2"},
    "cuda": FITTING | {"jax-cuda12-plugin": "0.12.0.1", "jax-cuda12-pjrt": "0.12.0.1"},
    "cuda 13": FITTING | {"jax-cuda13-plugin": "0.12.0.1", "jax-cuda13-pjrt": "0.12.0.1"},
    "both": FITTING | {"libtpu": "0.0.50", "jax-cuda12-plugin": "0.12.0.1", "jax-cuda12-pjrt": "0.12.0.1"},
    "a build of its own": {"jax": "0.12.1.dev20261101", "jaxlib": "0.12.1.dev20261101+sha", "libtpu": "0.0.50.dev1"},
    "a jax that has no metadata": {},
}


@pytest.mark.parametrize("case", FIT)
def test_what_fits_passes(only, monkeypatch, case):
    only(FIT[case])
    if not FIT[case]:
        monkeypatch.setattr(versions, "find_spec", lambda name: object())
    assert versions.misfits() == []
    versions.check()


PLUGIN = {"jax-cuda12-plugin": "0.7.2", "jax-cuda12-pjrt": "0.7.2"}
WITH_CUDA = {"nvidia-cuda-runtime-cu12": "12.8.90"}
MISFITS = {
    # Colab's TPU runtime after an installation without the extra.
    "libtpu left behind": (
        FITTING | {"libtpu": "0.0.21.1"},
        r"libtpu 0\.0\.21\.1 .*libtpu==0\.0\.50\.\*",
        'pip install "jax[tpu]==0.12.0.1"',
    ),
    "libtpu newer": (FITTING | {"libtpu": "0.0.51"}, r"libtpu 0\.0\.51 ", 'pip install "jax[tpu]==0.12.0.1"'),
    # TensorFlow's libtpu has the number of TensorFlow.
    "libtpu of tensorflow-tpu": (
        FITTING | {"libtpu": "2.18.0"},
        r"libtpu 2\.18\.0 ",
        'pip install "jax[tpu]==0.12.0.1"',
    ),
    "libtpu-nightly": (
        FITTING | {"libtpu-nightly": "0.1.dev20240101", "libtpu": "0.0.50.1"},
        "libtpu-nightly 0.1",
        'pip uninstall -y libtpu libtpu-nightly && pip install "jax[tpu]==0.12.0.1"',
    ),
    "jaxlib behind libtpu": (
        FITTING | {"jaxlib": "0.11.2", "libtpu": "0.0.50.1"},
        r"jaxlib 0\.11\.2 .*libtpu",
        'pip install "jax[tpu]==0.12.0.1"',
    ),
    # Colab's GPU runtime, likewise.
    "plugin left behind": (
        FITTING | PLUGIN | WITH_CUDA,
        r"jax-cuda12-plugin 0\.7\.2 .*jax-cuda12-pjrt 0\.7\.2",
        'pip install "jax[cuda12]==0.12.0.1"',
    ),
    "plugin over the machine's CUDA": (
        FITTING | PLUGIN,
        "jax-cuda12-plugin 0.7.2",
        'pip install "jax[cuda12-local]==0.12.0.1"',
    ),
    "plugin newer than jaxlib": (
        {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "jax-cuda12-plugin": "0.12.2", "jax-cuda12-pjrt": "0.12.2"},
        r"plugin 0\.12\.2 ",
        "jax[cuda12-local]==0.12.0.1",
    ),
    "pjrt alone is older": (
        FITTING | {"jax-cuda12-plugin": "0.12.0.1", "jax-cuda12-pjrt": "0.12.0"},
        r"jax-cuda12-pjrt 0\.12\.0 .*jaxlib 0\.12\.0\.1",
        "jax[cuda12-local]==0.12.0.1",
    ),
    "plugin without pjrt": (
        FITTING | {"jax-cuda12-plugin": "0.12.0.1"},
        "jax-cuda12-pjrt is not installed",
        "jax[cuda12-local]==0.12.0.1",
    ),
    "plugin of an old toolkit": (
        FITTING | {"jax-cuda11-plugin": "0.4.20"},
        "jax-cuda11-plugin 0.4.20 .*does not use",
        "pip uninstall -y jax-cuda11-plugin",
    ),
    "jax too old": (
        {"jax": "0.7.2", "jaxlib": "0.7.2"},
        r"jax 0\.7\.2 .*pdx needs jax>=0\.10\.2,<0\.13",
        'pip install "jax>=0.10.2,<0.13"',
    ),
    "Colab as it starts": (
        {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.21.1"},
        r"jax 0\.7\.2 .*libtpu 0\.0\.21",
        'pip install "jax[tpu]>=0.10.2,<0.13"',
    ),
    "jax too new": ({"jax": "0.13.0", "jaxlib": "0.13.0"}, r"jax 0\.13\.0 ", 'pip install "jax>=0.10.2,<0.13"'),
    "jaxlib newer": (
        FITTING | {"jaxlib": "0.12.1"},
        r"jaxlib 0\.12\.1 .*jaxlib<=0\.12\.0\.1",
        'pip install "jax==0.12.0.1"',
    ),
    "jaxlib older": (FITTING | {"jaxlib": "0.10.2"}, r"jaxlib 0\.10\.2 ", 'pip install "jax==0.12.0.1"'),
    "no jaxlib": ({"jax": "0.12.0.1"}, "jaxlib is not installed", 'pip install "jax==0.12.0.1"'),
    "no jax": ({}, "jax is not installed", 'pip install "jax>=0.10.2,<0.13"'),
    "no jax on a TPU": ({"libtpu": "0.0.21.1"}, "jax is not installed", 'pip install "jax[tpu]>=0.10.2,<0.13"'),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_said_in_one_line_that_ends_in_the_command(only, case):
    distributions, says, command = MISFITS[case]
    only(distributions)
    with pytest.raises(VersionError) as raised:
        versions.check()
    line = str(raised.value)
    assert re.search(says, line), line
    assert line.endswith(command) if command.startswith("pip") else command in line
    assert "\n" not in line
    assert versions.IGNORE in line


@pytest.mark.parametrize("name", ["libtpu", "jaxlib", "jax-cuda12-plugin"])
def test_what_is_listed_and_has_no_files_is_installed_anew(only, name):
    """Two packages that share files, of which one was uninstalled."""
    only(FIT["both"], without_files=(name.replace("-", "_"),))
    with pytest.raises(VersionError, match=f"{name} .* its files are missing.*pip uninstall -y {name} && pip install"):
        versions.check()


def test_who_wants_to_goes_on_all_the_same(only, monkeypatch):
    only(FITTING | {"libtpu": "0.0.21.1"})
    monkeypatch.setenv(versions.IGNORE, "1")
    versions.check()
    monkeypatch.setenv(versions.IGNORE, "0")
    with pytest.raises(VersionError):
        versions.check()


def test_a_jax_that_runs_while_another_was_installed_asks_for_a_restart(only, monkeypatch):
    loaded = versions._loaded
    only(FITTING)
    monkeypatch.setattr(versions, "_loaded", loaded)
    for name in ("jax", "jaxlib"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__version__="0.7.2"))
    with pytest.raises(VersionError, match=r"jax 0\.7\.2 .*0\.12\.0\.1 .*restart") as raised:
        versions.check()
    assert "pip" not in str(raised.value)


def test_the_bounds_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"jax{versions.JAX}" in project["dependencies"]


def run(code: list[str], **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), env.pop("path")])
    return subprocess.run(
        [sys.executable, *code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path} | env,
    )


@pytest.mark.parametrize("command", [["generate", "hi"], ["plan", "llama-3-8b"], ["bench", "load"], ["models"]])
def test_every_command_stops_before_jax_is_imported(tmp_path, command):
    """A libtpu of another release stands before the one that is installed, if any."""
    for name, text in (("jax", "raise SystemExit('jax was imported')"), ("libtpu", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    done = run(["-m", "pdx", *command], path=str(install(tmp_path, {"libtpu": "0.0.1"})))
    assert done.returncode == 1
    assert re.fullmatch(r'error: libtpu 0\.0\.1 does not belong .*: pip install "jax\[.*tpu\]==.*"\n', done.stderr)
    assert done.stdout == ""


def test_help_is_there_all_the_same(tmp_path):
    done = run(["-m", "pdx", "generate", "--help"], path=str(install(tmp_path, {"libtpu": "0.0.1"})))
    assert done.returncode == 0
    assert "--max-tokens" in done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "pdx.load",
        "pdx.forward",
        "from pdx.generation import generate",
        "from pdx.installation.devices import device_name; device_name()",
        "from pdx.installation.compilation_cache import enable_cache; enable_cache()",
    ],
)
def test_python_stops_before_a_device_is_touched(tmp_path, statement):
    code = f"import pdx\ntry:\n    {statement}\nexcept pdx.PdxError as e:\n    print(type(e).__name__, e)"
    done = run(["-c", code], path=str(install(tmp_path, {"libtpu": "0.0.1"})))
    assert done.stdout.startswith("VersionError libtpu 0.0.1 does not belong"), done.stderr


def test_versions_are_read_without_jax():
    done = run(["-c", "import sys, pdx.installation.versions as v; v.misfits(); print('jax' in sys.modules)"], path="")
    assert done.stdout == "False\n"
    assert issubclass(VersionError, PdxError)
