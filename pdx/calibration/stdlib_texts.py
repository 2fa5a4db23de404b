"""Texts that come with every Python: one to score models on, one to calibrate them with."""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path


def evaluation() -> str:
    """The language reference of this Python, as its `help()` prints it: English prose with some code."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def calibration() -> str:
    """The longer docstrings of the standard library's top modules, shuffled. None is part of the evaluation text."""
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        found += [text for text in map(ast.get_docstring, nodes) if text and len(text) > 200]
    random.Random(0).shuffle(found)
    return "\n\n".join(found)
