"""Compares token ids of random texts of Unicode, spaces, emoji, digits and code with llama.cpp's, recorded as CRC-32
sums of 400 texts by `python tests/support/random_texts.py` and a `llama_tokenize` program. A sum of 0 marks a
difference from llama.cpp: see docs/models.md."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.paths import DATA
from support.random_texts import random_texts

DATA_FOLDER = DATA / "tokenizers"
RECORDED = json.loads((DATA_FOLDER / "random-ids.json").read_text())


def check(name: str, model: Path) -> None:
    texts = list(random_texts(RECORDED["seed"], 400))
    assert zlib.crc32("\n".join(texts).encode()) == RECORDED["texts"], "this Python draws other texts"
    tokenizer = load_tokenizer(open_model(model).metadata)
    sums = [zlib.crc32(" ".join(map(str, tokenizer.encode(text))).encode()) for text in texts]
    wrong = [
        number for number, (one, said) in enumerate(zip(sums, RECORDED[name], strict=True)) if said not in (0, one)
    ]
    assert wrong == [], ascii(texts[wrong[0]])


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "llama-spm"])
def test_vocabularies(name: str) -> None:
    check(name, DATA_FOLDER / f"ggml-vocab-{name}.gguf")


@pytest.mark.model
def test_the_demo_model(demo_model: Path) -> None:
    check("smollm2", demo_model)
