"""From prompts to completions, offline.

`prompts` checks and tokenizes requests, `generator` runs them in batches with programs that `programs` compiled once,
`completion` collects a request's tokens until it ends, `offline` is the public loop, and `results` prints.
"""

from pdx.generation.offline import generate, stream

__all__ = ["generate", "stream"]
