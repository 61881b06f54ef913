"""`python oracle_answers.py MODEL [NATIVE]` prints a model's answers with all bits as JSON. NATIVE is another build of
the native module. Callers in this process use `answers`."""

from __future__ import annotations

import importlib.util
import json
import random
import struct
import sys
from pathlib import Path

_NATIVE = "llamaclust.kernels._native"
Answer = list[tuple[int, str]]
"""Pairs (token id, the bits of its float32 logprob in hexadecimal)."""

SEED = 31
LONG = 530  # more than a span


def answers(model: Path) -> list[Answer]:
    """Returns a greedy answer, and a seeded one whose context is longer than a span."""
    from llamaclust.cluster.client.local import LocalClient

    source = random.Random(SEED)
    short, long = ([source.randrange(3, 300) for _ in range(length)] for length in (20, LONG))
    with LocalClient(model, 1) as client:
        replies = (
            client.generate(short, max_tokens=12, ignore_eos=True),
            client.generate(long, max_tokens=12, ignore_eos=True, temperature=0.9, top_k=40, top_p=0.95, seed=SEED),
        )
    return [
        [(token, struct.pack(">f", lp).hex()) for token, lp in zip(reply.token_ids, reply.logprobs, strict=True)]
        for reply in replies
    ]


def use_native(path: Path) -> None:
    """Makes `path` the native module of this process; call it before llamaclust.kernels is imported."""
    assert _NATIVE not in sys.modules
    spec = importlib.util.spec_from_file_location(_NATIVE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NATIVE] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        use_native(Path(sys.argv[2]))
    print(json.dumps(answers(Path(sys.argv[1]))))
