"""The built-in models in transformers: built from their published configurations, filled from the GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from pdx.tokenizer import Tokenizer
from tests.parity import gguf_files

# As the models' own config.json files say; nothing here is read from the GGUF file.
CONFIGS: dict[str, dict] = {
    "smollm2-135m-instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100_000,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "vocab_size": 49152,
    },
    "gemma-3-270m": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "vocab_size": 262144,
    },
}

PROMPTS: dict[str, str] = {
    "prose": "The old lighthouse keeper climbed the stairs one last time. Below him the sea",
    "code": 'def merge_sort(items):\n    """Return the items in order."""\n    if len(items) <= 1:\n',
    "japanese": "昔々、あるところに、おじいさんとおばあさんが住んでいました。ある日、",
    "cyrillic and arabic": "Столица Франции — Париж. عاصمة فرنسا هي",
    "emoji": "Emoji story time 🐢🏁🐇: 🐇 runs fast 💨, 🐢 walks slowly 🚶, and then 🎉",
    "one word": "Photosynthesis",
    "list": "Shopping list:\n1. Eggs\n2. Flour\n3. Butter\n4.",
}
QUESTION = "Why is the sky blue? Answer in two sentences."


def prompt_ids(name: str, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The prompts as token ids: short ones, a chat where the model has a template, and one past Gemma's window."""
    ids = {key: tokenizer.encode(text) for key, text in PROMPTS.items()}
    if tokenizer.has_chat_template:
        ids["chat"] = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    else:
        ids["dialogue"] = tokenizer.encode(f"Question: {QUESTION}\nAnswer:")
    return ids | {"long": tokenizer.encode(topics["execmodel"])[:600]}


def text_windows(tokenizer: Tokenizer, count: int, length: int) -> np.ndarray:
    """A fixed English text as [count, length] tokens, each window behind a BOS where the model has one."""
    text = "\n".join(topics[key] for key in sorted(topics)[:30])
    first = tokenizer.encode("")
    body = tokenizer.encode(text, add_special=False)
    size = length - len(first)
    return np.array([first + body[i * size : (i + 1) * size] for i in range(count)], np.int32)


def load_transformers(name: str, gguf_path: Path, directory: Path):
    """transformers' model in f32 (eager attention) with the file's dequantized weights, and the file's tensor types."""
    import torch
    import transformers

    torch.set_num_threads(1)  # decode is bound by memory: a second thread only waits, and others may want its core
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]))
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    types = gguf_files.load_state(model, gguf_path)
    return model.eval(), types


@dataclass(frozen=True)
class Greedy:
    """What transformers generates behind one prompt: n tokens, and the logits [n, V] each was the best of."""

    tokens: np.ndarray
    logits: np.ndarray

    @property
    def gaps(self) -> np.ndarray:
        """The distance of the best logit to the second at each step."""
        best = np.partition(self.logits, -2, axis=-1)[:, -2:]
        return best[:, 1] - best[:, 0]


def greedy(model, prompt: list[int], n: int) -> Greedy:
    """n greedy tokens by transformers through its KV-cache, end tokens ignored."""
    import torch

    past, fresh, tokens, logits = None, prompt, [], []
    with torch.inference_mode():
        for _ in range(n):
            out = model(torch.tensor([fresh]), past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            logits.append(out.logits[0, -1].numpy())
            tokens.append(int(logits[-1].argmax()))
            fresh = tokens[-1:]
    return Greedy(np.array(tokens), np.stack(logits))


def nats(logits: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Negative log-likelihood [B, T] of each following token; summed in f64: f32 sums of whole vocabularies differ."""
    out = np.empty(following.shape)
    for at in np.ndindex(following.shape):
        x = logits[at]
        top = x.max()
        out[at] = top + np.log(np.exp(x - top).sum(dtype=np.float64)) - x[following[at]]
    return out


def negative_log_likelihood(model, windows: np.ndarray) -> np.ndarray:
    """Nats of each token behind the first, [count, length - 1], by transformers in one pass a window."""
    import torch

    rows = []
    with torch.inference_mode():
        for window in torch.from_numpy(windows.astype(np.int64)):
            logits = model(window[None], use_cache=False).logits[:, :-1]
            rows.append(nats(logits.numpy(), window[None, 1:].numpy()))
    return np.concatenate(rows)
