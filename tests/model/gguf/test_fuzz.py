"""Checks that the reader of randomly damaged GGUF files returns a usable model or raises ModelFileError."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.values import LazyStrings
from llamaclust.model.model_keys import read_hyperparameters
from support.models.gguf_bytes import ARRAY, BOOL, FLOAT32, STRING, UINT32, array, gguf, key, tensor, text
from support.models.tiny_model import build_tiny_model

MEMORY_LIMIT_BYTES = 1 << 24
NUMBERS = st.sampled_from([0, 1, 3, 31, 32, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 61, 1 << 63, (1 << 64) - 1])

fuzz = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Returns the bytes of a valid model of 60 KB."""
    folder = tmp_path_factory.mktemp("good")
    path = build_tiny_model(folder / "good.gguf", layers=1, hidden=32, ffn=32, heads=2, kv_heads=1, vocabulary=300)
    return path.read_bytes()


@contextmanager
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_LIMIT_BYTES
    finally:
        tracemalloc.stop()


def use_all_of(folder: Path, content: bytes) -> None:
    """Opens the file and reads everything in it; only ModelFileError is allowed."""
    path = folder / "fuzz.gguf"
    path.write_bytes(content)
    try:
        with bounded_memory():
            model = open_model(path)
            for value in model.metadata.values():
                if isinstance(value, LazyStrings):
                    assert len(value.decoded()) == len(value)
            for each in model.tensors.values():
                assert len(each.read()) == each.n_bytes
            read_hyperparameters(model)
    except ModelFileError as error:
        assert "\n" not in str(error) and str(path) in str(error)


HEADER_BYTES = 9000


@fuzz
@given(flips=st.lists(st.tuples(st.integers(0, HEADER_BYTES), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(tmp_path: Path, good: bytes, flips: list[tuple[int, int]]) -> None:
    content = bytearray(good)
    for place, mask in flips:
        content[place] ^= mask
    use_all_of(tmp_path, bytes(content))


@fuzz
@given(place=st.integers(0, HEADER_BYTES), value=NUMBERS, size=st.sampled_from([4, 8]))
def test_numbers_written_over(tmp_path: Path, good: bytes, place: int, value: int, size: int) -> None:
    data = pack("<Q", value)[:size]
    use_all_of(tmp_path, good[:place] + data + good[place + size :])


@fuzz
@given(start=st.integers(0, HEADER_BYTES), removed=st.integers(0, 64), added=st.binary(max_size=64))
def test_bytes_removed_and_added(tmp_path: Path, good: bytes, start: int, removed: int, added: bytes) -> None:
    use_all_of(tmp_path, good[:start] + added + good[start + removed :])


@fuzz
@given(content=st.binary(max_size=200))
def test_noise_after_a_good_start(tmp_path: Path, content: bytes) -> None:
    use_all_of(tmp_path, b"GGUF\3\0\0\0" + content)


NAMES = st.sampled_from(["a", "b", "general.alignment", "general.architecture", "split.count", "llama.block_count"])
SCALARS = st.one_of(
    st.builds(key, NAMES, st.just(UINT32), NUMBERS.map(lambda value: pack("<Q", value)[:4])),
    st.builds(key, NAMES, st.just(FLOAT32), st.binary(min_size=4, max_size=4)),
    st.builds(key, NAMES, st.just(BOOL), st.binary(min_size=1, max_size=1)),
    st.builds(key, NAMES, st.just(STRING), st.binary(max_size=9).map(text)),
    st.builds(key, NAMES, st.integers(0, 14), st.binary(max_size=20)),
)
ITEMS = st.one_of(st.binary(max_size=64), st.lists(st.binary(max_size=5).map(text), max_size=5).map(b"".join))
COUNTS = st.one_of(st.integers(0, 8), NUMBERS)
ARRAYS = st.builds(array, NAMES, st.one_of(st.just(STRING), st.just(ARRAY), st.integers(0, 14)), COUNTS, ITEMS)
SIZES = st.lists(st.one_of(st.integers(0, 64), NUMBERS), max_size=5)
TENSORS = st.builds(tensor, NAMES, SIZES, st.integers(0, 45), st.one_of(st.sampled_from([0, 32, 64]), NUMBERS))


@fuzz
@given(
    keys=st.lists(st.one_of(SCALARS, ARRAYS), max_size=4),
    tensors=st.lists(TENSORS, max_size=3),
    data=st.integers(0, 4096),
    counts=st.one_of(st.none(), st.tuples(COUNTS, COUNTS)),
)
def test_fields_that_lie(
    tmp_path: Path, keys: list[bytes], tensors: list[bytes], data: int, counts: tuple[int, int] | None
) -> None:
    key_count, tensor_count = counts or (len(keys), len(tensors))
    use_all_of(tmp_path, gguf(keys, tensors, bytes(data), key_count=key_count, tensor_count=tensor_count))


def test_the_good_file_is_good(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(good)
    model = open_model(path)
    assert read_hyperparameters(model).block_count == 1
    assert min(each.offset for each in model.tensors.values()) < HEADER_BYTES + 4096 < len(good)
