"""What a user is told while something takes long."""

import io
import time

import pytest

from pdx.weights.progress import notify_if_slow, slow_notice


def test_only_what_takes_long_is_told():
    out = io.StringIO()
    with slow_notice("loading a model", out, after_s=0.02):
        time.sleep(0.2)
    with slow_notice("something quick", out, after_s=60):
        pass
    assert out.getvalue() == "loading a model ...\n"


def test_items_come_as_they_are_with_a_line_for_each_that_is_late():
    out = io.StringIO()

    def items():
        yield 1
        time.sleep(0.2)
        yield 2

    assert list(notify_if_slow(items(), "compiling", out, after_s=0.02)) == [1, 2]
    assert out.getvalue() == "compiling ...\n"


def test_what_fails_is_told_of_no_more():
    out = io.StringIO()
    with pytest.raises(ValueError, match="no"), slow_notice("loading", out, after_s=0.05):
        raise ValueError("no")
    time.sleep(0.15)
    assert out.getvalue() == ""
