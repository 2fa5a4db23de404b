"""Writes families.json beside it: configurations as transformers saves them, and what its modules make of them.

python tests/golden/configs/make.py      (needs the extra `parity`)
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import transformers

transformers.logging.disable_progress_bar()

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
CASES = {
    "llama2": (transformers.LlamaConfig, {}),
    "llama-biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
    "llama3.1": (
        transformers.LlamaConfig,
        {"rope_parameters": LLAMA3, "max_position_embeddings": 8192, "head_dim": 32},
    ),
    "llama-linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    ),
    "smollm2": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
        },
    ),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 8}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 24}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "qwen2-yarn": (transformers.Qwen2Config, {"rope_parameters": YARN, "max_position_embeddings": 8192}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 32, "num_hidden_layers": 7, "sliding_window": 16}),
    "gemma3-linear": (
        transformers.Gemma3TextConfig,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 48,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}


def frequencies(rotary, kind: str | None) -> dict:
    prefix = f"{kind}_" if kind and hasattr(rotary, f"{kind}_inv_freq") else ""
    return {
        "inv_freq": getattr(rotary, f"{prefix}inv_freq").tolist(),
        "attention_factor": float(getattr(rotary, f"{prefix}attention_scaling")),
    }


def case(config_class, arguments: dict) -> dict:
    config = config_class(**{**SHAPE, **arguments})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
    saved.pop("transformers_version")
    layers = []
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        kind = config.layer_types[i] if getattr(config, "layer_types", None) else None
        window = getattr(attention, "sliding_window", None)
        if config.model_type == "mistral":
            window = config.sliding_window
        layers.append({"window": window, "scale": attention.scaling, **frequencies(model.model.rotary_emb, kind)})
    text = model.model
    return {
        "config": saved,
        "layers": layers,
        "head_dim": text.layers[0].self_attn.head_dim,
        "embed_scale": float(getattr(text.embed_tokens, "embed_scale", 8.0 if config.model_type == "gemma2" else 1.0)),
        "tied": model.lm_head.weight is text.embed_tokens.weight,
        "norm_eps": text.norm.eps if hasattr(text.norm, "eps") else text.norm.variance_epsilon,
        "parameters": {name: list(x.shape) for name, x in model.named_parameters()},
    }


if __name__ == "__main__":
    golden = {name: case(*arguments) for name, arguments in CASES.items()}
    out = Path(__file__).with_name("families.json")
    out.write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")
    print(f"{out}: {len(golden)} cases with transformers {transformers.__version__}")
