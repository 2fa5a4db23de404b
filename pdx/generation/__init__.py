"""Prompts to completions: what a request is, the offline loop, compiled programs, and what a request ends as."""

from pdx.generation.offline import generate, stream

__all__ = ["generate", "stream"]
