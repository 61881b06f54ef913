"""Pins the arithmetic of docs/internals/numerics.md: logits of fixed models over several spans have these bits on every
machine. An intended change raises NUMERICS_VERSION (core/limits.py), so that clusters do not mix both."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from llamaclust.model.loader import Model
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import LIMITS, Chain
from support.paths import DATA

TOKENS = (np.arange(700) * 37 % 311).tolist()
CHECKSUMS = {
    "tiny/llama": "2456842f",
    "tiny/llama3-rope": "10810890",
    "tiny/qwen2": "a4c2b964",
    "quant/BF16": "bb4eeab6",
    "quant/Q4_0": "56814d72",
    "quant/Q4_K_M": "be0b537d",
    "quant/Q5_0": "73b966d6",
    "quant/Q6_K": "ac16d3e2",
    "quant/Q8_0": "45c2cca0",
    "quant/mixed": "221e5282",
    "quant/mixed-experts": "5c8a340f",
}
KV_CHECKSUMS = {
    ("tiny/llama", "q8_0"): "c8f7ab16",
    ("quant/Q4_K_M", "q8_0"): "e1c9a92b",
    ("tiny/llama", "int8"): "c1a39ffa",
    ("quant/Q4_K_M", "int8"): "bf8674cf",
}


def checksum(name: str, kv_type: str) -> str:
    with Model.open(DATA / f"{name}.gguf") as model:
        chain = Chain(all_threads(2), model, limits=replace(LIMITS, kv_type=kv_type))
        found = chain.logits(TOKENS, 100)
        chain.close()
    assert np.isfinite(found).all()
    return f"{zlib.crc32(found.astype('<f4').tobytes()):08x}"


@pytest.mark.parametrize("name", CHECKSUMS)
def test_logits_are_these_bits(name: str) -> None:
    assert checksum(name, "f16") == CHECKSUMS[name]


@pytest.mark.parametrize(("name", "kv_type"), KV_CHECKSUMS)
def test_logits_with_keys_and_values_in_bytes_are_these_bits(name: str, kv_type: str) -> None:
    assert checksum(name, kv_type) == KV_CHECKSUMS[name, kv_type]
