"""What is assumed of machines that nobody measured: shares of their limits that kernels reach, and what is not given.

Shares are those of docs/kernels.md ("All types") and docs/gpu.md; what a hop costs beside the network is in
docs/roadmap.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from llamaclust.cluster.planner.links import COORDINATOR, Link, Links
from llamaclust.core.profile import DeviceProfile
from llamaclust.tools.assume.machines import Assumed, Device, Network

_GIB: Final = 1 << 30
DECODE_SHARE: Final = 0.80
PREFILL_SHARE: Final = 0.50
GPU_PREFILL_SHARE: Final = 0.35
SYSTEM_BYTES: Final = 2 * _GIB
"""Of each machine, for its system and the program itself."""
GPU_RESERVED_BYTES: Final = _GIB // 2
THREADS: Final = 4
THREAD_MACS_S: Final = 90e9
GPU_MACS_S: Final = 50e12
NETWORK_BITS_S: Final = 1e9
NETWORK_SHARE: Final = 0.94
ROUND_TRIP_S: Final = 0.3e-3
HOP_S: Final = 0.3e-3
"""Of two processes: threads that wake up, and Python on both sides."""


def cpu_profile(device: Device) -> DeviceProfile:
    macs_s = threads_of(device) * THREAD_MACS_S if device.macs_s is None else device.macs_s
    return DeviceProfile(DECODE_SHARE * device.read_bytes_s, PREFILL_SHARE * macs_s)


def gpu_profile(device: Device) -> DeviceProfile:
    return DeviceProfile(DECODE_SHARE * device.read_bytes_s, GPU_PREFILL_SHARE * (device.macs_s or GPU_MACS_S))


def threads_of(device: Device) -> int:
    return THREADS if device.threads is None else device.threads


def links_of(network: Network, names: list[str]) -> Links:
    """Between all machines, and to the coordinator, which is on the first one."""
    round_trip_s = ROUND_TRIP_S if network.round_trip_s is None else network.round_trip_s
    link = Link(round_trip_s / 2 + HOP_S, 8 / (NETWORK_SHARE * (network.bits_s or NETWORK_BITS_S)))
    pairs = {frozenset((one, other)) for one in names for other in names if one != other}
    return Links(dict.fromkeys(pairs | {frozenset((COORDINATOR, name)) for name in names[1:]}, link))


def assumptions(assumed: Assumed) -> Iterator[str]:
    """What was assumed, a line each."""
    cpus = [machine.cpu for machine in assumed.machines]
    gpus = [gpu for machine in assumed.machines for gpu in machine.gpus]
    yield (
        f"decode reads weights at {DECODE_SHARE:.2f} of the memory bandwidth, prefill multiplies at "
        f"{PREFILL_SHARE:.2f} of the 8-bit peak"
    )
    if any(cpu.macs_s is None for cpu in cpus):
        default = "" if all(cpu.threads for cpu in cpus if cpu.macs_s is None) else f"{THREADS} threads a machine, "
        peak = f"{THREAD_MACS_S / 1e9:.0f} GMAC/s a thread"
        yield f"{default}{peak} (AVX2 at 3 GHz; say /THREADS or @TOPS where you know better)"
    yield f"{SYSTEM_BYTES // _GIB} GiB of each machine are left to its system and the program"
    if gpus:
        yield (
            f"GPUs, not measured yet: prefill at {GPU_PREFILL_SHARE:.2f} of the 8-bit peak, "
            f"{2 * GPU_MACS_S / 1e12:.0f} TOPS unless @TOPS says; {GPU_RESERVED_BYTES >> 20} MiB left to the driver"
        )
    if len(assumed.machines) > 1:
        bits_s = assumed.network.bits_s
        round_trip_s = ROUND_TRIP_S if assumed.network.round_trip_s is None else assumed.network.round_trip_s
        speed = f"{(bits_s or NETWORK_BITS_S) / 1e9:g} Gbit/s" + (" (none given)" if bits_s is None else "")
        default = " (none given)" if assumed.network.round_trip_s is None else ""
        yield (
            f"a network of {speed}, used to {NETWORK_SHARE:.2f}, round trip {1e3 * round_trip_s:g} ms{default}, "
            f"and {1e3 * HOP_S:g} ms of the programs a hop"
        )
    yield "short contexts: attention over thousands of tokens takes more"
