"""Tests of users' descriptions of machines, valid and invalid."""

from __future__ import annotations

import random
import re

import pytest

from llamaclust.cluster.planner.gathers import GroupLinks
from llamaclust.core.errors import UsageError
from llamaclust.tools.assume import rates
from llamaclust.tools.assume.description import parse_machines
from llamaclust.tools.assume.gpu_models import GPU_MODELS
from llamaclust.tools.assume.machines import AssumedMachines, Ddr, Device, Machine, Network
from support.seed import SEED

GIB = 1 << 30
OLDEST = 61  # the oldest compute capability of the kernels
OLD = Machine(Device(16 * GIB, 40e9))


def test_three_old_computers() -> None:
    assert parse_machines("3x16GB@40GB/s,1Gbit") == AssumedMachines((OLD,) * 3, Network(1e9))


@pytest.mark.parametrize(
    "text",
    [
        "3 x 16 GB @ 40 GB/s , 1 Gbit",
        "3X16GiB@40gb/s,1gbit/s",
        "3*16G@40GB/s,1000Mbps",
        "3×16GB@40GB/s,1GbE",
        "16 GB x 3 @ 40GB/s,1Gbit",
        "16GB×3@40000MB/s,1Gbit",
        "3x16384MB@40GB/s,1Gbit",
    ],
)
def test_spelling_is_free(text: str) -> None:
    assert parse_machines(text) == AssumedMachines((OLD,) * 3, Network(1e9))


def test_bandwidth_and_network_may_be_left_out() -> None:
    bare = Machine(Device(16 * GIB))
    assert parse_machines("3x16GB") == AssumedMachines((bare,) * 3)
    assert parse_machines("16 GB x 2, 100Mbit") == AssumedMachines((bare,) * 2, Network(1e8))
    found = parse_machines("16GB/8 + 16GB@1TOPS").machines
    assert found == (Machine(Device(16 * GIB, threads=8)), Machine(Device(16 * GIB, macs_s=0.5e12)))


@pytest.mark.parametrize(
    ("text", "memory", "bytes_s"),
    [
        ("DDR3", Ddr(3), 20e9),
        ("ddr4", Ddr(4), 40e9),
        ("DDR5", Ddr(5), 60e9),
        ("LPDDR4", Ddr(4), 40e9),
        ("DDR4x1", Ddr(4, channels=1), 20e9),
        ("8xDDR4", Ddr(4, channels=8), 160e9),
        ("DDR3-1600", Ddr(3, megatransfers_s=1600), 25.6e9),
        ("2 x DDR4-3200", Ddr(4, 2, 3200), 51.2e9),
    ],
)
def test_kinds_of_memory_have_a_bandwidth(text: str, memory: Ddr, bytes_s: float) -> None:
    (machine,) = parse_machines(f"16GB@{text}").machines
    assert machine.cpu == Device(16 * GIB, memory)
    assert rates.read_bytes_s(machine.cpu) == pytest.approx(bytes_s)


def test_machines_without_a_bandwidth_have_ddr4_in_two_channels() -> None:
    assumed = parse_machines("16GB + 8GB@DDR3x1 + 8GB@25GB/s")
    assert [rates.read_bytes_s(machine.cpu) for machine in assumed.machines] == [40e9, 10e9, 25e9]
    lines = [line for line in rates.assumptions(assumed) if line.startswith("memory is read at ")]
    assert lines[0].startswith("memory is read at 40 GB/s, DDR4 in two channels (none given; add @DDR3, ")
    assert lines[1:] == ["memory is read at 10 GB/s, DDR3 in one channel"]


@pytest.mark.parametrize("network", ["", ",1Gbit", ",100Mbit,2ms", ",2.5Gbit,0.3ms", ",10Gbit,40us"])
def test_the_network_that_is_told_is_the_one_that_counts(network: str) -> None:
    assumed = parse_machines(f"3x16GB{network}")
    text = "\n".join(rates.assumptions(assumed))
    ways = r"stages takes half a round trip \+ (\S+) ms; a gather, half a round trip \+ (\S+) µs"
    found = re.search(rf"network: (\S+) Gbit/s.*? (\S+) % is usable; round trip (\S+) ms.*\n.*{ways}", text)
    assert found is not None and text.count("(default; set it with ") == 2 - network.count(",")
    gbit_s, percent, round_trip_ms, hop_ms, gather_us = map(float, found.groups())
    links = rates.links_of(assumed.network, ["m1", "m2"])
    link = links.between("m1", "m2")
    assert 1e3 * link.one_way_s == pytest.approx(round_trip_ms / 2 + hop_ms)
    assert link.byte_s == pytest.approx(8e-7 / (percent * gbit_s))
    gather_s = GroupLinks.of(links, ["m1", "m2"]).gather_s
    assert 1e6 * gather_s == pytest.approx(1e3 * round_trip_ms / 2 + gather_us)


@pytest.mark.parametrize(("rate", "bytes_s"), [("40GB/s", 40e9), ("40GiB/s", 40 * 2**30), ("512MiB/s", 2**29)])
def test_rates_have_the_units_that_are_written(rate: str, bytes_s: float) -> None:
    assert parse_machines(f"16GB@{rate}").machines[0].cpu.bandwidth == bytes_s


def test_unequal_machines_threads_operations_and_the_round_trip() -> None:
    found = parse_machines("16GB@40GB/s + 2x32.5GB@51.2GB/s/8+1TB@400GB/s@12.5TOPS, 2.5Gbit, 200us")
    middle = Machine(Device(int(32.5 * GIB), 51.2e9, threads=8))
    large = Machine(Device(1024 * GIB, 400e9, macs_s=6.25e12))
    assert found == AssumedMachines((OLD, middle, middle, large), Network(2.5e9, 200 * 1e-6))


def test_gpus_are_in_the_machines_before_them() -> None:
    found = parse_machines("2x16GB@40GB/s + 2x24GB@900GB/s@280TOPS gpu + 8GB@448GB/s GPU + 16GB@40GB/s").machines
    fast, small = Device(24 * GIB, 900e9, macs_s=140e12), Device(8 * GIB, 448e9)
    assert found == (*(Machine(OLD.cpu, (fast, fast, small)),) * 2, OLD)


@pytest.mark.parametrize(
    "text",
    [
        "2x16GB@40GB/s + 2x rtx3090",
        "2x16GB@40GB/s+2xRTX 3090 , 1Gbit",
        "2x16GB@40GB/s + GeForce RTX-3090 x 2",
        "2 x 16 GB @ 40 GB/s + 2 × NVIDIA GeForce RTX 3090 GPU, 1Gbit",
    ],
)
def test_gpus_have_names(text: str) -> None:
    gpu = Device(24 * GIB, 936e9, macs_s=142e12, gpu_name="rtx3090")
    assert parse_machines(text).machines == (Machine(OLD.cpu, (gpu, gpu)),) * 2


def test_every_gpu_is_found_by_its_name_and_is_plausible() -> None:
    for name, model in GPU_MODELS.items():
        (machine,) = parse_machines(f"16GB + {name.replace('-', ' ')}").machines
        assert [gpu.gpu_name for gpu in machine.gpus] == [name]
        assert 4 <= model.memory_gib <= 200 and 100 <= model.bandwidth_gb_s <= 10000 and 10 <= model.tops <= 5000
        assert model.compute_capability >= OLDEST and model.has_matrix_units == (model.compute_capability >= 75)
        assert machine.gpus[0].has_matrix_units == model.has_matrix_units


def test_gpus_without_matrix_units_have_slower_prefill_and_say_so() -> None:
    assumed = parse_machines("16GB + p40 + rtx3090 + 8GB@448GB/s gpu")
    old, new, _ = (rates.gpu_profile(gpu) for gpu in assumed.machines[0].gpus)
    assert (old.read_bytes_s, old.int8_macs_s) == pytest.approx((0.8 * 346e9, 0.15 * 23.5e12))
    assert (new.read_bytes_s, new.int8_macs_s) == pytest.approx((0.8 * 936e9, 0.35 * 142e12))
    lines = [line for line in rates.assumptions(assumed) if "data sheet" in line]
    assert lines[0].startswith("p40 by its data sheet: 22.4 GiB at 346 GB/s, 47 TOPS, prefill at 0.15 of that")
    assert lines[1:] == ["rtx3090 by its data sheet: 24 GiB at 936 GB/s, 284 TOPS"]


def test_random_descriptions_are_read_back() -> None:
    source = random.Random(SEED)
    for _ in range(200):
        machines: list[Machine] = []
        groups = []
        for _ in range(source.randint(1, 4)):
            count, memory, read = source.randint(1, 9), source.randint(1, 512), source.choice((None, 25, 999))
            threads = source.choice((None, source.randint(1, 64)))
            counted = source.choice((f"{count}x{memory}GB", f"{memory} GB x {count}", f"{count} × {memory}GB"))
            groups.append(counted + (f"@{read}GB/s" if read else "") + (f"/{threads}" if threads else ""))
            machines += [Machine(Device(memory * GIB, read and read * 1e9, threads=threads))] * count
        assert parse_machines("+".join(groups)) == AssumedMachines(tuple(machines)), groups


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", 1, "expected memory such as 16GB, or machines such as 3x16GB, found the end"),
        ("three computers", 1, "expected memory such as 16GB, or machines such as 3x16GB, found 'three computers'"),
        ("3x16", 3, "expected memory such as 16GB, or machines such as 3x16GB, found '16'"),
        ("3x16GB@40GB/s+", 15, "expected memory"),
        ("3x16GB@40", 7, "expected the bandwidth of reading memory as @25GB/s, or the kind of memory as @DDR3"),
        ("3x16GB@40GB/s + 16GB@25GB, 1Gbit", 21, "the bandwidth of reading memory as @25GB/s"),
        ("16GB@DDR7", 5, "or the kind of memory as @DDR3, @DDR4 or @DDR5, found '@DDR7'"),
        ("16GB@DDR4x99", 5, "1 to 24 channels of memory"),
        ("16GB@DDR4-000", 5, "above 0"),
        ("3x16GB x 2", 1, "the number of machines only once"),
        ("3x16GB@40GB/s 1Gbit", 15, 'expected "+" and further machines, or "," and the network'),
        ("3x16GB 2x8GB", 8, 'expected "+" before machines that differ, as in "3x16GB + 8GB", found \'2x8GB\''),
        ("3x16GB, 2x8GB", 9, 'expected "+" before machines that differ'),
        ("3x16GB, 1Gbit, 8GB x 2", 16, 'expected "+" before machines that differ'),
        ("3x16GB@40GB/s,", 15, "network's speed"),
        ("3x16GB@40GB/s,0.3ms", 15, "network's speed"),
        ("3x16GB@40GB/s,0Gbit", 15, "above 0"),
        ("3x16GB@40GB/s,1Gbit,fast", 21, "round trip as 0.3ms, found 'fast'"),
        ("3x16GB@40GB/s,1Gbit,1ms,1ms", 24, 'expected "+"'),
        ("0x16GB@40GB/s", 1, "above 0"),
        ("16GB@0GB/s", 5, "above 0"),
        ("16GB@40GB/s/0", 12, "1 to 1024 threads a machine"),
        ("16GB@40GB/s/9999", 12, "expected 1 to 1024 threads a machine, found '/9999'"),
        ("0GB@40GB/s", 1, "above 0"),
        ("999999999TB@40GB/s", 1, "at most 1024 TB of memory, found '999999999TB@"),
        ("16GB@40GB/s+1025TB@900GB/s gpu", 13, "at most 1024 TB of memory, found '1025TB@"),
        ("60x16GB@40GB/s+5x16GB@40GB/s", 16, "at most 64 machines, found '5x16GB@40GB/s'"),
        ("9999x16GB@40GB/s", 1, "at most 64 machines"),
        ("24GB@900GB/s gpu", 1, "a machine before its GPU"),
        ("16GB + 24GB gpu", 8, "the bandwidth of a GPU's memory"),
        ("16GB@40GB/s+24GB@900GB/s/8 gpu", 13, "a GPU's speed as @TOPS, not /THREADS"),
        ("16GB@40GB/s+9x24GB@900GB/s gpu", 13, "8 GPUs"),
        ("16GB + 9x rtx3090", 8, "8 GPUs"),
        ("rtx3090", 1, "a machine before its GPU, as in '64GB@60GB/s + rtx3090'"),
        ("16GB + rtx3091", 8, "the name of a GPU (rtx3090, "),
        ("16GB + a very fast one", 8, "the name of a GPU (rtx3090, p40, h100, ...) or its memory and bandwidth"),
        ("16GB + 0x p40", 8, "above 0"),
        ("16GB + 2x p40 x2", 8, "the number of GPUs only once"),
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
    letters = "0123456789.xGTB@/s+,gpubitmDR- \t\n\x00é×" * 2
    for _ in range(3000):
        text = list("2x16GB@DDR4-3200x2/4+8GBx2@40GB/s+24GB@900GB/s@100TOPS gpu+rtx 3090 x2,1Gbit,0.3ms")
        for _ in range(source.randint(1, 5)):
            text[source.randrange(len(text))] = source.choice(letters)
        try:
            parse_machines("".join(text))
        except UsageError as error:
            assert "\n" not in str(error), text
