"""The folders of pdx: models, compiled programs, the user's chips, and the shipped `configs/`."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import platformdirs


def home() -> Path:
    """Where pdx keeps models and compiled programs: `PDX_HOME`, else the platform's cache folder."""
    return Path(os.environ.get("PDX_HOME") or platformdirs.user_cache_dir("pdx", appauthor=False))


def models_home() -> Path:
    """The folder of downloaded models and of checkpoints that are known by name."""
    return home() / "models"


def config_folders() -> list[Path]:
    """Possible places of `configs/`: beside the package in a checkout, or in the installation's data folder."""
    return [Path(__file__).parents[2] / "configs", Path(sysconfig.get_path("data")) / "share" / "pdx" / "configs"]
