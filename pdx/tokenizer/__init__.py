"""Text to token ids and back: tokenizers from Hugging Face directories and GGUF metadata, streaming, chat templates."""

from pdx.tokenizer.core import Tokenizer
from pdx.tokenizer.stream import StreamDecoder

__all__ = ["StreamDecoder", "Tokenizer"]
