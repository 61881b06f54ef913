"""Compares every architecture with llama.cpp, on every backend and feature level. Splits and chunks change no bits.

Models are built from a seed (`tiny_architectures`). `data/architectures` has llama.cpp's logits for them, which
`record_architectures` writes.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels._native import available_levels
from llamaclust.kernels.backend import Backend
from llamaclust.model.architectures import ARCHITECTURES
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from support.arithmetic.backends import BACKENDS, all_threads
from support.arithmetic.batches import LIMITS, Chain, batch_of, possible_cuts
from support.arithmetic.disturbed import disturbed, undisturbed
from support.models.tiny_architectures import (
    DECODED_STRIDE,
    DECODED_TOKENS,
    MODELS,
    TOKENS,
    VOCABULARY,
    build_architecture,
)
from support.models.tiny_encoders import ENCODERS
from support.paths import DATA
from support.seed import SEED

DATA_FOLDER = DATA / "architectures"
ALWAYS = ("reference", f"cpu-{available_levels()[-1]}")
SINGLES = (1, 1, 6, 1, 1, 7, 1, 6)
"""Chunk sizes of TOKENS: single tokens at the start, after other chunks, and beyond windows."""
BOUND = 1e-5
BOUNDS = {"gpt-oss-mxfp4": 2e-3}
"""Bounds of the error over all positions. Rounding of quantized weights may choose other experts in some."""
DECODE_BOUNDS = BOUNDS | {"exaone4-windows": 5e-5}
"""Bounds of the error of decode steps. 64 layers round keys and values to float16. If llama.cpp does so too, single
steps also differ from the recorded ones by 3e-4."""
Q8_0_BOUNDS = {
    "exaone4-windows": 4e-3,
    "bailingmoe2": 2e-3,
    "gpt-oss-mxfp4": 4e-3,
    "gemma4-experts": 2e-3,
    "deepseek2": 1e-2,
    "deepseek2-lite": 2e-3,
    "kimi-linear": 2e-3,
    "llama4-maverick": 2e-2,
}
"""Bounds with rounded keys and values, for models with many layers or a choice of experts."""
CHECKSUMS = {
    "llama-experts": "b70dd402",
    "llama-linear": "a9c34212",
    "llama-yarn": "a4d9ea9d",
    "internlm2": "76d55d81",
    "qwen2moe": "e5a55624",
    "qwen3": "1ffcda5c",
    "qwen3moe": "bde20af8",
    "phi3-short": "17bc2812",
    "phi3-long": "7d3f9517",
    "chatglm": "1f00bfa4",
    "falcon": "3a602c20",
    "falcon-two-norms": "d951aa7f",
    "gpt2": "fd1e954a",
    "starcoder2": "e50c5ae0",
    "baichuan-13b": "d1da180c",
    "gemma": "d2cfe8b6",
    "gemma2": "68c7cbc5",
    "gemma3": "b9dda0e6",
    "smollm3": "e209a14d",
    "mistral3": "eb940c9c",
    "seed_oss": "1fe2d042",
    "ernie4_5": "2b1a69d1",
    "hunyuan-dense": "db462646",
    "olmo2": "44fe800b",
    "olmo2-windows": "afaf5084",
    "exaone4": "e806de78",
    "exaone4-windows": "fd54db54",
    "granite": "443ffaaf",
    "cohere2": "9006a8ed",
    "granitemoe": "1c51b570",
    "gpt-oss": "a821b079",
    "gpt-oss-mxfp4": "3ed28bf3",
    "glm4moe": "ad82a35c",
    "ernie4_5-moe": "af5b7066",
    "hunyuan-moe": "181f6c7a",
    "bailingmoe2": "7b0ea894",
    "minimax-m2": "eb420101",
    "gemma3n": "36b8b827",
    "gemma4": "39c2f2c9",
    "gemma4-experts": "bbcedb29",
    "gemma4-inputs": "137c8395",
    "lfm2": "ab886c3c",
    "lfm2-windows": "4b174c82",
    "lfm2moe": "4e535e8f",
    "kimi-linear": "e72fa3a3",
    "qwen3next": "68666053",
    "qwen3next-old": "67533360",
    "qwen35": "0b146032",
    "qwen35moe": "ae938c41",
    "deepseek2": "8b543443",
    "deepseek2-lite": "0d988068",
    "deepseek2-scaled": "d9e497d3",
    "mistral4": "b91fe134",
    "granitehybrid": "ca98a767",
    "granitehybrid-experts": "9717e7a7",
    "falcon-h1": "9476f3d3",
    "falcon-h1-norm": "8a8cffbd",
    "nemotron_h": "d8d8ce00",
    "nemotron_h_moe": "705b3687",
    "nemotron_h_moe-latent": "91f4ddf5",
    "llama4": "79ce0771",
    "llama4-maverick": "908ad728",
    "qwen3vl": "773dc0da",
    "qwen3vlmoe": "8089cfe9",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


def opened(folder: Path, name: str) -> Model:
    path = folder / f"{name}.gguf"
    return Model.open(path if path.exists() else build_architecture(path, name))


def recorded(name: str) -> NDArray[np.float32]:
    return np.fromfile(DATA_FOLDER / f"{name}.f32", "<f4").reshape(len(TOKENS), VOCABULARY)


def logits(
    backend: Backend,
    model: Model,
    name: str,
    chunk: int | tuple[int, ...] | None = None,
    cuts: tuple[int, ...] = (),
    kv: str = "f16",
) -> NDArray[np.float32]:
    limits = replace(LIMITS, max_context_tokens=MODELS[name].context, kv_type=kv)
    chain = Chain(backend, model, cuts, limits)
    try:
        return chain.logits(TOKENS, chunk)
    finally:
        chain.close()


def error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Returns sum((found - wanted)^2) / sum(wanted^2)."""
    return float(((found.astype(np.float64) - wanted) ** 2).sum() / (wanted.astype(np.float64) ** 2).sum())


def test_every_architecture_is_here() -> None:
    elsewhere = {"baichuan", "qwen2", "glm4", *ENCODERS}  # test_golden.py, test_convert_originals.py, test_encoders.py
    elsewhere.add("qwen2vl")  # Same as qwen2, see tests/model/test_image_sections.py.
    assert {tiny.architecture for tiny in MODELS.values()} | elsewhere == set(ARCHITECTURES)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_llama_cpp(folder: Path, name: str) -> None:
    """The CPU gives the same bits at every level, with any number of threads, on every machine. The reference and the
    best level compute all models. Other levels compute every second model, which depends on the seed."""
    model, wanted, bound = opened(folder, name), recorded(name), BOUNDS.get(name, BOUND)
    turn = SEED + list(MODELS).index(name)
    for number, (backend, make) in enumerate(BACKENDS.items()):
        if backend not in ALWAYS and (turn + number) % 2:
            continue
        found = logits(make(), model, name)
        assert error(found, wanted) <= bound, backend
        for position in range(len(TOKENS) if bound == BOUND else 0):
            assert error(found[position], wanted[position]) <= 3 * BOUND, (backend, position)
        if backend != "reference":
            assert f"{zlib.crc32(found.astype('<f4').tobytes()):08x}" == CHECKSUMS[name], backend


@pytest.mark.parametrize("name", MODELS)
def test_decode_steps_are_those_of_llama_cpp(folder: Path, name: str) -> None:
    """Two stages compute 40 steps after the prefill. Errors of rounded keys and values add up, as in llama.cpp."""
    model, bound, start = opened(folder, name), DECODE_BOUNDS.get(name, BOUND), len(TOKENS)
    wanted = np.fromfile(DATA_FOLDER / f"{name}.decode.f16", "<f2").astype(np.float32)
    wanted = wanted.reshape(len(DECODED_TOKENS), VOCABULARY // DECODED_STRIDE)
    tokens, limits = [*TOKENS, *DECODED_TOKENS], replace(LIMITS, max_context_tokens=MODELS[name].context)
    blocks = range(-(-len(tokens) // KV_BLOCK_TOKENS), -1, -1)
    chain = Chain(all_threads(1), model, (1,), limits)
    try:
        chain.run(batch_of([(TOKENS, range(start), blocks)]))
        rows = [chain.run(batch_of([([tokens[at]], [at], blocks)])) for at in range(start, len(tokens))]
    finally:
        chain.close()
    found = np.concatenate(rows)[:, ::DECODED_STRIDE]
    assert error(found, wanted) <= bound
    for step in range(len(DECODED_TOKENS) if bound == BOUND else 0):
        assert error(found[step], wanted[step]) <= 10 * BOUND, step


@pytest.mark.parametrize("name", MODELS)
def test_any_cut_and_chunks_give_the_same_bits(folder: Path, name: str) -> None:
    model, last, bound = opened(folder, name), MODELS[name].layers, BOUNDS.get(name, BOUND)
    for kv_type in KvType:
        backend = all_threads(2)
        whole = logits(backend, model, name, kv=kv_type)
        limit = Q8_0_BOUNDS.get(name, 1e-3)
        limits = {KvType.F16: bound, KvType.Q8_0: limit, KvType.INT8: 2 * limit}
        assert error(whole, recorded(name)) <= limits[kv_type]
        ways: list[tuple[int | tuple[int, ...] | None, tuple[int, ...]]]
        ways = [(SINGLES, (1,)), (5, (1, 2)), (None, tuple(range(1, last))), (7, ())]
        for chunk, cuts in ways:
            found = logits(backend, model, name, chunk, possible_cuts(model, cuts), kv_type)
            np.testing.assert_array_equal(found.view(np.uint32), whole.view(np.uint32), f"{kv_type} {chunk} {cuts}")


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_computes_one_token_as_it_does_all(folder: Path, name: str) -> None:
    model, backend = opened(folder, name), BACKENDS["reference"]()
    single, whole = logits(backend, model, name, SINGLES, (1,)), logits(backend, model, name)
    np.testing.assert_array_equal(single.view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("name", MODELS)
def test_disturbances_change_no_bit(folder: Path, name: str) -> None:
    """The disturbances are other requests, drafts, splits, chunks, prefix hits, preemption and a lost worker. Tokens
    and bits are those of one stage."""
    model, context, backend = opened(folder, name), MODELS[name].context, all_threads(1)
    expected = undisturbed(backend, model, context)
    assert disturbed(backend, model, context, expected) == expected
    assert len({*expected}) == len(expected), "requests that differ have answers that differ"
    assert all(len({bits for _, bits in answer}) > len(answer) // 2 for answer in expected)


def test_what_two_models_differ_in_is_seen() -> None:
    """phi3's long factors differ from its short ones, and all recordings differ from each other."""
    names = sorted(MODELS)
    assert all(error(recorded(a), recorded(b)) > 1e-3 for a, b in pairwise(names))
    assert error(recorded("phi3-long")[1:], recorded("phi3-short")[1:]) > 1e-3
