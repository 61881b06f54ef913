"""Checks that damaged and hostile GGUF files are refused with one line that names file and place, at little cost."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from struct import pack

import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import open_model
from support.models.gguf_bytes import (
    ARRAY,
    BOOL,
    F16,
    F32,
    FLOAT32,
    INT32,
    Q4_0,
    STRING,
    UINT32,
    array,
    gguf,
    key,
    number,
    tensor,
    text,
)
from support.seed import SEED

HUGE = (1 << 64) - 1
MOST_PEAK_BYTES = 192 << 20
NESTED = pack("<IQ", ARRAY, 1)

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "text": (b"hello, world! this is no model at all", "not a GGUF file"),
    "version 1": (gguf(version=1), "GGUF version 1 is not supported"),
    "version 99": (gguf(version=99), "GGUF version 99 is not supported"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "many tensors": (gguf(tensor_count=HUGE), f"{HUGE} tensors"),
    "many keys": (gguf(key_count=HUGE), f"{HUGE} metadata keys"),
    "one key too many": (
        gguf([number("a", 1)], key_count=2),
        "metadata key 1 .*bytes are needed|0 metadata|the key is empty",
    ),
    "long key": (gguf([pack("<Q", HUGE) + b"a" * 20]), "a string has 18446744073709551615 bytes"),
    "key past the end": (
        gguf([pack("<Q", 60_000) + b"a" * 20]),
        "60000 more bytes are needed, but the file ends at byte",
    ),
    "empty key": (gguf([number("", 1)]), "the key is empty"),
    "same key twice": (gguf([number("a", 1), number("a", 2)]), "'a' .*twice"),
    "key not UTF-8": (gguf([key(b"\xff", UINT32, bytes(4))]), "not UTF-8"),
    "value type": (gguf([key("a", 77, bytes(8))]), "'a' .*unknown value type 77"),
    "truth value": (gguf([key("a", BOOL, b"\x02")]), "a Boolean must be 0 or 1, not 2"),
    "long text": (gguf([key("a", STRING, pack("<Q", 1 << 62))]), "a string has 4611686018427387904 bytes"),
    "long array": (gguf([array("a", INT32, HUGE, bytes(64))]), f"{HUGE} numbers do not fit"),
    "long array, product wraps": (gguf([array("a", INT32, 1 << 62, bytes(64))]), "numbers do not fit"),
    "many strings": (gguf([array("a", STRING, HUGE, bytes(64))]), f"an array of {HUGE} strings"),
    "strings past the end": (
        gguf([array("a", STRING, 3, text("b") + pack("<Q", HUGE) + bytes(64))]),
        "bytes are needed",
    ),
    "last string past the end": (gguf([array("a", STRING, 1, pack("<Q", 99))]), "bytes are needed"),
    "array type": (gguf([array("a", 13, 1, bytes(64))]), "unknown array type 13"),
    "truth values": (gguf([array("a", BOOL, 2, b"\x01\x03")]), "a Boolean must be 0 or 1, not 3"),
    "deep array": (gguf([array("a", ARRAY, 1, NESTED * 100 + bytes(64))]), "nested arrays, 5 levels deep"),
    "wide nested array": (gguf([array("a", ARRAY, HUGE, bytes(64))]), "nested arrays"),
    "alignment 0": (gguf([number("general.alignment", 0)]), "general.alignment.* a power of two up to .*, found 0"),
    "alignment 48": (gguf([number("general.alignment", 48)]), "a power of two up to .*, found 48"),
    "alignment 2^31": (gguf([number("general.alignment", 1 << 31)]), "a power of two up to"),
    "alignment text": (gguf([key("general.alignment", STRING, text("x"))]), "expected a whole number, found text"),
    "no dimensions": (gguf([], [tensor("x", [])], bytes(64)), "'x'.* 1 to 4 dimensions, found 0"),
    "five dimensions": (gguf([], [tensor("x", [1] * 5)], bytes(64)), "found 5"),
    "zero dimension": (
        gguf([], [tensor("x", [4, 0])], bytes(64)),
        r"shape \[4, 0\] contains 0, or has more than 281474976710656 elements",
    ),
    "huge dimension": (gguf([], [tensor("x", [HUGE])], bytes(64)), "shape .* contains 0, or has more than"),
    "product wraps to zero": (gguf([], [tensor("x", [1 << 32, 1 << 32])], bytes(64)), "shape .* contains 0, or has"),
    "quant type": (gguf([], [tensor("x", [32], 4)], bytes(64)), "'x' .*unknown quant type 4"),
    "part of a block": (
        gguf([], [tensor("x", [33], Q4_0)], bytes(64)),
        "rows have 33 weights, but Q4_0 needs a multiple of 32",
    ),
    "tensor without name": (gguf([], [tensor("", [1])], bytes(64)), "the name is empty"),
    "same tensor twice": (gguf([], [tensor("x", [1]), tensor("x", [1], F32, 32)], bytes(64)), "'x' .*twice"),
    "tensor name too long": (gguf([], [tensor("x" * 300, [1])], bytes(64)), "a string has 300 bytes"),
    "tensor name not UTF-8": (gguf([], [tensor(b"\xfe", [1])], bytes(64)), "not UTF-8"),
    "data cut short": (
        gguf([], [tensor("x", [16])], bytes(63)),
        "'x': it ends at byte 128, but the file ends at byte 127; .*incomp",
    ),
    "offset wraps": (gguf([], [tensor("x", [16], F32, HUGE - 63)], bytes(64)), "'x': it ends at byte"),
    "overlap": (
        gguf([], [tensor("x", [16], F32, 0), tensor("y", [16], F16, 32)], bytes(64)),
        "'y': it overlaps tensor 'x'",
    ),
    "same place": (gguf([], [tensor("x", [8]), tensor("y", [8])], bytes(64)), "'y': it overlaps tensor 'x'"),
    "line breaks in a name": (gguf([key("a\nb\x1b", 77, b"")]), r"'a\\nb\\x1b'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_gets_one_clear_line(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=message) as caught:
            open_model(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert str(path) in line and "\n" not in line and len(line) < 400
    assert caught.value.exit_code == 2
    assert peak_bytes < 1 << 20


def test_every_truncation_of_a_good_file_is_an_error(tmp_path: Path) -> None:
    keys = [number("a", 1), array("words", STRING, 2, text("one") + text("two")), key("f", FLOAT32, bytes(4))]
    content = gguf(keys, [tensor("x", [8]), tensor("y", [8, 2], F16, 32)], bytes(64))
    path = tmp_path / "cut.gguf"
    path.write_bytes(content)
    assert len(open_model(path).tensors) == 2
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            open_model(path)


def test_a_sparse_file_does_not_buy_memory(tmp_path: Path) -> None:
    """Checks that the header's bound does not grow with the size of a sparse file."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(gguf([array("a", STRING, 1 << 22, pack("<Q", 1 << 30))]))
    os.truncate(path, 1 << 40)
    with pytest.raises(ModelFileError, match="the header is longer than 64 MiB"):
        open_model(path)


def _random_array(drawn: Random, count: int) -> bytes:
    return array("a", drawn.choice((INT32, FLOAT32, UINT32)), count, drawn.randbytes(64))


DAMAGES: dict[str, Callable[[Random], bytes]] = {
    "an array of numbers": lambda drawn: gguf([_random_array(drawn, drawn.randint(1 << 24, 1 << 28))]),
    "one long string": lambda drawn: gguf([array("a", STRING, 3, pack("<Q", drawn.randint(1 << 27, 1 << 30)))]),
    "many strings": lambda drawn: gguf(
        [array("a", STRING, drawn.randint((1 << 22) + 1, 1 << 30), pack("<Q", 1 << 20) * 9)]
    ),
    "a text": lambda drawn: gguf([key("a", STRING, pack("<Q", drawn.randint(1 << 24, 1 << 62)))]),
    "nested arrays": lambda drawn: gguf([array("a", ARRAY, drawn.randint(1 << 13, 1 << 40), NESTED * 40)]),
    "counts of keys and tensors": lambda drawn: gguf(
        key_count=drawn.randint(1, 1 << 17), tensor_count=drawn.randint(1 << 10, 1 << 17)
    ),
    "any byte": lambda drawn: _flipped(drawn, gguf([_random_array(drawn, 16), number("b", 2)], [tensor("x", [8])])),
}


def _flipped(drawn: Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(4):
        damaged[drawn.randrange(8, len(damaged))] = drawn.randrange(256)
    return bytes(damaged)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_header_of_a_large_file_takes_little_memory(damage: str, tmp_path: Path) -> None:
    """The file is as large as a model; its counts and lengths fit into its size."""
    print(f"seed {SEED}")
    path, refused = tmp_path / "damaged.gguf", 0
    for number_ in range(5):
        path.write_bytes(DAMAGES[damage](Random(f"{SEED} {damage} {number_}")))
        os.truncate(path, 1 << 33)
        tracemalloc.start()
        try:
            open_model(path)
        except ModelFileError as error:
            refused += 1
            assert str(path) in str(error)
        finally:
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak_bytes < MOST_PEAK_BYTES, f"{peak_bytes >> 20} MiB"
    assert refused or damage == "any byte"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "loop", "nul"])
def test_what_is_not_a_file_is_refused_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("model\0.gguf" if kind == "nul" else "model.gguf")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(ModelFileError, match=r"no such file|not a regular file|cannot be opened|not a file name"):
        open_model(path)
