"""Whether a picture that a command is asked for can be drawn and written, asked before anything is measured."""

from __future__ import annotations

from pathlib import Path

from pdx.errors import RequestError
from pdx.io import outputs


def require() -> None:
    """Raises RequestError, saying what to install, where matplotlib is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RequestError("a plot needs matplotlib: pip install 'pdx-inference[notebook]'") from None


def check(file: Path) -> None:
    """Raises RequestError for a picture that could not be drawn or written in the end."""
    require()
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in kinds:
        raise RequestError(f"{file}: a plot's name must end in one of {', '.join(f'.{k}' for k in sorted(kinds))}")
    if not file.absolute().parent.is_dir():
        raise RequestError(f"{file}: there is no such folder to write the plot to")
    outputs.check_file(file)
