"""The rules of the house, read from the source: who imports whom, what starts light, how long a file is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.imports import LAYERS, PACKAGES, imports, layer, violations

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def modules() -> dict[str, str]:
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text(encoding="utf-8") for p in FILES}


def test_the_import_rule_holds():
    assert len(FILES) > 40
    assert violations(modules()) == []


WRONG = {
    "upward": ({"pdx.config": "from pdx.steps import prefill", "pdx.steps": ""}, "layer 1 may not import layer 4"),
    "upward by name": ({"pdx.model": "from pdx import steps", "pdx.steps": ""}, "layer 3 may not import layer 4"),
    "upward, relative": ({"pdx.layers.mlp": "from ..model import forward"}, "layer 2 may not import layer 3"),
    "upward in a function": ({"pdx.shapes": "def f():\n    import pdx.model"}, "pdx.shapes:2 .*layer 1 may not"),
    "upward as text": ({"pdx.shapes": "import importlib\nimportlib.import_module('pdx.cli')"}, "not import layer 7"),
    "kernels to pdx": ({"pallas_kernels.masking": "import pdx.shapes"}, "kernel library may only import"),
    "kernels to flax": ({"pallas_kernels.x.api": "from flax import struct"}, "kernel library may only import"),
    "attention elsewhere": ({"pdx.model": "from pallas_kernels import flash_attention"}, "only pdx.layers. calls"),
    "attention's module": ({"pdx.model": "import pallas_kernels.decode_attention.api"}, "only pdx.layers. calls"),
    "matmul elsewhere": ({"pdx.layers.mlp": "from pallas_kernels import quantized_matmul"}, "only pdx.quant calls"),
    "no layer": ({"pdx.helpers": ""}, "pdx.helpers is in no layer"),
    "a cycle": (
        {"pdx.shapes": "import pdx.errors", "pdx.errors": "def f():\n    from . import shapes"},
        "a cycle: pdx.errors -> pdx.shapes -> pdx.errors",
    ),
    "a longer cycle": (
        {
            "pallas_kernels.a": "from pallas_kernels import b",
            "pallas_kernels.b": "from . import c",
            "pallas_kernels.c": "from .a import x",
        },
        "a -> .*b -> .*c -> .*a",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_import_rule_finds(name):
    sources, says = WRONG[name]
    found = violations(sources)
    assert len(found) == 1, found
    assert re.search(says, found[0])


RIGHT = {
    "pdx.__init__": "from importlib import import_module",
    "pdx.errors": "from __future__ import annotations\nimport json",
    "pdx.config": "from pdx.errors import PdxError\nfrom . import shapes",
    "pdx.shapes": "",
    "pdx.layers.__init__": "",
    "pdx.layers.attention": "from pallas_kernels import flash_attention\nfrom pdx.config import ModelConfig",
    "pdx.layers.linear": "from pallas_kernels.masking import soft_cap\nfrom . import attention",
    "pdx.bench.sweep": "from pallas_kernels import flash_attention, quantized_matmul\nimport pdx.layers.attention",
    "pdx.quant": "from pallas_kernels import quantized_matmul",
    "pallas_kernels.masking": "import jax.numpy as jnp\nimport numpy as np\nfrom jaxtyping import Array\nimport math",
    "pallas_kernels.__init__": "from .masking import visible\nfrom pallas_kernels import masking",
}


def test_the_import_rule_lets_the_rest_be():
    assert violations(RIGHT) == []


def test_every_way_to_import_is_read():
    source = (
        "import a.b\nfrom c import d as e\nfrom . import f\nfrom ..g import h\n"
        "def i():\n    if 1:\n        from j import k\n__import__('l.m')\nimport_module('n')"
    )
    read = {(i.module, i.name) for i in imports("x.y.z", source)}
    assert read == {("a.b", ""), ("c", "d"), ("x.y", "f"), ("x.g", "h"), ("j", "k"), ("l.m", ""), ("n", "")}
    assert {(i.module, i.name) for i in imports("x.y", "from . import f\nfrom ..g import h", is_package=True)} == {
        ("x.y", "f"),
        ("x.g", "h"),
    }


def test_layers():
    assert [layer(m) for m in ("pdx", "pdx.config", "pdx.cache", "pdx.cache.dense", "pdx.model", "pdx.steps")] == [
        0,
        1,
        2,
        2,
        3,
        4,
    ]
    assert layer("pdx.cli") == len(LAYERS)
    assert layer("pdx.configuration") is None


HEAVY = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "typer", "rich")


def loaded_by(statement: str, names=HEAVY) -> list[str]:
    """Which of `names` are loaded after `statement` in a fresh Python."""
    code = f"{statement}\nimport sys\nprint(*[n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_import_pdx_is_light():
    assert loaded_by("import pdx; assert pdx.__version__; dir(pdx)") == []


def test_the_lightness_test_can_fail():
    assert "jax" in loaded_by("import pdx; pdx.forward")


def test_config_and_errors_need_no_jax():
    for module in (
        "config",
        "errors",
        "shapes",
        "metrics",
        "sampling.options",
        "installation.compilation_cache",
        "engine.scheduler",
    ):
        assert not {"jax", "flax"} & set(loaded_by(f"import pdx.{module}")), module


def test_the_command_starts_without_jax():
    assert not {"jax", "flax"} & set(loaded_by("import pdx.cli"))


def test_every_public_name_is_there():
    import pdx

    for name in pdx.__all__:
        assert getattr(pdx, name) is not None
    with pytest.raises(AttributeError, match="module 'pdx' has no attribute 'prefil'"):
        pdx.prefil  # noqa: B018


def too_long(root: Path) -> list[str]:
    """Files that are not read in one sitting: above 330 lines, or 400 for a kernel or for tests."""
    paths = [(folder, path) for folder in (*PACKAGES, "tests") for path in (root / folder).rglob("*.py")]
    lines = [(folder, path, len(path.read_text(encoding="utf-8").splitlines())) for folder, path in paths]
    return [
        f"{path.name} has {n} lines: split it by what changes together"
        for folder, path, n in lines
        if n > (330 if folder == "pdx" else 400)
    ]


def test_a_file_is_read_in_one_sitting():
    assert too_long(ROOT) == []


def test_a_long_file_is_found(tmp_path):
    for folder, lines in (("pdx", 331), ("pallas_kernels", 331), ("tests", 401)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}_file.py").write_text("x = 1\n" * lines)
    found = " ".join(too_long(tmp_path))
    assert "pdx_file.py has 331" in found
    assert "tests_file.py has 401" in found
    assert "pallas" not in found


def many_parameters(sources: dict[str, str], most: int = 12) -> list[str]:
    """Functions that take more than `most` parameters. The command line's options are its parameters."""
    found = []
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not module.startswith("pdx.cli."):
                count = sum(map(len, (node.args.posonlyargs, node.args.args, node.args.kwonlyargs)))
                found += [f"{module}.{node.name} takes {count}"] if count > most else []
    return found


def test_few_functions_take_many_parameters():
    """The attention ops and their references do: each names all that attention has."""
    assert len(many_parameters(modules())) <= 5
    planted = {"pdx.a": f"def f({', '.join(f'x{n}' for n in range(13))}): ...", "pdx.b": "def f(a, *, b): ..."}
    assert many_parameters(planted) == ["pdx.a.f takes 13"]


# A path of somebody's machine, and what a reader of the published project cannot know.
FORBIDDEN = re.compile(
    r"/(?:work|root|home|Users|mnt)/\w|\blocalhost:\d|\b(?:TODO|FIXME|XXX)\b|pypi\.org|pythonhosted|\bissue #?\d"
)


def forbidden(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]


def test_no_file_knows_this_machine():
    kinds = ("*.py", "*.md", "*.toml", "*.ipynb")
    folders = [*PACKAGES, "tests", "docs", "configs", "notebooks", ".ci"]
    paths = [p for folder in folders for kind in kinds for p in (ROOT / folder).rglob(kind)]
    paths += [p for p in (*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *(ROOT / ".ci").glob("*")) if p.is_file()]
    assert len(paths) > 60
    assert [said for p in set(paths) if p != Path(__file__) for said in forbidden(p)] == []


def test_what_is_forbidden_is_found():
    for text in ("see /home/ann/x", "'/work/a'", "# TODO: later", "http://localhost:8000", "as issue 7 asks"):
        assert FORBIDDEN.search(text), text
    for text in ("framework/a", "~/work", "network", "/homework", "an issue"):
        assert not FORBIDDEN.search(text), text


def test_every_module_says_what_it_is():
    silent = [name for name, text in modules().items() if text.strip() and not ast.get_docstring(ast.parse(text))]
    assert silent == []
