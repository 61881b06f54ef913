"""Assumptions about machines that were not measured: default values, and the shares of hardware limits that kernels
reach. Sources: cluster/planner/product_times.py for processors, docs/gpu.md for GPUs, benchmarks/notebook.md for the
costs of a message between stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from llamaclust.cluster.planner.costs import EXCHANGE_BYTE_S, EXCHANGE_S
from llamaclust.cluster.planner.gathers import GATHER_S, HIDDEN_SHARE
from llamaclust.cluster.planner.links import COORDINATOR, Link, Links
from llamaclust.cluster.planner.product_times import RATES, READ_SHARE
from llamaclust.cluster.planner.roofline import LAUNCHES_S, LAYER_S, ROW_MACS
from llamaclust.core.profile import DeviceProfile
from llamaclust.tools.assume.machines import AssumedMachines, Ddr, Device, Network

_GIB: Final = 1 << 30
GPU_DECODE_SHARE: Final = 0.80
GPU_PREFILL_SHARE: Final = 0.35
OLD_GPU_PREFILL_SHARE: Final = 0.15
"""Share of the peak 8-bit speed that prefill reaches on GPUs without 8-bit matrix units."""
CHANNEL_BYTES_S: Final = {3: 10e9, 4: 20e9, 5: 30e9}
CHANNELS: Final = 2
DEFAULT_MEMORY: Final = Ddr(4)
SYSTEM_BYTES: Final = 2 * _GIB
GPU_RESERVED_BYTES: Final = _GIB // 2
THREADS: Final = 4
THREAD_MACS_S: Final = 90e9
GPU_MACS_S: Final = 50e12
NETWORK_BITS_S: Final = 1e9
NETWORK_SHARE: Final = 0.94
ROUND_TRIP_S: Final = 0.1e-3
"""Seconds of a round trip through a switch, between threads that poll their sockets."""
HOP_S: Final = 0.3e-3
"""Seconds that both processes add to a message between stages: thread wake-ups and Python code."""


def read_bytes_s(device: Device) -> float:
    memory = device.bandwidth or DEFAULT_MEMORY
    return memory if isinstance(memory, float) else _modules_bytes_s(memory)


def _modules_bytes_s(memory: Ddr) -> float:
    speed = memory.megatransfers_s
    channel_bytes_s = CHANNEL_BYTES_S[memory.generation] if speed is None else 8e6 * speed
    return channel_bytes_s * (memory.channels or CHANNELS)


def cpu_profile(device: Device) -> DeviceProfile:
    macs_s = threads_of(device) * THREAD_MACS_S if device.macs_s is None else device.macs_s
    return DeviceProfile(read_bytes_s(device), macs_s)


def gpu_profile(device: Device) -> DeviceProfile:
    share = GPU_PREFILL_SHARE if device.has_matrix_units else OLD_GPU_PREFILL_SHARE
    return DeviceProfile(GPU_DECODE_SHARE * read_bytes_s(device), share * (device.macs_s or GPU_MACS_S))


def threads_of(device: Device) -> int:
    return THREADS if device.threads is None else device.threads


def bits_s(network: Network) -> float:
    return network.bits_s or NETWORK_BITS_S


def round_trip_s(network: Network) -> float:
    return ROUND_TRIP_S if network.round_trip_s is None else network.round_trip_s


def links_of(network: Network, names: list[str]) -> Links:
    """Returns the links between all machines. The coordinator runs on the first machine and has links to the others."""
    one_way_s = round_trip_s(network) / 2
    link = Link(one_way_s + HOP_S, 8 / (NETWORK_SHARE * bits_s(network)), one_way_s)
    pairs = {frozenset((one, other)) for one in names for other in names if one != other}
    return Links(dict.fromkeys(pairs | {frozenset((COORDINATOR, name)) for name in names[1:]}, link))


def assumptions(assumed: AssumedMachines) -> Iterator[str]:
    cpus = [machine.cpu for machine in assumed.machines]
    yield from _memories(cpus)
    gpus = [gpu for machine in assumed.machines for gpu in machine.gpus]
    shares = [rates.peak_share for rates in RATES.values()]
    speed = f"{READ_SHARE:.2f} of the memory bandwidth"
    yield f"decode: weights are read at {speed}, slower for types that take long to decode"
    yield f"prefill: {min(shares):.2f} to {max(shares):.2f} of the 8-bit peak, by weight type"
    yield f"overhead: {1e6 * LAYER_S:.0f} µs per layer, and {ROW_MACS} multiply-accumulates per channel of each row"
    if any(cpu.macs_s is None for cpu in cpus):
        default = "" if all(cpu.threads for cpu in cpus if cpu.macs_s is None) else f"{THREADS} threads a machine, "
        peak = f"{THREAD_MACS_S / 1e9:.0f} GMAC/s a thread"
        yield f"{default}{peak} (AVX2 at 3 GHz; give /THREADS or @TOPS if you know better)"
        if any(cpu.macs_s is None and _is_old(cpu) for cpu in cpus):
            yield "DDR3 machines before 2013 have no AVX2: several times slower prefill than predicted"
    yield f"{SYSTEM_BYTES // _GIB} GiB of each machine are left to its system and the program"
    if gpus:
        yield (
            f"GPUs, not measured yet: decode at {GPU_DECODE_SHARE:.2f} of their bandwidth, "
            f"prefill at {GPU_PREFILL_SHARE:.2f} of the 8-bit peak, "
            f"{2 * GPU_MACS_S / 1e12:.0f} TOPS without @TOPS; {GPU_RESERVED_BYTES >> 20} MiB left to the driver; "
            f"{1e6 * LAUNCHES_S:.0f} µs a layer to launch kernels, "
            f"{1e6 * EXCHANGE_S:.0f} µs more where its experts are in RAM, at {1e-9 / EXCHANGE_BYTE_S:.0f} GB/s"
        )
    yield from map(_data_sheet, dict.fromkeys(gpu for gpu in gpus if gpu.gpu_name))
    if len(assumed.machines) > 1:
        yield from _network(assumed.network)
    yield "short contexts: attention over thousands of tokens takes more"


def _data_sheet(gpu: Device) -> str:
    figures = f"{gpu.memory_bytes / _GIB:g} GiB at {read_bytes_s(gpu) / 1e9:g} GB/s"
    peak = f"{2 * (gpu.macs_s or GPU_MACS_S) / 1e12:g} TOPS"
    old = (
        ""
        if gpu.has_matrix_units
        else f", prefill at {OLD_GPU_PREFILL_SHARE:.2f} of that without matrix units for bytes"
    )
    return f"{gpu.gpu_name} by its data sheet: {figures}, {peak}{old}"


def _is_old(cpu: Device) -> bool:
    return isinstance(cpu.bandwidth, Ddr) and cpu.bandwidth.generation == 3


def _memories(cpus: Sequence[Device]) -> Iterator[str]:
    for kind in dict.fromkeys(cpu.bandwidth for cpu in cpus if not isinstance(cpu.bandwidth, float)):
        memory = kind or DEFAULT_MEMORY
        channels = {1: "one channel", 2: "two channels"}.get(memory.channels or CHANNELS, f"{memory.channels} channels")
        speed = "" if memory.megatransfers_s is None else f"-{memory.megatransfers_s}"
        known = f"{_modules_bytes_s(memory) / 1e9:g} GB/s, DDR{memory.generation}{speed} in {channels}"
        advice = "" if kind else " (none given; add @DDR3, @DDR5, @DDR4x1 for one channel, or @25GB/s)"
        yield f"memory is read at {known}{advice}"


def _network(network: Network) -> Iterator[str]:
    rate_advice = ' (default; set it with ", 2.5Gbit")' if network.bits_s is None else ""
    trip_advice = ' (default; set it with ", 0.3ms")' if network.round_trip_s is None else ""
    yield (
        f"network: {bits_s(network) / 1e9:g} Gbit/s{rate_advice}, of which {100 * NETWORK_SHARE:.0f} % is usable; "
        f"round trip {1e3 * round_trip_s(network):g} ms{trip_advice}"
    )
    yield (
        f"a message between stages takes half a round trip + {1e3 * HOP_S:g} ms; "
        f"a gather, half a round trip + {1e6 * GATHER_S:.0f} µs; "
        f"up to {100 * HIDDEN_SHARE:.0f} % of a prompt's gather bytes overlap with computation"
    )
