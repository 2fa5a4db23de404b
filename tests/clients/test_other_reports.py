"""Reports on other systems that belong to no other file here: each is what others got wrong, in a few lines."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pdx.clients import batch_job
from pdx.errors import RequestError
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState, sample

TEMPERATURES = (1e-3, 1e-4, 1e-5, 1e-10, 1e-30, 1e-38, 1e-45, 1e-310)


@pytest.mark.parametrize("filters", [{}, {"top_p": 1e-4}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30, 3e37])
def test_a_temperature_near_zero_takes_the_best_token(scale, filters):
    # vLLM 3063: between 1e-4 and 1e-5 every token came out as <s>, since logits became infinite.
    logits = np.random.default_rng(0).uniform(-1, 1, (len(TEMPERATURES), 300))
    logits[:, 17], logits[:, 18] = 1.5, -np.inf
    options = [SamplingOptions(temperature=t, seed=i, **filters) for i, t in enumerate(TEMPERATURES)]
    state = SamplingState.create(options, logits.shape[1])
    out = sample(jnp.asarray(logits * scale, jnp.float32), state, jnp.arange(len(options)), mark_broken=True)
    assert out.tokens.tolist() == [17] * len(options)


def rows(path, data: bytes):
    path.write_bytes(data)
    return batch_job.read(path, SamplingOptions())


def test_lines_of_a_batch_that_are_json_and_no_request_fail_alone(tmp_path):
    # headroom 2316, litellm 37457: one such line ended the whole file.
    good = b'{"prompt": "a"}\n'
    openai = b'{"custom_id": "%d", "method": "POST", "url": "/v1/chat/completions", "body": %s}\n'
    odd = [b"[1, 2]\n", b"null\n", b'"x"\n', b"5\n"]
    odd += [openai % (i, body) for i, body in enumerate((b'"x"', b"null", b"[]", b'{"messages": "hi"}'))]
    first, *failed, last = rows(tmp_path / "in.jsonl", good + b"".join(odd) + good)
    assert (first.prompt, last.prompt, len(failed)) == ("a", "a", len(odd))
    assert all(isinstance(request.error, RequestError) for request in failed)


def test_a_byte_order_mark_blank_lines_and_any_line_end_are_no_rows(tmp_path):
    # grok2api 759, sqlite-utils 376: the first record was lost, or a blank line refused.
    found = rows(tmp_path / "in.jsonl", b'\xef\xbb\xbf\r\n{"prompt": "a"}\r\n  \n\n{"prompt": "b"}')
    assert [(request.line, request.prompt) for request in found] == [(2, "a"), (5, "b")]
