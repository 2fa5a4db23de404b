"""A complete model directory of a few kilobytes: config, byte-level tokenizer with a chat template, weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LAYERS, WIDTH, HEADS, KV_HEADS, FF, CONTEXT = 2, 32, 4, 2, 48, 512
SPECIAL = ["<|end|>", "<|start|>"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make(directory: Path, seed: int = 0) -> Path:
    """Write the model and return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", {"eos_token": SPECIAL[0], "chat_template": TEMPLATE})
    _write(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(vocab),
            "hidden_size": WIDTH,
            "intermediate_size": FF,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
            "eos_token_id": 0,
        },
    )
    save_file(_weights(len(vocab), np.random.default_rng(seed)), directory / "model.safetensors")
    return directory


def engine_profile(directory: Path) -> str:
    """A file for `--engine`: steps of at most 16 tokens, so that an engine has two programs to compile."""
    file = directory / "engine.toml"
    file.write_text("token_budget = 16\n", encoding="utf-8")
    return str(file)


def _weights(vocab: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    head = WIDTH // HEADS

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocab, WIDTH), "model.norm.weight": np.ones(WIDTH, np.float32)}
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": matrix(WIDTH, WIDTH),
            "self_attn.k_proj": matrix(KV_HEADS * head, WIDTH),
            "self_attn.v_proj": matrix(KV_HEADS * head, WIDTH),
            "self_attn.o_proj": matrix(WIDTH, WIDTH),
            "mlp.gate_proj": matrix(FF, WIDTH),
            "mlp.up_proj": matrix(FF, WIDTH),
            "mlp.down_proj": matrix(WIDTH, FF),
            "input_layernorm": np.ones(WIDTH, np.float32),
            "post_attention_layernorm": np.ones(WIDTH, np.float32),
        }
        tensors |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    return tensors


def with_window(model):
    """The loaded model with a window on its second layer: an engine has two page groups for it."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, windows=(None, 20)))


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
