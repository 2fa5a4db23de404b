"""Who imports whom, read from the source: every import statement, inside functions too, with what it names."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PACKAGES = ("pdx", "pallas_kernels")

# The layers of pdx, lowest first. A name ending in a dot is a package with everything in it.
LAYERS = (
    ("config", "shapes", "errors", "arguments", "meshes", "sharding", "quant", "metrics", "io.", "installation."),
    ("layers.", "cache."),
    ("model", "families.", "weights.", "tokenizer.", "sampling."),
    ("steps.", "generation.", "speculative.", "calibration.", "cost.", "aot"),
    ("engine.",),
    ("clients.", "plan.", "bench.", "train."),
    ("cli.", "serve.", "__main__"),
)
# What a kernel library for others to use may stand on.
KERNELS_MAY_IMPORT = ("jax", "jaxlib", "numpy", "ml_dtypes", "jaxtyping", "pallas_kernels")
# Who may call which ops of the kernel library; `bench` compares them, and helpers that are no ops are free to all.
CALLERS = {"attention": "pdx.layers.", "matmul": "pdx.quant"}


@dataclass(frozen=True)
class Import:
    """One module that `file` names, on `line`; `name` is what is taken out of it, if anything is."""

    file: str
    line: int
    module: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}{'.' if self.name else ''}{self.name}"


def imports(module: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, wherever it stands, relative ones and `import_module("...")` resolved."""
    parts = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(module, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            yield from (Import(module, node.lineno, base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from (Import(module, node.lineno, x.value) for x in node.args[:1] if isinstance(x, ast.Constant))


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def target(found: Import, modules: Mapping[str, str]) -> str:
    """The module an import ends in: `from pdx import steps` is one of pdx.steps."""
    whole = f"{found.module}.{found.name}"
    return whole if whole in modules else found.module


def layer(module: str) -> int | None:
    """The layer of a module of pdx, from 1; None for one that the table does not know, 0 for the bare package."""
    if module == "pdx":
        return 0
    inside = module.removeprefix("pdx.")
    for level, names in enumerate(LAYERS, 1):
        if any(inside == name or (name.endswith(".") and f"{inside}.".startswith(name)) for name in names):
            return level
    return None


def violations(modules: Mapping[str, str]) -> list[str]:
    """What breaks the import rule. `modules`: dotted name -> source; a package is its name and `.__init__`."""
    sources = {name.removesuffix(".__init__"): text for name, text in modules.items()}
    found = [
        i
        for name, text in modules.items()
        for i in imports(name.removesuffix(".__init__"), text, name.endswith(".__init__"))
    ]
    said = [
        f"{name} is in no layer: enter it into the table"
        for name in sources
        if name.startswith("pdx.") and layer(name) is None
    ]
    for i in found:
        said += _broken(i, target(i, sources))
    return said + _cycles(found, sources)


def _broken(i: Import, to: str) -> Iterator[str]:
    package = to.split(".")[0]
    if i.file.split(".")[0] == "pallas_kernels":
        if package not in KERNELS_MAY_IMPORT and package not in sys.stdlib_module_names:
            yield f"{i}: the kernel library may only import {', '.join(KERNELS_MAY_IMPORT)}"
        return
    if package == "pallas_kernels" and not i.file.startswith("pdx.bench."):
        for word, caller in CALLERS.items():
            if word in f"{to}.{i.name}" and not i.file.startswith(caller):
                yield f"{i}: only {caller} calls {word} ops"
    if package == "pdx" and None not in (levels := (layer(i.file), layer(to))) and levels[0] and levels[1] > levels[0]:
        yield f"{i}: layer {levels[0]} may not import layer {levels[1]}"


def _cycles(found: list[Import], sources: Mapping[str, str]) -> list[str]:
    after = {name: {target(i, sources) for i in found if i.file == name} & set(sources) - {name} for name in sources}
    state: dict[str, bool] = {}  # False: on the path that is being walked; True: done
    said = []

    def walk(name: str, path: tuple[str, ...]) -> None:
        if state.get(name) is False:
            said.append("a cycle: " + " -> ".join([*path[path.index(name) :], name]))
        if name in state:
            return
        state[name] = False
        for other in sorted(after[name]):
            walk(other, (*path, name))
        state[name] = True

    for name in sorted(sources):
        walk(name, ())
    return said
