"""Logprobs of tokens in replies."""

from __future__ import annotations

from typing import Any

from llamaclust.cluster.front.text.answer import json_logprob
from llamaclust.core.sampling import RowResult
from llamaclust.model.tokenizers.tokenizer import Tokenizer


def row_entry(tokenizer: Tokenizer, row: RowResult) -> dict[str, Any]:
    """A chosen token with the likeliest ones in its place."""
    top = [_token_entry(tokenizer, token, logprob) for token, logprob in row.top_logprobs]
    return {**_token_entry(tokenizer, row.token, row.logprob), "top_logprobs": top}


def _token_entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """As /v1/chat/completions and llama.cpp show it; `id` is llama.cpp's."""
    data = tokenizer.token_bytes(token)
    text = data.decode("utf-8", "replace")
    return {"id": token, "token": text, "logprob": json_logprob(logprob), "bytes": list(data)}
