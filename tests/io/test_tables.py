"""Tables on screens of any width: nothing is cut, and no line is wider than the screen unless a word is."""

import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pdx.io.tables import Table, blocks, screen

WORDS = st.lists(st.integers(1, 12).map(lambda n: "abcdefghijkl"[:n]), min_size=1, max_size=4).map(" ".join)


@settings(deadline=None)  # a busy machine is no fault
@given(st.data(), st.integers(30, 120), st.integers(1, 6), st.integers(1, 3))
def test_every_word_is_there_and_no_line_is_too_wide(data, width, columns, rows):
    keys = data.draw(st.integers(1, columns))
    row = st.lists(WORDS, min_size=columns, max_size=columns)
    head, *body = [data.draw(row) for _ in range(rows + 1)]
    found = Table(head, body, keys=keys, left=head[1:2]).lines(width)
    for line in (head, *body):
        for cell in line:
            for word in cell.split():
                assert any(word in text.split() for text in found)
    longest = max(len(word) for line in (head, *body) for cell in line for word in cell.split())
    widest = max(width, (keys + 1) * (longest + 2), keys * (width * 2 // (5 * keys) + 2) + longest)
    assert all(len(line) <= widest for line in found)


def test_what_fits_is_one_block_and_what_does_not_repeats_the_keys():
    rows = [("prefill", "128", "1 ms", "5"), ("decode", "1", "10 ms", "7")]
    table = Table(("phase", "shape", "time", "rate"), rows, keys=2)
    assert table.lines(80) == [
        "phase    shape   time  rate",
        "prefill  128     1 ms     5",
        "decode   1      10 ms     7",
    ]
    assert table.lines(24) == [
        "phase    shape   time",
        "prefill  128     1 ms",
        "decode   1      10 ms",
        "",
        "phase    shape  rate",
        "prefill  128       5",
        "decode   1         7",
    ]
    assert blocks([10, 30, 30, 30], 80) == [[0, 1, 2], [0, 3]]


def test_a_heading_takes_the_line_and_long_text_is_broken_between_words():
    rows = [["a case with a long name"], ["xla", "one two three four five six seven"]]
    table = Table(("op", "ran"), rows, left=("ran",))
    assert table.lines(24)[1] == "a case with a long name"
    assert [line[5:] for line in table.lines(24)[2:]] == ["one two three four", "five six seven"]
    assert table.lines(20)[1:3] == ["a case with a long", "name"]


def test_a_single_column_is_broken_too():
    assert Table(("what",), [["one two three four five"]]).lines(12) == ["what", "one two", "three four", "five"]


def test_markup_takes_no_room_and_a_path_is_never_broken():
    out = io.StringIO()
    path = "/" + "x" * 100
    Table(("name", "where"), [("[red]a[/red]", path), ("b", "c")], left=("where",)).show(Console(file=out, width=40))
    name, first, second = out.getvalue().splitlines()
    assert (name.split(), first.split(), second.split()) == (["name", "where"], ["a", path], ["b", "c"])
    assert first.index(path) == second.index("c")


def test_markdown_is_one_table():
    wide = Table(("a", "b"), [("x" * 90, "y" * 90)])
    assert wide.markdown().splitlines() == ["| a | b |", "| --- | --- |", f"| {'x' * 90} | {'y' * 90} |"]


@pytest.mark.parametrize(("columns", "width"), [("100", 100), ("", 80)])
def test_the_screen_is_what_columns_say(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError()))
    assert screen() == width
