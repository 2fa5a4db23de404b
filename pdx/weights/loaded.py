"""`Model`, a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from pdx.config import ModelConfig
from pdx.errors import ModelFileError
from pdx.meshes import as_mesh
from pdx.model import Params
from pdx.tokenizer import Tokenizer


@dataclass(eq=False)
class Model:
    """A loaded model: parameters on the device, configuration and tokenizer. `load` returns it, `save` takes it.

    Attributes:
      params: the tree that `pdx.model.param_specs` declares.
      config: the shape of the model.
      name, path: what it was loaded as, and from where.
      dtype: type of the matrices; norms are always f32.
      mesh: the devices that it is sharded over; None on one device.
      notes: sentences for the user.
      license: as the model's files name it.
      terms: sentences that the licence requires with every copy.
      make_tokenizer: builds the tokenizer on first use; None: the model has none.
      sampling: the settings that the model's files recommend, by field of `SamplingOptions` (see `sampling_defaults`).

    Example:
      >>> from pathlib import Path
      >>> model = pdx.Model(params, cfg, name="tiny", path=Path("tiny"), dtype=jnp.float32)
      >>> model.config.max_context, model.mesh
      (256, None)
    """

    params: Params = field(repr=False)
    config: ModelConfig
    name: str
    path: Path
    dtype: Any
    mesh: Mesh | None = None
    notes: list[str] = field(default_factory=list)
    license: str | None = None
    terms: tuple[str, ...] = ()
    make_tokenizer: Callable[[], Tokenizer] | None = field(default=None, repr=False)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.mesh = as_mesh(self.mesh)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built on first use, since a large vocabulary takes about a second. Raises ModelFileError without one."""
        if self.make_tokenizer is None:
            raise ModelFileError(f"model {self.name} has no tokenizer")
        return self.make_tokenizer()
