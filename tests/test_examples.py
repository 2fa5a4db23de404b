"""The examples in the docstrings of `pdx`'s public names run, on the tiny model that `help(pdx)` makes."""

import doctest

import pytest

import pdx

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FINDER = doctest.DocTestFinder(recurse=False)
# Their examples may need a downloaded model, and so may be skipped.
MAY_SKIP = {"load", "generate", "stream", "Engine", "compare"}


def examples(name: str, value) -> doctest.DocTest:
    """The examples in the docstring of a public name itself; none for a docstring without any."""
    (found,) = FINDER.find(value, name, module=False, globs={})
    return found


def run(test: doctest.DocTest, names: dict) -> dict:
    """Run one docstring's examples with `names`; raises what went wrong. Returns the names they leave."""
    test.globs = dict(names)
    doctest.DebugRunner(optionflags=FLAGS).run(test, clear_globs=False)
    return test.globs


def skipped(test: doctest.DocTest) -> bool:
    return any(example.options.get(doctest.SKIP) for example in test.examples)


@pytest.fixture(scope="module")
def tiny() -> dict:
    """`cfg`, `params`, `tokens` and `lengths`, as the docstring of `pdx` makes them."""
    return run(examples("pdx", pdx), {})


@pytest.mark.parametrize("name", pdx._WHERE)
def test_every_public_name_has_an_example_that_runs(name, tiny):
    value = getattr(pdx, name)
    assert callable(value)
    test = examples(name, value)
    assert test.examples, f"pdx.{name} has no example in its docstring"
    assert name in MAY_SKIP or not skipped(test), f"the example of pdx.{name} is skipped, but needs no download"
    run(test, tiny)


def test_a_wrong_example_is_found(tiny):
    def wrong():
        """
        >>> cfg.num_layers
        3
        """

    with pytest.raises(doctest.DocTestFailure):
        run(examples("wrong", wrong), tiny)


def test_a_missing_and_a_skipped_example_are_found():
    def without():
        """No example."""

    def skips():
        """
        >>> 1 + 1  # doctest: +SKIP
        3
        """

    assert not examples("without", without).examples
    assert skipped(examples("skips", skips))
