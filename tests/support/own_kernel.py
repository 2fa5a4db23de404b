"""The kernel of one's own that docs/compare.md shows, as a module."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

DOCUMENT = Path(__file__).parents[2] / "docs" / "compare.md"


def text() -> str:
    """The block as it stands in the document."""
    found = re.search(r"<!-- the kernel of one's own.*?-->\n```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.S)
    return found.group(1)


def module(monkeypatch, folder: Path) -> ModuleType:
    """The block as `my_kernel`, which this process and those that it starts can import."""
    (folder / "my_kernel.py").write_text(text(), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delitem(importlib.sys.modules, "my_kernel", raising=False)
    return importlib.import_module("my_kernel")
