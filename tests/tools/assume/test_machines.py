"""Machines as users describe them, and where a description is wrong."""

from __future__ import annotations

import random

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.tools.assume.machines import Assumed, Device, Machine, Network, parse_machines
from support.seed import SEED

GIB = 1 << 30
OLD = Machine(Device(16 * GIB, 40e9))


def test_three_old_computers() -> None:
    assert parse_machines("3x16GB@40GB/s,1Gbit") == Assumed((OLD,) * 3, Network(1e9))


@pytest.mark.parametrize("text", ["3 x 16 GB @ 40 GB/s , 1 Gbit", "3X16GiB@40gb/s,1gbit/s", "3*16G@40GB/s,1000Mbps"])
def test_spelling_is_free(text: str) -> None:
    assert parse_machines(text) == Assumed((OLD,) * 3, Network(1e9))


def test_unequal_machines_threads_operations_and_the_round_trip() -> None:
    found = parse_machines("16GB@40GB/s + 2x32.5GB@51.2GB/s/8+1TB@400GB/s@12.5TOPS, 2.5Gbit, 200us")
    middle = Machine(Device(int(32.5 * GIB), 51.2e9, threads=8))
    large = Machine(Device(1024 * GIB, 400e9, macs_s=6.25e12))
    assert found == Assumed((OLD, middle, middle, large), Network(2.5e9, 200 * 1e-6))


def test_gpus_are_in_the_machines_before_them() -> None:
    found = parse_machines("2x16GB@40GB/s + 2x24GB@900GB/s@280TOPS gpu + 8GB@448GB/s GPU + 16GB@40GB/s").machines
    fast, small = Device(24 * GIB, 900e9, macs_s=140e12), Device(8 * GIB, 448e9)
    assert found == (*(Machine(OLD.cpu, (fast, fast, small)),) * 2, OLD)


def test_random_descriptions_are_read_back() -> None:
    source = random.Random(SEED)
    for _ in range(200):
        machines: list[Machine] = []
        groups = []
        for _ in range(source.randint(1, 4)):
            count, memory, read = source.randint(1, 9), source.randint(1, 512), source.randint(1, 999)
            threads = source.choice((None, source.randint(1, 64)))
            groups.append(f"{count}x{memory}GB@{read}GB/s" + (f"/{threads}" if threads else ""))
            machines += [Machine(Device(memory * GIB, read * 1e9, threads=threads))] * count
        assert parse_machines("+".join(groups)) == Assumed(tuple(machines)), groups


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", 1, "expected machines"),
        ("16GB", 1, "expected machines"),
        ("three computers", 1, "expected machines"),
        ("3x16GB@40GB/s+", 15, "expected machines"),
        ("3x16GB@40GB/s + 16GB", 17, "expected machines"),
        ("3x16GB@40GB/s 1Gbit", 15, 'expected "+"'),
        ("3x16GB@40GB/s,", 15, "network's speed"),
        ("3x16GB@40GB/s,0.3ms", 15, "network's speed"),
        ("3x16GB@40GB/s,0Gbit", 15, "above 0"),
        ("3x16GB@40GB/s,1Gbit,fast", 21, "round trip"),
        ("3x16GB@40GB/s,1Gbit,1ms,1ms", 24, 'expected "+"'),
        ("0x16GB@40GB/s", 1, "above 0"),
        ("16GB@0GB/s", 1, "above 0"),
        ("16GB@40GB/s/0", 1, "above 0"),
        ("0GB@40GB/s", 1, "above 0"),
        ("999999999TB@40GB/s", 1, "1024 TB of memory at most, found '999999999TB@"),
        ("16GB@40GB/s+1025TB@900GB/s gpu", 13, "1024 TB of memory at most, found '1025TB@"),
        ("60x16GB@40GB/s+5x16GB@40GB/s", 16, "64 machines at most"),
        ("9999x16GB@40GB/s", 1, "64 machines at most"),
        ("24GB@900GB/s gpu", 1, "machine of a GPU"),
        ("16GB@40GB/s+24GB@900GB/s/8 gpu", 13, "no threads"),
        ("16GB@40GB/s+9x24GB@900GB/s gpu", 13, "8 GPUs"),
    ],
)
def test_mistakes_are_named_with_their_place_and_an_example(text: str, place: int, what: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_machines(text)
    message = str(error.value)
    assert what in message and f"at character {place};" in message and "3x16GB@40GB/s,1Gbit" in message
    assert "\n" not in message


def test_no_text_ends_in_anything_but_an_answer_or_a_usage_error() -> None:
    source = random.Random(SEED)
    letters = "0123456789.xGTB@/s+,gpubitm \t\n\x00é×" * 2
    for _ in range(3000):
        text = list("2x16GB@40GB/s/4+24GB@900GB/s@100TOPS gpu,1Gbit,0.3ms")
        for _ in range(source.randint(1, 5)):
            text[source.randrange(len(text))] = source.choice(letters)
        try:
            parse_machines("".join(text))
        except UsageError as error:
            assert "\n" not in str(error), text
