"""Whether an engine could serve a request at all. No jax."""

from __future__ import annotations

from pdx.engine.config import EngineConfig
from pdx.engine.memory import PagedMemory
from pdx.engine.request import EngineRequest
from pdx.errors import ContextLengthError, RequestError


def check_fits(request: EngineRequest, config: EngineConfig, memory: PagedMemory, max_context: int) -> None:
    """Raise ContextLengthError or RequestError for a request that an engine could not serve even alone."""
    if not request.prompt:
        raise RequestError("the prompt is empty: give it at least one token")
    if (request.options.logprobs or 0) > config.num_logprobs:
        raise RequestError(
            f"logprobs is {request.options.logprobs}, but this engine reports up to {config.num_logprobs} "
            "alternatives (num_logprobs)"
        )
    total = len(request.prompt) + request.options.max_tokens
    if total > max_context:
        raise ContextLengthError(
            f"the prompt has {len(request.prompt)} tokens and asks for {request.options.max_tokens} more, but a "
            f"request may have {max_context} (max_context)"
        )
    for group, pool in enumerate(memory.pools):
        if (need := memory.demand(group, total)) > pool.pages:
            raise ContextLengthError(
                f"{total} tokens need {need} pages, but there are {pool.pages}: ask for less or give more (pages)"
            )
