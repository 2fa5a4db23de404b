"""Shapes of published models, from `configs/`. A plan needs only the shape, not the weights."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pallas_kernels.layouts import Layout
from pdx.config import ModelConfig
from pdx.cost import Setup
from pdx.cost.planned_layers import Experts, Latent
from pdx.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from pdx.installation.paths import config_folders
from pdx.quant import Policy


@dataclass(frozen=True)
class Shape:
    """The shape of a model: its configuration, and descriptions of layers that pdx cannot run yet."""

    config: ModelConfig
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def runs(self) -> bool:
        """Whether `pdx.model` can run it."""
        return self.experts is None and self.latent is None

    def setup(
        self,
        dtype: str = "bfloat16",
        quantize: str | Policy | None = None,
        kv_dtype: str | None = None,
        layout: Layout | None = None,
    ) -> Setup:
        """The `Setup` for the cost model: the shape and how it is stored and run."""
        return Setup(self.config, dtype, quantize, kv_dtype, layout, self.experts, self.latent)


def names() -> list[str]:
    """The names of all shapes, sorted."""
    return sorted({file.stem for folder in config_folders() for file in folder.glob("*.toml")})


def config(model: str | Path) -> ModelConfig:
    """The configuration of a model that pdx can run.

    Raises as `shape`, and UnsupportedModelError for a model that pdx can plan but not run.
    """
    found = shape(model)
    if not found.runs:
        raise UnsupportedModelError(
            f"{model} has layers that pdx can plan but not run yet "
            f"({'experts' if found.experts else 'latent attention'})"
        )
    return found.config


def shape(model: str | Path) -> Shape:
    """The shape for a name in `configs/`, a TOML file, or any model argument of `pdx.load`. Weights are not read.

    Raises:
      ModelNotFoundError: an unknown name; the message lists the known ones.
      ModelFileError: a file that does not describe a shape.
    """
    for folder in config_folders():
        if (file := folder / f"{model}.toml").is_file():
            return read(file)
    if str(model).endswith(".toml"):
        return read(Path(model))
    from pdx.weights.opening import open_model
    from pdx.weights.resolve import resolve

    try:
        return Shape(open_model(resolve(model)).config)
    except ModelNotFoundError as error:
        near = difflib.get_close_matches(str(model), names(), n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ModelNotFoundError(f"{error}\nShapes to plan with: {hint}{', '.join(names())}") from None


def read(file: Path) -> Shape:
    """Read a shape from TOML. Raises ModelFileError.

    The file has the fields of `ModelConfig`. Instead of `windows` it has `window` and `full_every` (every n-th layer
    has no window). The tables [experts] and [latent] have the fields of `Experts` and `Latent`.
    """
    try:
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
        window, every = fields.pop("window", None), fields.pop("full_every", None)
        if window is not None:
            full = [every is not None and (i + 1) % every == 0 for i in range(fields["num_layers"])]
            fields["windows"] = tuple(None if whole else window for whole in full)
        experts, latent = fields.pop("experts", None), fields.pop("latent", None)
        return Shape(
            ModelConfig(**fields), Experts(**experts) if experts else None, Latent(**latent) if latent else None
        )
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{file}: not the shape of a model ({error})") from None
