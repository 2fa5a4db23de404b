"""What a user is told while something takes long."""

import io
import threading

import pytest

from pdx.weights import progress
from pdx.weights.progress import notify_if_slow, slow_notice


class Timers:
    """Stands in for `threading.Timer`: time passes when a test says so."""

    def __init__(self, seconds, tell):
        self.seconds, self.tell, self.daemon, self.running = seconds, tell, False, False
        Timers.last = self

    def start(self):
        assert self.daemon
        self.running = True

    def cancel(self):
        self.running = False

    def pass_time(self):
        if self.running:
            self.tell()


@pytest.fixture
def timers(monkeypatch):
    monkeypatch.setattr(progress.threading, "Timer", Timers)
    return Timers


class Written(io.StringIO):
    """A stream on whose first line one can wait."""

    def __init__(self):
        super().__init__()
        self.line = threading.Event()

    def flush(self):
        super().flush()
        self.line.set()


def test_only_what_takes_long_is_told():
    out = Written()
    with slow_notice("loading a model", out, after_s=0.02):
        assert out.line.wait(600)
    with slow_notice("something quick", out, after_s=3600):
        pass
    assert out.getvalue() == "loading a model ...\n"


def test_items_come_as_they_are_with_a_line_for_each_that_is_late(timers):
    out = io.StringIO()

    def items():
        yield 1
        timers.last.pass_time()
        yield 2

    assert list(notify_if_slow(items(), "compiling", out, after_s=0.02)) == [1, 2]
    assert timers.last.seconds == 0.02
    timers.last.pass_time()
    assert out.getvalue() == "compiling ...\n"


def test_what_fails_is_told_of_no_more(timers):
    out = io.StringIO()
    with pytest.raises(ValueError, match="no"), slow_notice("loading", out, after_s=0.05):
        raise ValueError("no")
    timers.last.pass_time()
    assert out.getvalue() == ""
