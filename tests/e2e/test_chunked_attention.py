"""Tests of Llama 4's chunked attention: logits of llama.cpp across a chunk border, and the same bits for any split,
prefill chunk and batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.writer import WritableValue
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS, Attention, PositionScale
from support.arithmetic.backends import BACKENDS, all_threads
from support.arithmetic.batches import LIMITS, Chain, batch_of
from support.arithmetic.disturbed import disturbed, undisturbed
from support.models.tiny.llama4 import LONG_LLAMA4, LONG_RECORDED, LONG_TOKENS, SHORT_CHUNKS
from support.models.tiny_architectures import DECODED_STRIDE, TOKENS, VOCABULARY, build_tiny
from support.paths import DATA

BOUND = 1e-5
BLOCKS = range(-(-len(LONG_TOKENS) // KV_BLOCK_TOKENS))
LONG_LIMITS = replace(
    LIMITS, max_batch_tokens=1024, max_outputs=64, max_context_tokens=LONG_LLAMA4.context, kv_blocks=len(BLOCKS)
)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(build_tiny(tmp_path_factory.mktemp("llama4") / "long.gguf", LONG_LLAMA4))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(build_tiny(tmp_path_factory.mktemp("llama4") / "short.gguf", SHORT_CHUNKS))


def last_logits(model: Model, cuts: tuple[int, ...], sizes: list[int]) -> np.ndarray:
    """Returns the logits of the recorded positions. Prefill chunks have the given sizes, and the last size repeats."""
    chain, at, found = Chain(all_threads(2), model, cuts, LONG_LIMITS), 0, []
    try:
        while at < len(LONG_TOKENS):
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            rows = range(at, min(at + size, len(LONG_TOKENS)))
            wanted = [position - at for position in rows if position >= LONG_RECORDED.start]
            outputs = chain.run(batch_of([([LONG_TOKENS[row] for row in rows], rows, BLOCKS)], outputs=wanted))
            found.append(outputs[: len(wanted)])
            at = rows.stop
    finally:
        chain.close()
    return np.concatenate(found)


def test_logits_over_the_border_are_those_of_llama_cpp(long: Model) -> None:
    """Queries before position 8191 are not scaled, and no position is masked before 8192. Other splits give the same
    bits."""
    wanted = np.fromfile(DATA / "architectures" / "llama4-long.f16", "<f2").astype(np.float32)
    wanted = wanted.reshape(-1, VOCABULARY // DECODED_STRIDE)
    whole = last_logits(long, (), [1024])
    found = whole[:, ::DECODED_STRIDE]
    errors = ((found.astype(np.float64) - wanted) ** 2).sum(axis=1) / (wanted.astype(np.float64) ** 2).sum(axis=1)
    assert errors.max() <= 10 * BOUND and errors.mean() <= BOUND, errors
    for cuts, sizes in (((1, 3), [777]), ((2,), [1000] * 8 + [180] + [1])):
        np.testing.assert_array_equal(last_logits(long, cuts, sizes).view(np.uint32), whole.view(np.uint32), f"{cuts}")


def test_layers_with_chunks_and_others(long: Model, short: Model) -> None:
    for model, chunk in ((long, 8192), (short, 6)):
        program = model.program(0, 5, KvType.F16, None)
        attention = [step for step in program.steps if isinstance(step, Attention)]
        assert [(step.window, step.chunked) for step in attention] == [(chunk, True)] * 3 + [
            (None, False),
            (chunk, True),
        ]
        (scale,) = (step for step in program.steps if isinstance(step, PositionScale))
        assert (scale.factor, scale.length, scale.offset) == (0.1, 8192, 1)
        assert model.window == chunk


@pytest.mark.parametrize("kv_type", KvType)
def test_short_chunks_give_the_same_bits_on_every_backend(short: Model, kv_type: KvType) -> None:
    limits = replace(LIMITS, max_context_tokens=SHORT_CHUNKS.context, kv_type=str(kv_type))
    found = []
    for backend, chunk, cuts in (
        (BACKENDS["reference"](), None, ()),
        (all_threads(1), None, ()),
        (all_threads(3), 5, (1, 2, 3)),
    ):
        chain = Chain(backend, short, cuts, limits)
        try:
            found.append(chain.logits(TOKENS, chunk))
        finally:
            chain.close()
    reference, whole, cut = found
    np.testing.assert_array_equal(whole.view(np.uint32), cut.view(np.uint32))
    assert ((whole - reference) ** 2).sum() / (reference**2).sum() <= (BOUND if kv_type is KvType.F16 else 1e-3)


def test_disturbances_change_no_bit(short: Model) -> None:
    """The disturbances are other requests, splits, prefix hits, preemption, a lost worker, and KV blocks that are
    released behind a chunk."""
    backend = all_threads(1)
    expected = undisturbed(backend, short, SHORT_CHUNKS.context)
    assert disturbed(backend, short, SHORT_CHUNKS.context, expected) == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.sliding_window", 0, r"llama4\.attention\.sliding_window': a window of 0 is not supported"),
        ("expert_count", 0, r"llama4\.expert_count': the count is missing or 0"),
        ("interleave_moe_layer_step", 0, r"llama4\.interleave_moe_layer_step': expected 1 to .*, found 0"),
        ("expert_weights_scale", 2.5, r"llama4\.expert_weights_scale': .*not supported"),
    ],
)
def test_bad_keys_are_named(tmp_path: Path, key: str, value: float, message: str) -> None:
    changes: dict[str, WritableValue] = {"expert_used_count": 0} if key == "expert_count" else {}
    tiny = replace(SHORT_CHUNKS, keys={**SHORT_CHUNKS.keys, **changes, key: value})
    with pytest.raises(ModelFileError, match=message):
        Model.open(build_tiny(tmp_path / "bad.gguf", tiny)).program(0, 5, KvType.F16, None)
