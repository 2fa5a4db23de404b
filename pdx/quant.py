"""Which weights are quantized, and how: policies, and the only module that multiplies by quantized matrices.

A policy is a text: a kind for all matrices, then exceptions by name, of which the last match wins.

    int8                          W8A16, one scale per output channel, embedding and head too
    w8a8                          int8, and activations quantized per token
    int4                          symmetric, in the largest groups of 128, 64, 32 that divide; embedding, head int8
    int4:g64:affine,lm_head=w8a8,layers.0.*=none,layers.-1.*=int8
    stored                        as in the file: GGUF's Q8_0, Q4_0 and Q4_1, the rest in float

or a TOML file with `default = "int4"` and a table `[layers]` of such exceptions.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import QuantArray, quantized_matmul
from pallas_kernels.quant_array import DTYPES, GROUPS, Activations, quantize, take_rows
from pdx.errors import RequestError
from pdx.meshes import ANY_DEVICES, Devices, on_one_device, on_several_devices
from pdx.sharding import ArraySpec, is_spec, mesh_axis

KINDS = "none, stored, int8, w8a8 or int4, with :g32, :g64 or :g128 for groups and :affine for int4 with offsets"
# Parameters that are matrices. With tied embeddings, `lm_head` names the head only, not the lookup.
# Those of latent attention (q_a to kv_b) exist only for planning.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down", "q_a", "q_b", "kv_a", "kv_b")
MATRICES = ("embed", "lm_head", *(f"{x}_proj" for x in PROJECTIONS))


@dataclass(frozen=True)
class Kind:
    """How a matrix is stored."""

    bits: int
    group: int | None = None  # None: one scale per output channel; 0: the largest of GROUPS that divides
    symmetric: bool = True
    activations: Activations = "float"
    as_stored: bool = False  # taken from the file value for value

    def group_for(self, columns: int) -> int | None:
        """The size of a group, None for a whole row."""
        if self.group != 0:
            return self.group
        return next((g for g in reversed(GROUPS) if columns % g == 0), None)


# The kind `stored` before it is resolved, when the file is opened.
STORED = Kind(0, as_stored=True)


def kind_of(w: QuantArray) -> Kind:
    """How a quantized matrix is stored."""
    return Kind(w.bits, w.group if w.groups > 1 else None, w.offsets is None, w.activations)


def parse_kind(text: str) -> Kind | None:
    """A kind, None for `none`. Raises RequestError."""
    found = re.fullmatch(r"(none|stored|int8|w8a8|int4)(?::g(\d+))?(:affine)?", text.strip())
    name, group, affine = found.groups() if found else (None, None, None)
    grouped = group is None or (int(group) in GROUPS and name in ("int8", "int4"))
    if not found or not grouped or (affine and name != "int4"):
        raise RequestError(f"quantization {text!r} is not one of {KINDS}")
    if name in ("none", "stored"):
        return STORED if name == "stored" else None
    if name == "int4":
        return Kind(4, int(group or 0), not affine)
    return Kind(8, int(group) if group else None, activations="int8" if name == "w8a8" else "float")


@dataclass(frozen=True)
class Policy:
    """Patterns of parameter names and their kinds; the last match wins."""

    rules: tuple[tuple[str, Kind | None], ...] = ()

    @classmethod
    def parse(cls, text: str | Path | Policy | None) -> Policy:
        """Read a policy. Raises RequestError for anything that is none."""
        if isinstance(text, Policy):
            return text
        if text is None:
            return cls()
        if isinstance(text, Path) or str(text).endswith(".toml"):
            return cls._from_toml(Path(text))
        default, *exceptions = str(text).split(",")
        pairs = [part.partition("=") for part in exceptions]
        if bad := [pattern for pattern, equals, _ in pairs if not equals]:
            raise RequestError(f"quantization {text!r}: {bad[0]!r} is no exception such as lm_head=int8")
        return cls._of(default, [(pattern.strip(), kind) for pattern, _, kind in pairs])

    @classmethod
    def of(cls, params: dict) -> Policy:
        """The policy that describes how these parameters are stored, matrix by matrix."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_parameter)
        kinds = {name_of(path): kind_of(x) for path, x in leaves if isinstance(x, QuantArray)}
        if "lm_head" not in params and "embed" in kinds:
            kinds["lm_head"] = kinds["embed"]
        return cls(tuple(kinds.items()))

    @classmethod
    def _from_toml(cls, path: Path) -> Policy:
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls._of(
                str(found.pop("default", "none")), [(k, str(v)) for k, v in found.pop("layers", {}).items()], found
            )
        except (OSError, tomllib.TOMLDecodeError, AttributeError) as error:
            raise RequestError(
                f'{path}: not a quantization policy ({error}): expected default = "int8" and a table '
                "[layers] of exceptions"
            ) from None

    @classmethod
    def _of(cls, default: str, exceptions: list[tuple[str, str]], unknown=()) -> Policy:
        if unknown:
            raise RequestError(f"a quantization policy has default and [layers], not {', '.join(unknown)}")
        kind = parse_kind(default)
        rules: list[tuple[str, Kind | None]] = [("*", kind)]
        if kind is not None and kind.bits == 4:  # embedding and head in int4 cost more quality than they save bytes
            rules += [("embed", Kind(8)), ("lm_head", Kind(8))]
        return cls((*rules, *((pattern, parse_kind(text)) for pattern, text in exceptions)))

    def __bool__(self) -> bool:
        return any(kind is not None for _, kind in self.rules)

    def resolve_layers(self, layers: int) -> Policy:
        """The same policy with layers counted from the end (`layers.-1.*`) replaced by their index."""

        def from_start(pattern: str) -> str:
            return re.sub(r"^layers\.-(\d+)(?=\.|$)", lambda found: f"layers.{layers - int(found.group(1))}", pattern)

        return Policy(tuple((from_start(pattern), kind) for pattern, kind in self.rules))

    def kind(self, name: str) -> Kind | None:
        """The kind of a parameter by its name, such as `layers.3.q_proj`; None: it stays as it is."""
        if name.rpartition(".")[2] not in MATRICES:
            return None
        return next((kind for pattern, kind in reversed(self.rules) if fnmatchcase(name, pattern)), None)

    def resolve_stored(self, stored: Callable[[str], Kind | None], names: list[str]) -> Policy:
        """The same policy with `stored` replaced, name by name, by the kind that the file holds (None: floats)."""
        matrices = dict.fromkeys(("embed", "lm_head", *names))
        asked = [n for n in matrices if self.kind(n) == STORED]
        rules = [(pattern, None if kind == STORED else kind) for pattern, kind in self.rules]
        return Policy((*rules, *((n, stored(n)) for n in asked)))

    def check(self, names: list[str]) -> None:
        """Raise RequestError for a pattern that matches no matrix. Norms and biases may be named with `none`."""
        matrices = [n for n in names if n.rpartition(".")[2] in MATRICES]
        for pattern, kind in self.rules:
            fits = (*matrices, "embed", "lm_head", *(names if kind is None else ()))
            if not any(fnmatchcase(n, pattern) for n in fits):
                raise RequestError(
                    f"the quantization policy's {pattern!r} names no layer; there are {matrices[0]}, "
                    f"{matrices[1]}, ..., {matrices[-1]}"
                )


def name_of(path: tuple) -> str:
    """The name of a leaf at a path of the parameter tree, such as `layers.3.q_proj`."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)


def is_parameter(x) -> bool:
    """Whether `x` is a whole parameter: the `is_leaf` of trees with declarations and quantized arrays."""
    return is_spec(x) or isinstance(x, QuantArray)


def _with_head(params: dict, policy: Policy) -> dict:
    """A copy in which a tied head with another kind than the embedding is a parameter of its own."""
    apart = "lm_head" not in params and policy.kind("lm_head") != policy.kind("embed")
    return params | ({"lm_head": params["embed"]} if apart else {})


def quantized_specs(specs: dict, policy: Policy) -> dict:
    """The parameters' declarations, in which matrices that the policy names are QuantArrays of declarations.

    A tied head with another kind than the embedding becomes a parameter of its own.

    Raises:
      RequestError: a pattern that names no layer, a group size that does not divide a matrix, a `stored` that no file
        has resolved.
    """
    policy = policy.resolve_layers(len(specs["layers"]))
    if any(kind == STORED for _, kind in policy.rules):
        raise RequestError("`stored` is what a file holds: ask for it as the model is loaded")
    leaves, tree = jax.tree_util.tree_flatten_with_path(_with_head(specs, policy), is_leaf=is_spec)
    policy.check([name_of(path) for path, _ in leaves])
    return jax.tree.unflatten(tree, [_declared(name_of(path), spec, policy) for path, spec in leaves])


def _declared(name: str, spec: ArraySpec, policy: Policy) -> ArraySpec | QuantArray:
    kind = policy.kind(name)
    if kind is None:
        return spec
    columns = spec.shape[1]
    group = kind.group_for(columns)
    if group is not None and columns % group:
        fits = [g for g in GROUPS if columns % g == 0]
        raise RequestError(
            f"{name}: groups of {group} do not divide rows of {columns}; "
            f"{' or '.join(map(str, fits)) or 'none of 32, 64 and 128'} would"
        )
    values, scales = cast(tuple[Any, Any], _part_specs(spec, columns // (group or columns), kind.bits))
    return QuantArray(values, scales, None if kind.symmetric else scales, kind.activations, str(jnp.dtype(spec.dtype)))


def _part_specs(spec: ArraySpec, groups: int, bits: int) -> tuple[ArraySpec, ArraySpec]:
    """Declare the values, and the scales or offsets, of a matrix that `spec` declares. It shards by whole groups of
    columns, with their scales."""
    rows, columns = spec.units or spec.shape
    pieces = math.gcd(columns, groups) if groups > 1 else columns
    scales = ArraySpec(
        (groups, spec.shape[0]),
        (spec.axes[1] if groups > 1 else None, spec.axes[0]),
        jnp.float32,
        units=(min(pieces, groups), rows),
    )
    return replace(spec, dtype=DTYPES[bits], units=(rows, pieces)), scales


def declared_parts(w: QuantArray, spec: ArraySpec) -> QuantArray:
    """The declarations of the parts of `w`, a matrix that `spec` declares."""
    values, scales = (cast(Any, x) for x in _part_specs(spec, w.groups, w.bits))
    return replace(w, values=values, scales=scales, offsets=None if w.offsets is None else scales)


def _parts(w: QuantArray, spec: ArraySpec, mesh: Mesh) -> QuantArray:
    """The placement of the parts of `w` on `mesh`."""
    return jax.tree.map(lambda x: x.partition(mesh), declared_parts(w, spec), is_leaf=is_spec)


@partial(jax.jit, static_argnames=("kind", "dtype"))
def quantized(w: Float[Array, "out in"], kind: Kind, dtype: str) -> QuantArray:
    """Quantize a matrix as `kind` says; the result counts as an array of `dtype`."""
    return quantize(w.astype(dtype), kind.bits, kind.group_for(w.shape[1]), kind.symmetric, kind.activations)


def check_policy(params: dict, policy: str | Path | Policy) -> tuple[dict, dict[str, Kind]]:
    """The parameters, with a separate head if its kind differs from a tied embedding's, and the kinds of those that the
    policy names. Raises RequestError as `quantized_specs`, before anything is computed."""
    policy = Policy.parse(policy).resolve_layers(len(params["layers"]))
    params = _with_head(params, policy)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_parameter)
    if done := [name_of(path) for path, x in leaves if isinstance(x, QuantArray)]:
        raise RequestError(f"{done[0]} is quantized already: load the model without quantization first")
    quantized_specs(jax.tree.map(lambda x: ArraySpec(x.shape, (None,) * x.ndim, x.dtype), params), policy)
    kinds = {name_of(path): policy.kind(name_of(path)) for path, _ in leaves}
    return params, {name: kind for name, kind in kinds.items() if kind is not None}


def quantize_params(params: dict, policy: str | Path | Policy) -> dict:
    """Round the matrices that the policy names to nearest. Raises RequestError for a policy that does not fit the
    parameters, and for parameters that are already quantized."""
    return rounded(*check_policy(params, policy))


def rounded(params: dict, kinds: Mapping[str, Kind]) -> dict:
    """Round the parameters in `kinds` that are not yet quantized to nearest."""

    def one(path, x):
        kind = kinds.get(name_of(path))
        return x if kind is None or isinstance(x, QuantArray) else quantized(x, kind, str(x.dtype))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_parameter)


def matmul(
    x: Float[Array, "*b in"], w: QuantArray, dtype=None, spec: ArraySpec | None = None, mesh: Devices = ANY_DEVICES
) -> Float[Array, "*b out"]:
    """x @ w.T in `dtype` (None: that of x).

    On a mesh each device multiplies its own part of the matrix, which `spec` declares. If the columns are sharded, one
    sum over the devices follows. On several devices XLA computes the products.
    """
    product = partial(quantized_matmul, out_dtype=dtype, implementation="auto" if on_one_device(mesh) else "xla")
    if not on_several_devices(mesh) or spec is None:
        return product(x, w)
    parts = _parts(w, spec, mesh)
    rows, columns = parts.values
    if columns is not None and w.activations == "int8":
        return product(
            x, w
        )  # a row of activations has one scale, which a device cannot compute from its part of the row

    def each(x, w):
        y = product(x, w)
        return y if columns is None else lax.psum(y, columns)

    inner = (mesh_axis("batch", x.shape[0], mesh), *[None] * (x.ndim - 2))
    given, out = PartitionSpec(*inner, columns), PartitionSpec(*inner, rows)
    return jax.shard_map(each, mesh=mesh, in_specs=(given, parts), out_specs=out, check_vma=False)(x, w)


def lookup(table: QuantArray, tokens: Int[Array, "B T"], spec: ArraySpec, mesh: Devices) -> Float[Array, "B T D"]:
    """Rows of an embedding, dequantized. On a mesh each device looks up its own rows, and one sum follows."""
    if not on_several_devices(mesh):
        return take_rows(table, tokens)
    parts = _parts(table, spec, mesh)
    axis: Any = parts.values[0]
    if axis is None:
        return take_rows(table, tokens)

    def each(tokens, table):
        own = jnp.clip(tokens, 0, spec.shape[0] - 1) - lax.axis_index(axis) * table.shape[0]
        held = (own >= 0) & (own < table.shape[0])
        return lax.psum(jnp.where(held[..., None], take_rows(table, own), 0), axis)

    rows = PartitionSpec(mesh_axis("batch", tokens.shape[0], mesh))
    return jax.shard_map(each, mesh=mesh, in_specs=(rows, parts), out_specs=rows, check_vma=False)(tokens, table)
