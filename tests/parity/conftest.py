"""What the parity tests measured, printed at the end of every run: a pass says by how much."""

from __future__ import annotations

import pytest


@pytest.fixture
def measured(record_property):
    """Call it with a line of text to have it in the summary, and in the test's output for `-rP`."""

    def say(line: str) -> None:
        print(line)  # under xdist the process that writes the summary does not read this file
        record_property("parity", line)

    return say


def pytest_terminal_summary(terminalreporter):
    lines = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for key, value in getattr(report, "user_properties", [])
        if key == "parity" and report.when == "call"
    ]
    if lines:
        terminalreporter.section("parity with transformers")
        for line in lines:
            terminalreporter.write_line(line)
