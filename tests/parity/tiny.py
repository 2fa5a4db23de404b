"""Tiny random models that transformers makes: each family, and each feature that changes its logits.

Configurations are written the way published models write them; transformers reads them, builds the
model, and saves it in the way of its own version. Both ways must load.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.golden.weights import make_weights

# Sequences in the tests are longer than the windows, than the ring that keeps a window (128 slots), and
# than the context that RoPE scalings start from.
WINDOW, ORIGINAL_CONTEXT = 24, 64

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 3e-3,  # large, so that a wrong one shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}
_QWEN2 = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": WINDOW,
    "max_window_layers": 2,
}
_QWEN3 = _COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rope_theta": 1_000_000.0,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
}
_GEMMA3 = _COMMON | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 32,
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}

PUBLISHED: dict[str, dict] = {
    "llama2": _LLAMA | {"num_key_value_heads": 4},
    "llama31": _LLAMA
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
        }
    },
    "llama_linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_bias": _LLAMA | {"attention_bias": True, "mlp_bias": True},
    "smollm2": _LLAMA
    | {
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100_000.0,
    },
    "mistral": _COMMON
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "head_dim": 32,
        "rope_theta": 10_000.0,
        "sliding_window": WINDOW,
        "tie_word_embeddings": False,
    },
    "qwen2": _QWEN2,
    "qwen2_window": _QWEN2 | {"use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": False},
    "qwen3": _QWEN3,
    "qwen3_yarn": _QWEN3
    | {
        "rope_theta": 10_000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT},
    },
    "gemma2": _COMMON
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": WINDOW,
        "rope_theta": 10_000.0,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": _GEMMA3 | {"num_hidden_layers": 6},
    "gemma3_linear": _GEMMA3
    | {"sliding_window_pattern": 2, "rope_theta": 10_000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}


def uses_offset_norms(config: dict) -> bool:
    return config["model_type"].startswith("gemma")


def make_model(config: dict, directory: Path):
    """Build a model in transformers, give it the seeded weights, save it to `directory`, return it (f32, eager).

    `config` is one of `PUBLISHED` or like one; it is kept in `directory`/published.
    """
    import torch
    import transformers

    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    offset_norms, published = uses_offset_norms(config), directory / "published"
    published.mkdir(parents=True)
    (published / "config.json").write_text(json.dumps(config))
    config = transformers.AutoConfig.from_pretrained(published)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    weights = make_weights(shapes, offset_norms=offset_norms)
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.save_pretrained(directory)
    return model


def tokens_of(lengths: tuple[int, ...], vocab: int) -> np.ndarray:
    """Random token ids [B, T], right-padded with 0."""
    random = np.random.Generator(np.random.PCG64(7))
    tokens = random.integers(3, vocab, (len(lengths), max(lengths)), dtype=np.int32)
    return np.where(np.arange(max(lengths))[None] < np.array(lengths)[:, None], tokens, 0)


def whole_logits(model, tokens: np.ndarray, lengths: tuple[int, ...]) -> list[np.ndarray]:
    """transformers' logits [length, V] of each row: the row alone, in one pass, no cache."""
    import torch

    with torch.inference_mode():
        return [
            model(torch.from_numpy(row[None, :n].astype(np.int64)), use_cache=False).logits[0].numpy()
            for row, n in zip(tokens, lengths, strict=True)
        ]


def stepwise_logits(model, tokens: np.ndarray, lengths: tuple[int, ...]) -> list[np.ndarray]:
    """The same through transformers' own KV-cache, one token at a time."""
    import torch

    rows = []
    with torch.inference_mode():
        for row, n in zip(tokens, lengths, strict=True):
            past, steps = None, []
            for token in row[:n]:
                out = model(torch.tensor([[int(token)]]), past_key_values=past, use_cache=True)
                past = out.past_key_values
                steps.append(out.logits[0, 0].numpy())
            rows.append(np.stack(steps))
    return rows
