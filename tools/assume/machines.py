"""Dataclasses that describe machines and the network between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_MACHINES: Final = 64
MAX_GPUS_EACH: Final = 8
MAX_THREADS: Final = 1024
MAX_MEMORY_TIB: Final = 1024
"""Maximum memory of a processor or a GPU. It is limited so that the bytes of all machines together fit in 64 bits."""
MAX_CHANNELS: Final = 24
EXAMPLE: Final = "3x16GB@40GB/s,1Gbit"
GPU_EXAMPLE: Final = "64GB@60GB/s + rtx3090"


@dataclass(frozen=True, slots=True)
class Ddr:
    """A type of DDR memory, as the user described it."""

    generation: int  # 3, 4 or 5
    channels: int | None = None
    megatransfers_s: int | None = None  # Million transfers per second. Each transfers 8 bytes on one channel.


@dataclass(frozen=True, slots=True)
class Device:
    memory_bytes: int
    bandwidth: float | Ddr | None = None  # Bytes per second, or the kind of memory.
    macs_s: float | None = None
    threads: int | None = None
    gpu_name: str = ""  # A key of `gpu_models.GPU_MODELS`, or empty.
    has_matrix_units: bool = True  # False for a GPU without 8-bit matrix units.


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: Device
    gpus: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """The network between all machines. A field is None if the user did not give its value."""

    bits_s: float | None = None
    round_trip_s: float | None = None


@dataclass(frozen=True, slots=True)
class AssumedMachines:
    machines: tuple[Machine, ...]
    network: Network = Network()
