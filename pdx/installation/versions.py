"""Checks whether the installed releases of jax, jaxlib and the device libraries fit together.

If libtpu does not fit jaxlib, the first compilation crashes the process (signal 11), so this is checked before jax is
imported. Nothing here imports jax or touches a device. The metadata of the installed jax says what fits: `jax[tpu]`
names its libtpu, `jax[cuda12]` its plugin.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from pdx.errors import VersionError

JAX = ">=0.10.2,<0.13"  # what pdx runs with: the bounds of pyproject.toml
IGNORE = "PDX_IGNORE_VERSIONS"
OFF = ("", "0", "off", "no", "false")
# Device libraries. `jax[...]` names those that fit it; any others are left over from earlier installations.
_PLUGINS = tuple(f"jax-{toolkit}-plugin" for toolkit in ("cuda11", "cuda12", "cuda13", "rocm60", "rocm7", "oneapi"))
PARTS = (
    "jax",
    "jaxlib",
    "libtpu",
    "libtpu-nightly",
    *_PLUGINS,
    *(name.replace("-plugin", "-pjrt") for name in _PLUGINS),
)
_checked = False


@dataclass(frozen=True)
class Misfit:
    """A release that does not fit the others.

    Attributes:
      says: a sentence about the problem.
      remove: distributions to uninstall first.
      install: whether jax must be installed again, with the libraries that fit it.
      restart: the installed release fits, but Python has already loaded another one.
    """

    says: str
    remove: tuple[str, ...] = ()
    install: bool = True
    restart: bool = False


def check() -> None:
    """Raise VersionError if jax, jaxlib and the device libraries do not fit together. A passed check is not repeated.

    The environment variable PDX_IGNORE_VERSIONS=1 skips the check.
    """
    global _checked
    if _checked or ignored():
        return
    if found := misfits():
        raise VersionError(message(found))
    _checked = True


def ignored() -> bool:
    """Whether PDX_IGNORE_VERSIONS is set."""
    return os.environ.get(IGNORE, "").lower() not in OFF


def message(found: list[Misfit]) -> str:
    """One line: what does not fit, and at its end the command that repairs it."""
    says = "; ".join(x.says for x in found)
    if all(x.restart for x in found):
        return f"{says}: restart Python (in a notebook: restart the runtime) and run this again"
    return f"{says}. Run this and restart Python ({IGNORE}=1 ignores the problem): {remedy(found)}"


def installed() -> dict[str, str]:
    """The releases of jax and its parts that are installed, by distribution."""
    return {name: version for name in PARTS if (version := _version(name))}


def misfits() -> list[Misfit]:
    """Everything that does not fit, the most basic first; empty if all releases fit."""
    here = installed()
    if "jax" not in here:
        # A jax without metadata (such as a source tree on the path) cannot be checked.
        return [] if find_spec("jax") else [Misfit("jax is not installed")]
    found = [*_of_jax(here), *_of_devices(here), *_half_installed(here)]
    return found or list(_loaded(here))


def remedy(found: list[Misfit]) -> str:
    """The pip command that installs releases that fit."""
    here = installed()
    commands = []
    if gone := sorted({name for x in found for name in x.remove if name in here}):
        commands.append(f"pip uninstall -y {' '.join(gone)}")
    if any(x.install for x in found):
        extras = sorted({extra for name in here if (extra := _extra(name))})
        wanted = f"=={here['jax']}" if _fits(here.get("jax", ""), JAX) else JAX
        commands.append(f'pip install "jax{"[" + ",".join(extras) + "]" if extras else ""}{wanted}"')
    return " && ".join(commands)


def requirements(distribution: str, extra: str = "") -> list[Requirement]:
    """The requirements of an installed distribution on this machine, with those of `extra`; empty if not installed."""
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []
    needs = []
    for line in lines:
        try:
            need = Requirement(line)
        except InvalidRequirement:
            continue
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            needs.append(need)
    return needs


def unmet(distribution: str, extra: str = "", *, absent: bool = True) -> list[str]:
    """Sentences about unmet requirements of `distribution`. `absent`: include those that are not installed at all."""
    said = []
    for need in requirements(distribution, extra):
        version = _version(need.name)
        if version is None and absent:
            said.append(f"{need.name} is not installed, and {distribution} needs it")
        elif version and not _fits(version, need.specifier):
            said.append(f"{need.name} {version} is installed, and {distribution} needs {need.name}{need.specifier}")
    return said


def _of_jax(here: dict[str, str]) -> Iterator[Misfit]:
    """jax against pdx, jaxlib against jax."""
    jax, jaxlib = here["jax"], here.get("jaxlib")
    if not _fits(jax, JAX):
        yield Misfit(f"jax {jax} is installed, and pdx needs jax{JAX}")
    if jaxlib is None:
        if not find_spec("jaxlib"):
            yield Misfit(f"jaxlib is not installed, and jax {jax} needs it")
        return
    for need in requirements("jax"):
        if canonicalize_name(need.name) == "jaxlib" and not _fits(jaxlib, need.specifier):
            yield Misfit(f"jaxlib {jaxlib} does not belong to jax {jax}, which needs jaxlib{need.specifier}")


def _of_devices(here: dict[str, str]) -> Iterator[Misfit]:
    """libtpu and the plugins against jax and jaxlib."""
    jax, jaxlib = here["jax"], here.get("jaxlib")
    for name in (name for name in here if name not in ("jax", "jaxlib")):
        version, extra = here[name], _extra(name)
        needs = {str(canonicalize_name(need.name)): need.specifier for need in requirements("jax", extra or "")}
        if extra is None:
            yield Misfit(f"{name} {version} is installed, which jax {jax} does not use", (name,), install=False)
        elif name.endswith("-pjrt"):
            if jaxlib and not _same(version, jaxlib):
                yield Misfit(f"{name} {version} does not belong to jaxlib {jaxlib}: their releases must be equal")
        elif name not in needs:  # libtpu-nightly, which overwrites the files of libtpu
            yield Misfit(f"{name} {version} is installed, and jax {jax} needs libtpu", (name, "libtpu"))
        elif not _fits(version, needs[name]):
            yield Misfit(f"{name} {version} does not belong to jax {jax}, which needs {name}{needs[name]}")
        elif jaxlib and not _fits(jaxlib, needs.get("jaxlib", "")):
            yield Misfit(
                f"jaxlib {jaxlib} does not belong to {name} {version}: with it jax {jax} needs jaxlib{needs['jaxlib']}"
            )
        if extra and name in _PLUGINS and _pjrt(name) not in here:
            yield Misfit(f"{_pjrt(name)} is not installed, and {name} needs it")


def _half_installed(here: dict[str, str]) -> Iterator[Misfit]:
    """Distributions that pip lists but Python cannot find: uninstalling libtpu-nightly also removes files of libtpu."""
    for name in (name for name in here if name == "jaxlib" or name == "libtpu" or name in _PLUGINS):
        if not find_spec(name.replace("-", "_")):
            yield Misfit(f"{name} {here[name]} is listed as installed, but its files are missing", (name,))


def _loaded(here: dict[str, str]) -> Iterator[Misfit]:
    """Libraries that Python loaded before another release was installed over them."""
    for name in ("jax", "jaxlib"):
        running = getattr(sys.modules.get(name), "__version__", None)
        if running and name in here and not _same(running, here[name]):
            yield Misfit(f"{name} {running} is loaded, but {here[name]} has been installed since", restart=True)


def _extra(name: str) -> str | None:
    """The extra of jax that installs this device library; None if the installed jax has none."""
    if name.startswith("libtpu"):
        return "tpu"
    toolkit = name.removeprefix("jax-").removesuffix("-plugin").removesuffix("-pjrt")
    wholly = not toolkit.startswith("cuda") or _version(f"nvidia-cuda-runtime-cu{toolkit[4:]}")
    # `cuda12` installs NVIDIA's libraries, `cuda12-local` uses those of the machine.
    wanted = (toolkit, f"{toolkit}-local") if wholly else (f"{toolkit}-local", toolkit)
    known = _extras_of_jax()
    return next((extra for extra in wanted if extra in known), None)


def _extras_of_jax() -> list[str]:
    try:
        return metadata.metadata("jax").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []


def _pjrt(plugin: str) -> str:
    return plugin.replace("-plugin", "-pjrt")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, specifier: str | SpecifierSet) -> bool:
    """Whether a release fits; a pre-release (`0.12.1.dev20261101`) counts as the release that it precedes."""
    try:
        return SpecifierSet(str(specifier)).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _same(one: str, other: str) -> bool:
    """Whether two version strings name the same release; a build suffix (`+cuda12`) is ignored."""
    try:
        return Version(one).public == Version(other).public
    except InvalidVersion:
        return one == other
