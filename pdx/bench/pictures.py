"""Checks, before anything is measured, that a plot can be drawn and written."""

from __future__ import annotations

from pathlib import Path

from pdx.errors import RequestError
from pdx.io import outputs


def require() -> None:
    """Raises RequestError, with what to install, if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RequestError("a plot needs matplotlib: pip install 'pdx-inference[notebook]'") from None


def check(file: Path) -> None:
    """Raises RequestError if a plot cannot be drawn or written to `file`."""
    require()
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in kinds:
        raise RequestError(f"{file}: a plot's name must end in one of {', '.join(f'.{k}' for k in sorted(kinds))}")
    if not file.absolute().parent.is_dir():
        raise RequestError(f"{file}: there is no such folder to write the plot to")
    outputs.check_file(file)
