"""Loading a model: reading, checking and placing its parameters on the device, a few tensors at a time."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels import QuantArray
from pdx.arguments import integer
from pdx.config import ModelConfig
from pdx.errors import ContextLengthError, ModelNotFoundError, RequestError
from pdx.families.common import QuantizedFile, Source, TensorFile
from pdx.meshes import as_mesh, on_own_mesh
from pdx.model import Params, param_specs
from pdx.quant import STORED, Kind, Policy, is_parameter, name_of, quantized, quantized_specs
from pdx.sharding import is_spec, replicated
from pdx.weights.arrays import aligned_empty
from pdx.weights.builtin import DEFAULT_MODEL
from pdx.weights.checkpoint import CheckpointFile
from pdx.weights.loaded import Model
from pdx.weights.opening import OpenModel, check_names, check_shape, open_model, read_stored, read_tensor
from pdx.weights.progress import Report
from pdx.weights.resolve import resolve

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# Tensors that are read at once: enough for all cores, few enough that memory stays near one copy of the parameters.
THREADS = 4
VALUES_PER_PIECE = 1 << 22  # of a matrix that is quantized in pieces


@on_own_mesh
def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    dtype: Any = "auto",
    mesh: Mesh | str | Mapping[str, int] | None = None,
    max_context: int | None = None,
    quantize: str | Path | Policy | None = None,
    progress: Report | None = None,
) -> Model:
    """Load a model, fetching it first if necessary.

    Args:
      model: a name (see `pdx models`), a path, or a hub id; see `pdx.weights.resolve`.
      dtype: type of matrices, embeddings and biases: `auto` (see `default_dtype`), `f32`, `bf16` or a jax type.
      mesh: the devices to shard the parameters over: a mesh (see `pdx.meshes.as_mesh`), a text such as
        `data=2,model=4`, sizes such as `{"model": 4}`, or None for the default device.
      max_context: a shorter context than the model's own, in tokens.
      quantize: which matrices are quantized to int8 or int4 while they are read, see `pdx.quant`; None: only those that
        a checkpoint stores quantized.
      progress: called during the download and as parameters are placed; None draws a bar for the download only.

    Raises:
      ModelNotFoundError, DownloadError: the model cannot be found or fetched.
      ModelFileError: a file is corrupted or incomplete, or holds tensors of a wrong shape, NaN or infinite values.
      UnsupportedModelError: pdx does not have the model's architecture, or one of its features.
      ContextLengthError: `max_context` is longer than the model's own context.
      ValueError: an unknown dtype or an invalid mesh.

    Example:
      >>> model = pdx.load("smollm2-135m-instruct", quantize="int8")  # doctest: +SKIP
      >>> model.config.num_layers  # doctest: +SKIP
      30
    """
    if not isinstance(model, str | Path):
        raise ModelNotFoundError(f"model is {model!r}: it must be a name (see `pdx models`), a path or a hub id")
    max_context = None if max_context is None else integer("max_context", max_context)
    mesh = as_mesh(mesh)
    where = mesh if mesh is not None else next(iter(jax.device_put(np.float32(0)).devices()))
    dtype = _dtype(dtype, where.devices.flat[0] if isinstance(where, Mesh) else where)
    files = resolve(model, progress)
    opened = open_model(files)
    cfg = opened.config
    if max_context is not None:
        if not 1 <= max_context <= cfg.max_context:
            raise ContextLengthError(f"max_context {max_context}: this model's context is 1 to {cfg.max_context}")
        cfg = dataclasses.replace(cfg, max_context=max_context)
    specs, policy = _declare(opened, cfg, dtype, Policy.parse(quantize).resolve_layers(cfg.num_layers))
    params = _read_params(opened, specs, policy, where, progress)
    notes = [*opened.terms, *opened.notes, *opened.sampling.notes]
    if mesh is not None:
        notes += replicated(jax.tree.leaves(specs, is_leaf=is_spec), mesh)
    return Model(
        params,
        cfg,
        files.name,
        files.path,
        jnp.dtype(dtype),
        mesh,
        notes,
        opened.license,
        opened.terms,
        opened.make_tokenizer,
        opened.sampling.settings,
    )


def _declare(opened: OpenModel, cfg: ModelConfig, dtype: Any, policy: Policy) -> tuple[Params, Policy]:
    """The declarations of the parameters to load, and the policy with `stored` resolved from the file."""
    specs, file = param_specs(cfg, dtype), opened.file
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]]
    sources = {name_of(path): _source(opened, path).name for path in paths}
    sources.setdefault("lm_head", _source(opened, ("lm_head",)).name)
    known = file.names() if isinstance(file, QuantizedFile) else ()
    held = {name: _stored_kind(file, source) if source in known else None for name, source in sources.items()}
    if isinstance(file, CheckpointFile) and any(held.values()):
        # A quantized checkpoint has no floats to quantize again. A separately stored output head stays separate.
        policy = policy or Policy.parse("stored")
        if again := [n for n, kind in held.items() if kind and policy.kind(n) != STORED]:
            raise RequestError(
                f"{file.path}: {again[0]} is quantized already: load the checkpoint without "
                "quantization, or quantize the original model"
            )
        if sources["lm_head"] != sources["embed"]:
            specs["lm_head"] = specs.get("lm_head", specs["embed"])
    policy = policy.resolve_stored(held.get, list(held))
    return (quantized_specs(specs, policy) if policy else specs), policy


def _stored_kind(file: TensorFile, source: str) -> Kind | None:
    return file.stored_kind(source) if isinstance(file, QuantizedFile) else None


def default_dtype(device: jax.Device) -> Any:
    """f32 on the CPU and on GPUs older than Ampere, which have no bf16; bf16 elsewhere."""
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    old = capability is not None and float(capability) < 8
    return jnp.float32 if device.platform == "cpu" or old else jnp.bfloat16


def _dtype(dtype: Any, device: jax.Device) -> Any:
    if isinstance(dtype, str) and dtype == "auto":
        return default_dtype(device)
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    with suppress(TypeError):
        if jnp.dtype(dtype) in map(jnp.dtype, DTYPES.values()):
            return jnp.dtype(dtype)
    raise RequestError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")


def _read_params(
    opened: OpenModel, specs: Params, policy: Policy, where: Mesh | jax.Device, progress: Report | None
) -> Params:
    """All parameters, checked and placed on a mesh or a device."""
    paths, tree = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_parameter)
    jobs = [(_source(opened, path), spec, policy.kind(name_of(path))) for path, spec in paths]
    check_names(opened, {source.name for source, _, _ in jobs})
    for source, spec, _ in jobs:  # before any is read, so that a wrong shape allocates no memory
        check_shape(opened.file, source, tuple(spec.shape))
    sizes = [sum(x.size_bytes for x in jax.tree.leaves(spec, is_leaf=is_spec)) for _, spec, _ in jobs]
    total, done, lock = sum(sizes), 0, threading.Lock()

    def load_one(i: int) -> Any:
        nonlocal done
        source, spec, kind = jobs[i]
        # Like the arrays that a caller makes, these are not committed to the device. A step that is given both kinds
        # would return a committed cache, and the next call would recompile.
        with jax.default_device(where.devices.flat[0] if isinstance(where, Mesh) else where):
            array: Any
            if kind is None:
                array = read_tensor(opened.file, source, spec.shape, spec.dtype)
            elif kind.as_stored:
                array = read_stored(cast(QuantizedFile, opened.file), source, spec.shape, spec.dtype)
            else:
                array = _quantized_in_pieces(opened.file, source, spec, kind)
            if not isinstance(where, Mesh):
                array = jax.device_put(array)
        if isinstance(where, Mesh):
            array = jax.tree.map(lambda s, x: jax.device_put(x, s.sharding(where)), spec, array, is_leaf=is_spec)
        jax.block_until_ready(array)  # so that host copies do not accumulate in front of a slow device
        if progress is not None:
            with lock:
                done += sizes[i]
                progress("loading", done, total)
        return array

    # Largest first, so that the threads end at about the same time.
    order = sorted(range(len(jobs)), key=lambda i: -sizes[i])
    leaves: list[Any] = [None] * len(jobs)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for i, leaf in zip(order, pool.map(load_one, order), strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)


def _quantized_in_pieces(file: TensorFile, source: Source, spec: QuantArray, kind: Kind) -> QuantArray:
    """Read and quantize a matrix some rows at a time, so that the whole matrix is never in memory in float."""
    rows, columns = spec.shape
    count = -(-rows // max(1, VALUES_PER_PIECE // columns))
    # Pieces of equal size if possible, since each size compiles a program.
    count = next((n for n in range(count, min(2 * count, rows)) if rows % n == 0), count)
    size = -(-rows // count)
    whole: Any = None
    for at in range(0, rows, size):
        part = range(at, min(at + size, rows))
        piece = quantized(read_tensor(file, source, spec.shape, spec.dtype, part), kind, str(spec.dtype))
        if len(part) == rows:
            return piece
        # Assembled on the host: the CPU backend uses these arrays without a copy, and no device holds the pieces too.
        whole = whole or jax.tree.map(lambda x: aligned_empty(x.shape, x.dtype), spec, is_leaf=is_spec)
        for name, axis in (("values", 0), ("scales", 1), ("offsets", 1)):
            if (target := getattr(whole, name)) is not None:
                target[(slice(None),) * axis + (slice(part.start, part.stop),)] = np.asarray(getattr(piece, name))
    return whole


def _source(opened: OpenModel, path: tuple) -> Source:
    """The tensor of the parameter at a path of the tree, such as (`embed`,) or (`layers`, 3, `q_proj`)."""
    keys = [getattr(k, "key", getattr(k, "idx", k)) for k in path]
    if keys[0] == "layers":
        return opened.source(keys[2], keys[1])
    source = opened.source(keys[0], None)
    tied = keys[0] == "lm_head" and opened.config.tie_embeddings and source.name not in opened.file.names()
    return opened.source("embed", None) if tied else source
