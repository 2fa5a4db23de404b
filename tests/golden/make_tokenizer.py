"""Makes `tokenizer_gemma3.json`: what the published tokenizer of Gemma 3 makes of a part of the corpus.

    python -m tests.golden.make_tokenizer DIRECTORY

DIRECTORY holds the `tokenizer.json` and `tokenizer_config.json` that Gemma 3 is published with. The GGUF of
Gemma 3 has no such file, only scores: the test that reads the golden ids shows that the two agree.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.corpus import corpus

GOLDEN = Path(__file__).with_name("tokenizer_gemma3.json")
SPECIAL = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<unused7>", "<table>", "<mask>")


def main(directory: str) -> None:
    from transformers import PreTrainedTokenizerFast

    published = PreTrainedTokenizerFast(tokenizer_file=str(Path(directory) / "tokenizer.json"))
    texts = corpus(2000, seed=3, special=SPECIAL)
    texts = [text for text in texts[:260] + texts[-40:] if len(text) < 160]
    rows = [
        {"text": text, "ids": ids, "decoded": published.decode(ids, skip_special_tokens=True)}
        for text, ids in zip(texts, published(texts)["input_ids"], strict=True)
    ]
    for row in rows:
        if row["decoded"] == row["text"]:
            del row["decoded"]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="ascii")


if __name__ == "__main__":
    main(*sys.argv[1:])
