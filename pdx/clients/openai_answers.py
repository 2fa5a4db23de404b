"""Answers to rows of OpenAI's batch files, in the API's format. Timings and other fields of pdx are under `pdx`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pdx.clients.batch_file import Request
from pdx.generation.completion import Completion, TokenLogprobs, json_logprob
from pdx.tokenizer import Tokenizer


def answer_row(request: Request, done: Completion, fields: Mapping[str, Any], tokenizer: Tokenizer, model: str) -> dict:
    """The output row of a completion. `fields`: see `completion_fields`; `model`: used if the request names none."""
    body = request.row["body"]
    logprobs = done.logprobs
    if request.is_chat:
        choice: dict[str, Any] = {
            "message": {"role": "assistant", "content": done.text, "refusal": None},
            "logprobs": None if logprobs is None else _chat_logprobs(logprobs, tokenizer),
        }
    else:
        choice = {
            "text": done.text,
            "logprobs": None if logprobs is None else _completion_logprobs(logprobs, done.text, tokenizer),
        }
    kind, prefix = ("chat.completion", "chatcmpl") if request.is_chat else ("text_completion", "cmpl")
    return _row(request) | {
        "error": None,
        "response": {
            "status_code": 200,
            "request_id": f"req_{request.line}",
            "body": {
                "id": f"{prefix}-{request.line}",
                "object": kind,
                "created": int(time.time()),
                "model": body.get("model") or model,
                "choices": [choice | {"index": 0, "finish_reason": done.finish_reason}],
                "usage": {
                    "prompt_tokens": done.prompt_tokens,
                    "completion_tokens": done.completion_tokens,
                    "total_tokens": done.prompt_tokens + done.completion_tokens,
                },
                "pdx": {k: v for k, v in fields.items() if k not in ("text", "prompt_tokens", "completion_tokens")},
            },
        },
    }


def error_row(request: Request, error: Exception) -> dict[str, Any]:
    """The output row of a request that could not be served."""
    described = {"code": type(error).__name__, "message": str(error), "line": request.line}
    return _row(request) | {"response": None, "error": described}


def _row(request: Request) -> dict[str, Any]:
    return {"id": f"batch_req_{request.line}", "custom_id": request.row.get("custom_id")}


def _chat_logprobs(logprobs: list[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """One entry per generated token, including an end token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        # `token` cannot show part of a character, `bytes` can.
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": json_logprob(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [entry(t.token_id, t.logprob) | {"top_logprobs": [entry(*pair) for pair in t.top]} for t in logprobs]
    return {"content": content, "refusal": None}


def _completion_logprobs(logprobs: list[TokenLogprobs], text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Four lists with one entry per generated token. Offsets are characters from the start of the answer."""
    decoder, read, offsets, best = tokenizer.stream(), 0, [], []
    for t in logprobs:
        offsets.append(min(read, len(text)))  # a stop string cuts the text before its tokens
        read += len(decoder.push(t.token_id))
        # If two tokens have the same text, the better one keeps it as its name. The chosen token is always included.
        named: dict[str, float] = {}
        for token_id, logprob in dict([*t.top, (t.token_id, t.logprob)]).items():
            name = _name(token_id, tokenizer)
            named[f"token_id:{token_id}" if name in named else name] = json_logprob(logprob)
        best.append(named)
    return {
        "tokens": [_name(t.token_id, tokenizer) for t in logprobs],
        "token_logprobs": [json_logprob(t.logprob) for t in logprobs],
        "top_logprobs": best,
        "text_offset": offsets,
    }


def _name(token_id: int, tokenizer: Tokenizer) -> str:
    """The text of a token; for a part of a character its bytes, in the API's notation."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
