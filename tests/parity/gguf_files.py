"""GGUF and transformers, by llama.cpp's own library: names, layouts and blocks owe nothing to pdx.

`gguf` maps the names; what llama.cpp's converter does to the values is written out here: rows of Llama's
queries and keys are put in pairs, Gemma's norm weights have one added, a RoPE scaling becomes a tensor.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


def architecture(config) -> str:
    """What GGUF calls a transformers configuration's architecture."""
    return ARCHITECTURES.get(config.model_type, config.model_type)


def gguf_names(hf_names, arch: str, layers: int) -> dict[str, str]:
    """Each transformers name to GGUF's. Raises KeyError for one that the architecture does not have."""
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, layers)
    found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in hf_names}
    if unknown := [name for name, there in found.items() if there is None]:
        raise KeyError(f"{arch} has no {unknown}")
    return found


def pair_heads(name: str, config) -> int | None:
    """How many heads lie in a tensor whose rows are in pairs; None where they are as transformers has them."""
    if architecture(config) != "llama":
        return None
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else None


def in_pairs(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + H/2 of each head next to each other."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def in_halves(x: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `in_pairs`."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write(path: Path, model, quantized: gguf.GGMLQuantizationType | None = None) -> None:
    """Write a transformers model as GGUF; with `quantized`, its matrices as that, and it is given their values."""
    import torch

    config, state = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    arch = architecture(config)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    writer = gguf.GGUFWriter(path, arch)
    _write_fields(writer, model)
    for name, there in gguf_names(state, arch, config.num_hidden_layers).items():
        x, kind, heads = state[name], None, pair_heads(name, config)
        if quantized is not None and x.ndim == 2:
            x, kind = gguf.quantize(x, quantized), quantized
            model.get_parameter(name).data.copy_(torch.from_numpy(gguf.dequantize(x, kind)))
        if heads is not None:
            x = in_pairs(x, heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            x = x + np.float32(1)
        writer.add_tensor(there, np.ascontiguousarray(x), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_fields(writer: gguf.GGUFWriter, model) -> None:
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        # What transformers divides each plain frequency by, in the way of Llama 3.1's files.
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        scaled = model.model.rotary_emb.inv_freq.double().numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))


def load_state(model, path: Path) -> dict[str, str]:
    """Give a transformers model the weights of a GGUF file, dequantized to f32; return the types of its tensors.

    Every parameter must be there and every tensor used.
    """
    import torch

    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    config, state, used = model.config, {}, set()
    wanted = [k for k in model.state_dict() if not (k == "lm_head.weight" and config.tie_word_embeddings)]
    for name, there in gguf_names(wanted, architecture(config), config.num_hidden_layers).items():
        x = gguf.dequantize(tensors[there].data, tensors[there].tensor_type)
        if (heads := pair_heads(name, config)) is not None:
            x = in_halves(x, heads)
        if architecture(config).startswith("gemma") and name.endswith("norm.weight"):
            x = x - np.float32(1)
        state[name] = torch.from_numpy(np.array(x, np.float32))
        used.add(there)
    assert used == tensors.keys(), tensors.keys() ^ used
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    return {name: t.tensor_type.name for name, t in tensors.items()}
