"""Make the golden tokens of the built-in models: what transformers generates greedily from the same files, in f32.

    python -m tests.golden.make_tokens        (from the repository's root; needs the extra `parity`, fetches the models)

Writes tokens.json: for each model and prompt the prompt's ids, 64 tokens, and the smallest distance between
transformers' two best logits on the way, behind which another implementation could rightly part from it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from pdx.tokenizer import Tokenizer
from pdx.weights.gguf_file import GgufFile
from pdx.weights.resolve import resolve
from tests.parity import real

OUT = Path(__file__).parent / "tokens.json"
TOKENS = 64


def make(name: str) -> dict:
    """The prompts of one model with what transformers makes of them."""
    path = resolve(name).path
    with tempfile.TemporaryDirectory() as directory:
        model, _ = real.load_transformers(name, path, Path(directory))
    prompts = real.prompt_ids(name, Tokenizer.from_gguf(GgufFile(path).metadata))
    found = {}
    for key, ids in prompts.items():
        out = real.greedy(model, ids, TOKENS)
        found[key] = {"prompt": ids, "tokens": out.tokens.tolist(), "smallest_gap": float(f"{out.gaps.min():.2e}")}
    return found


def main() -> None:
    import transformers

    record = {"made_by": f"tests/golden/make_tokens.py with transformers {transformers.__version__}"}
    record |= {name: make(name) for name in real.CONFIGS}
    text = json.dumps(record, indent=1)
    # A list of ids on one line.
    lines = text.replace(",\n    ", ", ").replace("[\n    ", "[").replace("\n   ]", "]")
    OUT.write_text(lines + "\n")


if __name__ == "__main__":
    main()
