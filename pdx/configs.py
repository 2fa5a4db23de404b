"""Where the files of `configs/` lie: shapes of models, profiles of engines."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def folders() -> list[Path]:
    """Beside the package in a checkout, else where an installed one keeps its data."""
    return [Path(__file__).parents[1] / "configs", Path(sysconfig.get_path("data")) / "share" / "pdx" / "configs"]
