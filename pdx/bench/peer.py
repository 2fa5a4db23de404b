"""Other programs that `pdx bench` times on the same model file: transformers (the extra `parity`) and llama.cpp (if
llama-cpp-python is installed)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pdx.bench.timing import Timing


class Transformers:
    """A model in transformers, in f32 on the CPU. `path`: a .gguf file or a Hugging Face directory."""

    def __init__(self, path: Path):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        self.torch = torch
        where = {"gguf_file": path.name, "pretrained_model_name_or_path": path.parent}
        if path.suffix != ".gguf":
            where = {"pretrained_model_name_or_path": path}
        self.model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()

    def prefill(self, tokens: int, batch: int = 1) -> Callable[[], Timing]:
        """A timed function: prefill of one prompt, with logits of its last token only."""
        ids = self._ids(batch, tokens)

        def work() -> Timing:
            with self.torch.inference_mode():
                start = time.perf_counter()
                self.model(ids, use_cache=True, logits_to_keep=1)
                return Timing((time.perf_counter() - start,))

        return work

    def decode(self, batch: int, context: int, tokens: int) -> Callable[[], Timing]:
        """A timed function: greedy steps after a prompt of `context` tokens; seconds per step."""
        ids = self._ids(batch, context)

        def work() -> Timing:
            with self.torch.inference_mode():
                out = self.model(ids, use_cache=True, logits_to_keep=1)
                start = time.perf_counter()
                for _ in range(tokens):
                    out = self.model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
                return Timing((time.perf_counter() - start,)).per(tokens)

        return work

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], batch: int) -> Callable[[], Timing]:
        """A timed function: greedy answers of these lengths in static batches, with prompts padded on the left. A batch
        runs until its longest answer is finished. Seconds of all batches."""
        groups = []
        for at in range(0, len(prompts), batch):
            part = prompts[at : at + batch]
            width = max(map(len, part))
            ids = self.torch.tensor([[0] * (width - len(p)) + list(p) for p in part])
            mask = self.torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            longest = max(lengths[at : at + batch])
            groups.append(
                {"input_ids": ids, "attention_mask": mask, "max_new_tokens": longest, "min_new_tokens": longest}
            )

        def work() -> Timing:
            with self.torch.inference_mode():
                start = time.perf_counter()
                for group in groups:
                    self.model.generate(**group, do_sample=False, pad_token_id=0)
                return Timing((time.perf_counter() - start,))

        return work

    def _ids(self, batch: int, tokens: int):
        return self.torch.arange(batch * tokens).reshape(batch, tokens) % 1000 + 100


def transformers_or_reason(path: Path) -> tuple[Transformers | None, str]:
    """(the model in transformers, ""), or (None, a sentence that says why it cannot run)."""
    try:
        return Transformers(path), ""
    except ImportError as error:
        return None, f"transformers did not run: {error} (pip install 'pdx-inference[parity]')"
    except (OSError, ValueError) as error:
        return None, f"transformers did not load {path}: {error}"


class LlamaCpp:
    """A GGUF file in llama.cpp, quantized as in the file, on all cores."""

    def __init__(self, path: Path):
        import llama_cpp

        cores = os.cpu_count() or 1
        self.version = llama_cpp.__version__
        self.model = llama_cpp.Llama(
            str(path), n_ctx=2048, n_batch=512, n_threads=cores, n_threads_batch=cores, n_gpu_layers=0, verbose=False
        )

    def prefill(self, tokens: int) -> Callable[[], Timing]:
        """A timed function: prefill of one prompt."""
        ids = [i % 1000 + 100 for i in range(tokens)]

        def work() -> Timing:
            self.model.reset()
            start = time.perf_counter()
            self.model.eval(ids)
            return Timing((time.perf_counter() - start,))

        return work

    def decode(self, context: int, tokens: int) -> Callable[[], Timing]:
        """A timed function: greedy steps after a prompt of `context` tokens; seconds per step."""
        prompt = self.prefill(context)

        def work() -> Timing:
            prompt()
            token = 100
            start = time.perf_counter()
            for _ in range(tokens):
                self.model.eval([token])
                token = self.model.sample(temp=0.0)
            return Timing((time.perf_counter() - start,)).per(tokens)

        return work


def llama_cpp_or_reason(path: Path) -> tuple[LlamaCpp | None, str]:
    """As `transformers_or_reason`."""
    if path.suffix != ".gguf":
        return None, f"llama.cpp did not run: it reads .gguf files, not {path}"
    try:
        return LlamaCpp(path), ""
    except ImportError as error:
        return None, f"llama.cpp did not run: {error} (pip install llama-cpp-python, which builds it)"
    except (OSError, ValueError) as error:
        return None, f"llama.cpp did not load {path}: {error}"
