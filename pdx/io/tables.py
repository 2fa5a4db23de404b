"""Tables of text that fit a screen. A table that is too wide is split into blocks, which repeat its first columns."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

GAP = 2


def screen() -> int:
    """The width of the terminal in characters: the variable `COLUMNS` if it is set; 80 without a terminal."""
    return shutil.get_terminal_size((80, 24)).columns


def blocks(widths: Sequence[int], width: int, *, keys: int = 1) -> list[list[int]]:
    """Split columns of these widths into blocks of up to `width` characters. Each block has the first `keys` columns.

    A block is too wide only if the keys and a single column are.

    Example:
      >>> blocks([10, 30, 30, 30], 80)
      [[0, 1, 2], [0, 3]]
    """
    key = list(range(keys))
    first = sum(widths[:keys]) + GAP * (keys - 1)
    found, used = [list(key)], first
    for column, size in enumerate(widths[keys:], keys):
        if used + GAP + size > width and len(found[-1]) > keys:
            found.append(list(key))
            used = first
        found[-1].append(column)
        used += GAP + size
    return found


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      head, rows: cells of text, possibly with rich's markup. In a table of several columns, a row with a single cell is
        a heading.
      keys: the number of leading columns that identify a row.
      left: heads of the columns that are aligned left, as the keys are; the others are aligned right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1
    left: Collection[str] = ()

    def markdown(self) -> str:
        """The table in Markdown, at any width."""
        every = (self.head, ["---"] * len(self.head), *self.rows)
        return "\n".join("| " + " | ".join(row) + " |" for row in every)

    def lines(self, width: int) -> list[str]:
        """Lines of aligned columns, not wider than `width` unless a single word is.

        A table that is too wide is split into blocks that repeat the keys. Cells are then wrapped between words, and
        the keys get at most two fifths of the width beside other columns.
        """
        widths = self._widths(width)
        found: list[str] = []
        for part in blocks(widths, width, keys=self.keys):
            found += [""] * bool(found)
            for row in (self.head, *self.rows):
                heading = self._is_heading(row)
                found += _broken(row[0], width) if heading else self._row([(row[i], widths[i], i) for i in part])
        return found

    def show(self, console: Console | None = None) -> None:
        """Print the table at the width of the screen."""
        from rich.console import Console

        console = console or Console(width=screen())
        for line in self.lines(console.width):
            console.print(line, highlight=False, soft_wrap=True)

    def _is_heading(self, row: Sequence[str]) -> bool:
        return len(row) == 1 < len(self.head)

    def _widths(self, width: int) -> list[int]:
        table = [self.head, *(row for row in self.rows if not self._is_heading(row))]
        columns = range(len(self.head))
        wanted = [max(_size(row[i]) for row in table) for i in columns]
        if sum(wanted) + GAP * (len(wanted) - 1) <= width:
            return wanted
        least = [max(_longest_word(row[i]) for row in table) for i in columns]
        room = width * 2 // 5 if len(columns) > self.keys else width - GAP * (self.keys - 1)
        share = room // self.keys
        found = [max(least[i], min(wanted[i], share)) for i in range(self.keys)]
        rest = width - sum(found) - GAP * self.keys
        return found + [max(least[i], min(wanted[i], rest)) for i in columns[self.keys :]]

    def _row(self, parts: list[tuple[str, int, int]]) -> list[str]:
        cells = [_broken(text, size) for text, size, _ in parts]
        found = []
        for turn in range(max(map(len, cells))):
            padded = []
            for (_, size, column), cell in zip(parts, cells, strict=True):
                text = cell[turn] if turn < len(cell) else ""
                blank = " " * (size - _size(text))
                at_left = column < self.keys or self.head[column] in self.left
                padded.append(text + blank if at_left else blank + text)
            found.append((" " * GAP).join(padded).rstrip())
        return found


def _plain(cell: str) -> str:
    from rich.text import Text

    return Text.from_markup(cell).plain if "[" in cell else cell


def _size(cell: str) -> int:
    from rich.cells import cell_len

    return cell_len(_plain(cell))


def _longest_word(cell: str) -> int:
    return max(map(_size, _plain(cell).split()), default=0)


def _broken(cell: str, size: int) -> list[str]:
    """A cell wrapped between words into lines of at most `size` characters. A wrapped cell loses its markup."""
    if _size(cell) <= size:
        return [cell]
    from rich.markup import escape

    return [escape(x) for x in textwrap.wrap(_plain(cell), size, break_long_words=False, break_on_hyphens=False)]
