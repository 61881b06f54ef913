"""Tests of adapters by their numbers, the requests that use them, and their record on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from time import monotonic_ns

import pytest

from llamaclust.cluster.state.adapters import AdapterRecord, AdapterUnloadedError, ServedAdapter, ServedAdapters
from llamaclust.core.errors import LlamaclustError

POET = ServedAdapter("poet", "/a/poet.gguf", content="aa")
CLERK = ServedAdapter("clerk", "/a/clerk.gguf", content="bb")


def served(*loaded: tuple[int, ServedAdapter]) -> ServedAdapters:
    adapters = ServedAdapters((ServedAdapter("first", "/first.gguf", 0.5),))
    for number, adapter in loaded:
        adapters.add(number, adapter)
    return adapters


def test_adapters_have_numbers_with_gaps() -> None:
    adapters = served((3, CLERK), (2, POET))
    assert adapters.numbers == (0, 2, 3) and adapters.names == ("first", "poet", "clerk")
    assert adapters.number_of("clerk") == 3 and adapters[3] == CLERK
    assert adapters.number_of("other") is None and adapters.number_of(None) is None
    assert adapters.loaded == [(2, POET), (3, CLERK)]


@pytest.mark.parametrize(
    ("now", "continues"),
    [
        ((), False),
        (((1, POET),), True),
        (((1, POET), (2, CLERK)), True),
        (((1, CLERK),), False),
        (((2, POET),), False),
        (((1, ServedAdapter("poet", "/a/poet.gguf", content="cc")),), False),
        (((2, CLERK),), False),
    ],
)
def test_a_request_continues_with_the_adapters_that_it_used(
    now: tuple[tuple[int, ServedAdapter], ...], continues: bool
) -> None:
    before = served((1, POET), (2, CLERK))
    assert served(*now).have(before.marks({0, 1})) is continues
    assert served(*now).have(before.marks({0})), "others may have come and gone"


def test_an_adapter_is_removed_when_no_request_uses_it() -> None:
    adapters, scales = served((1, POET)), ((0, 1.0), (1, 0.5))
    adapters.use(scales, 0)
    assert adapters.uses(1) == 1
    adapters.release(scales)
    assert adapters.uses(1) == 0
    adapters.remove(1)
    assert adapters.numbers == (0,) and adapters.loaded == []
    with pytest.raises(AdapterUnloadedError, match="adapter 1 was unloaded"):
        adapters.use(scales, 0)
    assert adapters.uses(0) == adapters.uses(1) == 0


def test_a_number_is_another_adapter_for_requests_that_came_before_it() -> None:
    adapters, times = served((1, POET)), [monotonic_ns()]
    adapters.remove(1)
    times.append(monotonic_ns())
    adapters.add(1, CLERK)
    times.append(monotonic_ns())
    with pytest.raises(AdapterUnloadedError):
        adapters.use(((1, 1.0),), times[0])
    adapters.use(((1, 1.0),), times[2])
    names = [adapters.names_at(time).get(1) for time in (*times, monotonic_ns())]
    assert (names[0], names[2], names[3]) == ("poet", "clerk", "clerk")


async def test_the_record_is_what_the_next_coordinator_reads(tmp_path: Path) -> None:
    path = tmp_path / "adapters.json"
    record = AdapterRecord(path)
    await record.write("m", [(2, POET)])
    await record.write("n", [(0, CLERK)])
    await record.write("m", [(2, POET), (1, CLERK)])
    again = AdapterRecord(path)
    assert again.of("m") == [(2, POET), (1, CLERK)] and again.of("n") == [(0, CLERK)] and again.of("x") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"m": 5}',
        '{"m": [{"number": 0}]}',
        json.dumps({"m": [{"number": 16, "name": "a", "path": "a", "content": "a"}]}),
        json.dumps({"m": [{"number": 0, "name": "a", "path": "a", "content": ""}]}),
    ],
)
def test_a_damaged_record_is_left_out(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "adapters.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert AdapterRecord(path).of("m") == []
    assert "adapters that clients had loaded will not be loaded" in caplog.text


async def test_a_record_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    record = AdapterRecord(tmp_path / "no folder" / "adapters.json")
    with pytest.raises(LlamaclustError, match="cannot be written"):
        await record.write("m", [(2, POET)])
    assert record.of("m") == []


async def test_what_could_not_be_loaded_stays_in_the_record_until_its_name_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "adapters.json"
    await AdapterRecord(path).write("m", [(2, POET), (1, CLERK)])
    record = AdapterRecord(path)
    record.keep("m", 2, POET)
    await record.write("m", [(1, CLERK), (3, ServedAdapter("third", "/a/third.gguf", content="cc"))])
    assert [adapter.name for _, adapter in AdapterRecord(path).of("m")] == ["clerk", "third", "poet"]
    assert not await record.remove("m", "clerk") and await record.remove("m", "poet")
    assert [adapter.name for _, adapter in AdapterRecord(path).of("m")] == ["clerk", "third"]


async def test_a_new_adapter_takes_the_place_of_one_of_its_name_in_the_record(tmp_path: Path) -> None:
    path = tmp_path / "adapters.json"
    await AdapterRecord(path).write("m", [(2, POET)])
    record, other = AdapterRecord(path), ServedAdapter("poet", "/a/other.gguf", content="cc")
    record.keep("m", 2, POET)
    await record.write("m", [(0, other)])
    assert AdapterRecord(path).of("m") == [(0, other)] and not await record.remove("m", "poet")
