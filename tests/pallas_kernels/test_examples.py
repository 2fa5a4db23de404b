"""The examples in the kernel library's docstrings, run as doctests."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import pallas_kernels
from pallas_kernels import dispatch

ROOT = Path(pallas_kernels.__file__).parent
PUBLIC = {name: getattr(pallas_kernels, name) for name in pallas_kernels.__all__}
PUBLIC |= {"explain": dispatch.Op.explain, "use": dispatch.use}


def modules_with_examples() -> list[str]:
    paths = [p for p in ROOT.rglob("*.py") if ">>> " in p.read_text(encoding="utf-8")]
    return sorted(".".join(p.relative_to(ROOT.parent).with_suffix("").parts) for p in paths)


def examples(found, name: str) -> list[doctest.DocTest]:
    """The doctests of a module, class or function. An example has to import what it uses."""
    tests = doctest.DocTestFinder(exclude_empty=True).find(found, name, globs={})
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_function_has_an_example(name):
    assert examples(PUBLIC[name], name)


def test_a_function_without_an_example_is_found():
    assert examples(dispatch.choose, "choose") == []


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples_run(module, monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    tests = examples(import_module(module), module)
    assert tests
    # Every example in the file was collected: none stands where no finder looks.
    written = Path(import_module(module).__file__).read_text(encoding="utf-8").count(">>> ")
    assert sum(len(test.examples) for test in tests) == written
    for test in tests:
        said = []
        result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        assert result.failed == 0, "".join(said)


def test_a_wrong_example_fails():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed == 1
