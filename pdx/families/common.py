"""What the families share: the type `Family`, the usual tensor names, and the usual configuration fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from pdx.config import MOST_HEAD_DIM, ModelConfig
from pdx.errors import ModelFileError
from pdx.families.fields import REFUSED, Fields
from pdx.families.rope import rope_from_gguf

if TYPE_CHECKING:  # listing models imports no jax
    from pallas_kernels import QuantArray
    from pdx.quant import Kind

# Parameter leaf (as in `pdx.model.param_specs`) -> tensor name; `{i}` is the layer.
HF_NAMES: dict[str, str] = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "attn_norm": "model.layers.{i}.input_layernorm.weight",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    **{f"{x}_proj": f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"{x}_bias": f"model.layers.{{i}}.self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"{x}_norm": f"model.layers.{{i}}.self_attn.{x}_norm.weight" for x in "qk"},
    **{f"{x}_proj": f"model.layers.{{i}}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"{x}_bias": f"model.layers.{{i}}.mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}
GGUF_NAMES: dict[str, str] = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
    "attn_norm": "blk.{i}.attn_norm.weight",
    "mlp_norm": "blk.{i}.ffn_norm.weight",
    "attn_post_norm": "blk.{i}.post_attention_norm.weight",
    "mlp_post_norm": "blk.{i}.post_ffw_norm.weight",
    **{f"{x}_proj": f"blk.{{i}}.attn_{x}.weight" for x in "qkv"},
    **{f"{x}_bias": f"blk.{{i}}.attn_{x}.bias" for x in "qkv"},
    **{f"{x}_norm": f"blk.{{i}}.attn_{x}_norm.weight" for x in "qk"},
    "o_proj": "blk.{i}.attn_output.weight",
    "o_bias": "blk.{i}.attn_output.bias",
    **{f"{x}_proj": f"blk.{{i}}.ffn_{x}.weight" for x in ("gate", "up", "down")},
    **{f"{x}_bias": f"blk.{{i}}.ffn_{x}.bias" for x in ("gate", "up", "down")},
}


class TensorFile(Protocol):
    """The interface of the file readers in `pdx.weights`. Tensors are read from disk only by `read`."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def path_of(self, name: str) -> str: ...
    def read(self, name: str, dtype: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """A fresh array of the floating type `dtype`; `rows` reorders or selects along the first axis."""
        ...


@runtime_checkable
class QuantizedFile(TensorFile, Protocol):
    """A file with quantized matrices that a `QuantArray` can represent."""

    def stored_kind(self, name: str) -> Kind | None:
        """The kind of a quantized tensor; None if it is not quantized, or a `QuantArray` cannot represent it."""
        ...

    def read_stored(self, name: str, dtype: Any, rows: np.ndarray | None = None) -> QuantArray:
        """A tensor that has a stored kind, on the host, with exactly the file's values and the given `dtype`."""
        ...


@dataclass(frozen=True)
class Source:
    """The tensor that a parameter is read from, and how it is changed."""

    name: str
    rows: np.ndarray | None = None  # for each row of the parameter, its row in the tensor; None: the same rows
    offset: float = 0.0  # added to the values
    stored_rows: int | None = None  # rows of a fused tensor; None: the tensor holds this parameter only


@dataclass(frozen=True)
class Names:
    """How one file format names and stores a family's parameters.

    Leaves that share a tensor name are fused: the tensor holds their rows one after another, in the order of `leaves`.
    """

    leaves: Mapping[str, str]
    minus_one: tuple[str, ...] = ()  # norms whose file stores the factor minus one
    interleaved: tuple[str, ...] = ()  # leaves with rows in the pair order (0, H/2, 1, H/2 + 1, ..)
    prefixes: tuple[str, ...] = ("model.", "")  # what may stand in place of the leading "model."

    def source(self, leaf: str, layer: int | None, cfg: ModelConfig, prefix: str = "model.") -> Source:
        """The tensor of one parameter leaf; `layer` is None outside the layers."""
        name = self.leaves[leaf].format(i=layer)
        if name.startswith("model."):
            name = prefix + name.removeprefix("model.")
        elif leaf == "lm_head" and prefix.endswith(".model."):  # the text model inside a multimodal one
            name = prefix.removesuffix("model.") + name
        rows, fused = None, [other for other, tensor in self.leaves.items() if tensor == self.leaves[leaf]]
        if leaf in self.interleaved:
            rows = halves_from_pairs(cfg.num_heads if leaf.startswith("q") else cfg.num_kv_heads, cfg.head_dim)
        stored_rows = None
        if len(fused) > 1:
            counts = [_row_count(other, cfg) for other in fused]
            at, stored_rows = fused.index(leaf), sum(counts)
            rows = sum(counts[:at]) + (np.arange(counts[at]) if rows is None else rows)
        return Source(name, rows, 1.0 if leaf in self.minus_one else 0.0, stored_rows)

    def find_prefix(self, names: list[str]) -> str:
        """The one of `prefixes` that these tensor names have; the first one if none fits."""
        present = set(names)
        for leaf in ("embed", "final_norm"):  # a tied model may store its embedding under the output head's name
            tail = self.leaves[leaf].removeprefix("model.")
            if found := [p for p in self.prefixes if p + tail in present]:
                return found[0]
        return self.prefixes[0]


@dataclass(frozen=True)
class Family:
    """One architecture: how to recognise its files, and how to read configuration and tensor names of both formats."""

    name: str
    architectures: tuple[str, ...]  # `architectures[0]` of config.json
    model_types: tuple[str, ...]  # `model_type` of config.json, where it lists no architecture
    gguf: tuple[str, ...]  # `general.architecture`
    from_hf: Callable[[Fields], ModelConfig]
    from_gguf: Callable[[Fields, TensorFile], ModelConfig]
    hf_names: Names = Names(HF_NAMES)
    gguf_names: Names = Names(GGUF_NAMES)


def _row_count(leaf: str, cfg: ModelConfig) -> int:
    """Rows of a projection that may be fused with others, or entries of its bias."""
    heads = {"q": cfg.num_heads, "k": cfg.num_kv_heads, "v": cfg.num_kv_heads}
    which = leaf.partition("_")[0]
    return heads[which] * cfg.head_dim if which in heads else {"gate": cfg.d_ff, "up": cfg.d_ff}[which]


def halves_from_pairs(heads: int, head_dim: int) -> np.ndarray:
    """Row indices, [heads * H], that reorder rows stored for interleaved RoPE into pdx's order.

    In GGUF files of Llama, rows 2i and 2i + 1 of queries and keys are rotated together; in pdx, rows i and i + H/2.

    >>> halves_from_pairs(1, 4).tolist()
    [0, 2, 1, 3]
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def hf_shape(f: Fields, defaults: Mapping[str, Any], activation_key: str = "hidden_act") -> dict[str, Any]:
    """The fields of every decoder's config.json, as arguments of `ModelConfig`. `max_context` is before RoPE scaling.

    `defaults` are those of the family's published configuration class, since files may leave out fields that equal
    them. Raises UnsupportedModelError for a value that pdx does not have.
    """
    for key, harmless in REFUSED.items():
        f.only(key, *harmless)
    d_model = f.integer("hidden_size", defaults["hidden_size"])
    heads = f.integer("num_attention_heads", defaults["num_attention_heads"])
    activation = f.get(activation_key, defaults[activation_key])
    names = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if not isinstance(activation, str) or activation not in names:
        raise f.unsupported(activation_key, activation, ", ".join(names))
    kv_default = heads if f.has("num_key_value_heads") else defaults.get("num_key_value_heads") or heads
    return {
        "vocab_size": f.integer("vocab_size", defaults["vocab_size"]),
        "d_model": d_model,
        "num_layers": f.layers("num_hidden_layers", defaults["num_hidden_layers"]),
        "num_heads": heads,
        "num_kv_heads": f.integer("num_key_value_heads", kv_default),
        "head_dim": f.integer("head_dim", defaults.get("head_dim") or d_model // heads, MOST_HEAD_DIM),
        "d_ff": f.integer("intermediate_size", defaults["intermediate_size"]),
        "max_context": f.integer("max_position_embeddings", defaults["max_position_embeddings"]),
        "norm_eps": f.number("rms_norm_eps", 1e-6),
        "activation": names[activation],
        "tie_embeddings": f.flag("tie_word_embeddings", defaults["tie_word_embeddings"]),
    }


def windows_from_types(f: Fields, layers: int, window: int | None, default: Callable[[int], bool]) -> tuple:
    """The window of each layer in tokens (None: the whole context), from `layer_types`.

    `default(layer)` says whether it is a window layer if that field is missing. Raises ModelFileError for a list of
    the wrong length, and for window layers without a `window`.
    """
    types = f.get("layer_types")
    if types is not None and not isinstance(types, list):
        raise f.wrong("layer_types", types, "a list with one entry per layer")
    if types is None:
        types = ["sliding_attention" if default(i) and window else "full_attention" for i in range(layers)]
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise f.unsupported("layer_types", kind, "full_attention and sliding_attention")
    if len(types) != layers:
        raise ModelFileError(f"{f.where}: layer_types has {len(types)} entries, expected num_hidden_layers = {layers}")
    if window is None and "sliding_attention" in types:
        raise ModelFileError(f"{f.where}: layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def gguf_windows(f: Fields, layers: int, is_local: Callable[[int], bool], default: int = 0) -> tuple[int | None, ...]:
    """The window of each layer in tokens (None: the whole context), from `attention.sliding_window` and its pattern.

    The window is a number, or a list with one per layer (0: none); `default` is the family's. The pattern is a list
    with one flag per layer, or a period n: every n-th layer sees the whole context. `is_local` replaces a missing
    pattern. Raises ModelFileError for lists of the wrong length, and for window layers without a window.
    """
    key, pattern = "attention.sliding_window", "attention.sliding_window_pattern"
    sizes, local = f.each_layer(key), f.each_layer(pattern)
    if local is None and f.get(pattern) is not None:
        period = f.integer(pattern)
        local = [(layer + 1) % period != 0 for layer in range(layers)]
    elif local is None:
        local = [True if sizes else is_local(layer) for layer in range(layers)]
    elif any(local) and not f.has(key) and not default:
        raise f.wrong(key, None, f"the window of the layers that {f.prefix}{pattern} names")
    sizes = sizes or [f.integer(key, default, least=0)] * layers
    return tuple(size if size and here else None for size, here in zip(sizes, local, strict=True))


def gguf_shape(f: Fields, file: TensorFile, theta: float = 10_000.0, eps: float | None = None) -> dict[str, Any]:
    """The fields of every decoder's GGUF metadata, as arguments of `ModelConfig`.

    The model has biases, query/key norms and a separate output head if the file has their tensors. `theta` and `eps`
    are the family's RoPE base and norm epsilon, used if the file leaves them out.
    """
    names, layers = set(file.names()), f.layers("block_count")
    for key in ("expert_count", "nextn_predict_layers"):
        f.only(key, 0)
    f.only("attention.causal", True)
    f.only("use_parallel_residual", False)
    for key in ("vocab_size", "tensor_data_layout", "expert_used_count", "pooling_type"):
        f.get(key)
    d_model, heads = f.integer("embedding_length"), f.integer("attention.head_count")
    head_dim = f.integer("attention.key_length", d_model // heads, MOST_HEAD_DIM)
    f.only("attention.value_length", head_dim)
    embed = GGUF_NAMES["embed"]
    if embed not in names:
        raise ModelFileError(f"{f.where}: tensor {embed} is missing, expected [vocabulary, {d_model}]")
    kv_heads, max_context = f.integer("attention.head_count_kv", heads), f.integer("context_length")
    for leaf, count in (("q_proj", heads), ("k_proj", kv_heads)):
        _check_heads(f, file, names, GGUF_NAMES[leaf].format(i=0), [count * head_dim, d_model])
    return {
        "vocab_size": file.shape(embed)[0],
        "d_model": d_model,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "d_ff": f.integer("feed_forward_length"),
        "max_context": max_context,
        "rope": rope_from_gguf(f, head_dim, max_context, _rope_freqs(file, head_dim), theta),
        "norm_eps": f.number("attention.layer_norm_rms_epsilon", eps),
        "tie_embeddings": GGUF_NAMES["lm_head"] not in names,
        "qkv_bias": GGUF_NAMES["q_bias"].format(i=0) in names,
        "o_bias": GGUF_NAMES["o_bias"].format(i=0) in names,
        "mlp_bias": GGUF_NAMES["gate_bias"].format(i=0) in names,
        "qk_norm": GGUF_NAMES["q_norm"].format(i=0) in names,
    }


def _check_heads(f: Fields, file: TensorFile, names: set[str], name: str, expected: list[int]) -> None:
    """Check the number of heads against a tensor's shape, before anything of that size is allocated."""
    if name in names and list(file.shape(name)) != expected:
        raise ModelFileError(
            f"{f.where}: tensor {name} has shape {list(file.shape(name))}, expected {expected} from the configuration"
        )


def _rope_freqs(file: TensorFile, head_dim: int) -> tuple[float, ...] | None:
    """The RoPE divisors [H/2] that GGUF files of Llama 3.1 and later store as a tensor; None if there is none."""
    name = "rope_freqs.weight"
    if name not in file.names():
        return None
    if file.shape(name) != (head_dim // 2,):
        raise ModelFileError(
            f"{file.path_of(name)}: tensor {name} has shape {list(file.shape(name))}, expected [{head_dim // 2}]"
        )
    values = file.read(name, np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ModelFileError(f"{file.path_of(name)}: tensor {name} has values that are not positive and finite")
    return tuple(float(v) for v in values)
