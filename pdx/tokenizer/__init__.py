"""Text to token ids and back: tokenizers from Hugging Face directories and from GGUF metadata, streaming, chats."""

from pdx.tokenizer.core import Tokenizer
from pdx.tokenizer.stream import StreamDecoder

__all__ = ["StreamDecoder", "Tokenizer"]
