"""Make the golden values: run the tiny models of `tests/parity/tiny.py` in transformers and keep what it says.

    python -m tests.golden.make_logits [NAME ...]        (from the repository's root; needs the extra `parity`)

Writes logits/NAME.json for each model (the configuration as transformers saves it, the shapes of the checkpoint,
a digest of the seeded weights, the batch) and logits/NAME.npy (f32 logits of transformers: for each row behind its
prompt and behind each later token, rows one after the other). Run it again after a change to the tiny
models; a new version of transformers may move logits in the last bits and nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.golden.weights import digest, make_weights
from tests.parity import tiny

OUT = Path(__file__).parent / "logits"
# The long row decodes past a window (24) and past the ring that holds one (128 slots).
LENGTHS, PROMPTS = (150, 37, 9), (100, 20, 1)


def make(name: str) -> None:
    """Write the two files of one model."""
    import transformers

    with tempfile.TemporaryDirectory() as directory:
        model = tiny.make_model(tiny.PUBLISHED[name], Path(directory))
        config = json.loads((Path(directory) / "config.json").read_text())
    shapes = {key: list(x.shape) for key, x in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    offset_norms = tiny.uses_offset_norms(config)
    tokens = tiny.tokens_of(LENGTHS, config["vocab_size"])
    logits = [row[prompt - 1 :] for row, prompt in zip(tiny.whole_logits(model, tokens, LENGTHS), PROMPTS, strict=True)]
    record = {
        "made_by": f"tests/golden/make_logits.py with transformers {transformers.__version__}",
        "config": config,
        "offset_norms": offset_norms,
        "weights_sha256": digest(make_weights(shapes, offset_norms=offset_norms)),
        "lengths": LENGTHS,
        "prompts": PROMPTS,
        "tokens": [row[:n].tolist() for row, n in zip(tokens, LENGTHS, strict=True)],
        "shapes": dict(sorted(shapes.items())),
    }
    lines = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in record.items())
    (OUT / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")
    np.save(OUT / f"{name}.npy", np.concatenate(logits))


if __name__ == "__main__":
    for chosen in sys.argv[1:] or tiny.PUBLISHED:
        make(chosen)
        print(chosen)
