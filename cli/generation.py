"""`generate`: one completion on standard output, as text or as one JSON object."""

from __future__ import annotations

import json
import sys

from llamaclust.cli import given_text, terminal
from llamaclust.cli.connect import Target
from llamaclust.cluster.client.types import Options
from llamaclust.cluster.text.answer import Answer
from llamaclust.core.errors import UsageError


def given_or_piped(prompt: str | None) -> str:
    """The prompt, or standard input without its last line break. UsageError where there is neither."""
    if prompt is not None and prompt != "-":
        return given_text.argument(prompt)
    if prompt is None and sys.stdin.isatty():
        raise UsageError('no prompt: give one, as in llamaclust generate "Once upon a time", or pipe it in')
    return given_text.piped().removesuffix("\n").removesuffix("\r")


def print_stream(target: Target, prompt: str, options: Options) -> None:
    """Prints the text as it comes, and a line break where it does not end with one."""
    last = "\n"
    with target.open() as client, client.generate(prompt, stream=True, **options) as chunks:
        for chunk in chunks:
            last = chunk.text or last
            terminal.write(chunk.text)
    print(end="" if last.endswith("\n") else "\n")


def print_json(target: Target, prompt: str, options: Options) -> None:
    with target.open() as client:
        print(json.dumps(reply_json(client.generate(prompt, **options))))


def reply_json(reply: Answer) -> dict[str, object]:
    """Logprobs with nine significant digits, from which float32 is read back exactly."""
    timings = reply.timings
    return {
        "text": reply.text,
        "token_ids": reply.token_ids,
        "logprobs": [float(f"{logprob:.9g}") for logprob in reply.logprobs],
        "prompt_token_ids": reply.prompt_token_ids,
        "finish_reason": reply.finish_reason,
        "seed": reply.seed,
        "timings": {
            "ttft_ms": round(timings.ttft_ms, 3),
            "prefill_tok_s": round(timings.prefill_tok_s, 3),
            "decode_tok_s": round(timings.decode_tok_s, 3),
        },
    }
