"""A worker's processor and GPUs, the memory that it may take on each device, and their measured speeds."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

from llamaclust.core.errors import ProtocolError
from llamaclust.core.gpus import DeviceLayers, Gpu, gpu_names
from llamaclust.core.profile import Profile
from llamaclust.core.sizes import MIB
from llamaclust.core.this_machine import machine_id
from llamaclust.kernels.backend import Backend, ExpertsBackend, Progress, with_own_threads
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.kernels.split_experts import SplitExpertsBackend
from llamaclust.model.loader import Model
from llamaclust.wire.control.messages import Load, Register
from llamaclust.worker.devices import backends, system_info
from llamaclust.worker.devices.backends import GpuBackend
from llamaclust.worker.devices.cores import physical_cores, read_cores
from llamaclust.worker.devices.encoder_limits import ENCODER_NICENESS
from llamaclust.worker.settings import WorkerSettings

_CPU = "cpu"
_REFERENCE = "reference"


@dataclass(slots=True)
class Device:
    kind: str
    threads: int
    feature_level: str  # The requested feature level, or "" for the best.
    memory_cap_bytes: int | None
    backend: Backend
    gpus: tuple[GpuBackend, ...] = ()
    gpu_layers: int | None = None
    kv_disk_bytes: int = 0

    @classmethod
    def open(cls, settings: WorkerSettings) -> Device:
        threads = settings.threads or physical_cores()
        level, folder = settings.feature_level, settings.packed_cache_dir
        packed_cache = None if folder is None else PackedCacheFolder(folder, settings.packed_cache_bytes)
        backend = backends.open_processor(settings.device, threads, level, packed_cache, mlock=settings.mlock)
        cap, kernels = settings.gpu_memory_bytes, settings.kernels_dir
        gpus = tuple(
            backends.open_gpu(name, threads, cap, packed_cache, kernels) for name in gpu_names(settings.device)
        )
        kv_disk_bytes = settings.kv_disk_bytes or 0
        return cls(
            settings.device, threads, level, settings.memory_bytes, backend, gpus, settings.gpu_layers, kv_disk_bytes
        )

    def close(self) -> None:
        for gpu in self.gpus:
            gpu.close()

    @property
    def free_memory_bytes(self) -> int:
        available = system_info.available_memory_bytes()
        if self.memory_cap_bytes is None:
            return available
        return max(0, min(available, self.memory_cap_bytes - system_info.resident_bytes()))

    def layers(self, order: Load) -> tuple[DeviceLayers, ...]:
        return order.devices or (DeviceLayers(_CPU, order.start, order.end),)

    def backend_of(self, name: str) -> Backend:
        known: dict[str, Backend] = {_CPU: self.backend} | {gpu.device: gpu for gpu in self.gpus}
        if name not in known:
            raise ProtocolError(f"layers are planned for device {name!r}, but this worker has {', '.join(known)}")
        return known[name]

    @property
    def encoder_backend(self) -> Backend:
        return with_own_threads(self.backend, ENCODER_NICENESS)

    def free_bytes_of(self, name: str) -> int:
        return next((gpu.free_bytes for gpu in self.gpus if gpu.device == name), self.free_memory_bytes)

    def backend_for(self, held: Iterable[DeviceLayers], *, apart: bool = False) -> Backend:
        """Returns a backend for layers on one or several devices. `apart` gives a CPU backend its own threads."""
        parts = [BackendLayers(self._backend_for(part), part.start, part.end) for part in held]
        if apart:
            parts = [replace(part, backend=with_own_threads(part.backend)) for part in parts]
        return parts[0].backend if len(parts) == 1 else MultiDeviceBackend(parts)

    def _backend_for(self, part: DeviceLayers) -> Backend:
        if not part.cpu_moe:
            return self.backend_of(part.device)
        gpu = next((gpu for gpu in self.gpus if gpu.device == part.device), None)
        if gpu is None:
            raise ProtocolError(f"layers are planned for {part.device}, but this worker has no such GPU")
        experts = cast(ExpertsBackend, self.backend)  # A worker with GPUs has a CPU backend here.
        return SplitExpertsBackend(gpu, experts, part.cpu_moe, part.experts_cache_bytes)

    def measure(
        self, model: Model | None, quant_types: Iterable[int], progress: Progress = lambda n_bytes: None
    ) -> Profile:
        """Measures the machine, a model's step times, and matrix products with `quant_types`. Takes seconds.
        `progress` is called often, and ends the measurement if it raises an error."""
        from llamaclust.kernels.probes import measure_machine
        from llamaclust.worker.devices.product_profiler import measure_products
        from llamaclust.worker.devices.profiler import ProfiledDevice, try_stages

        progress(0)
        threads, level = self.threads, self.feature_level
        cpu = measure_machine(threads)
        if self.kind != _REFERENCE:
            cpu = replace(cpu, products=measure_products(quant_types, threads, level, self.free_memory_bytes))
        gpus = [gpu.measure() for gpu in self.gpus]
        if model is not None:
            if self.kind != _REFERENCE:
                device = ProfiledDevice(self.backend, threads, level, self.free_memory_bytes, os.getpid())
                cpu = replace(cpu, concurrent=try_stages(replace(device, progress=progress), model))
            for index, gpu in enumerate(self.gpus):
                device = replace(ProfiledDevice.gpu(gpu, threads, level), progress=progress)
                gpus[index] = replace(gpus[index], concurrent=try_stages(device, model))
        return Profile(cpu, tuple(gpus))

    def registration(self, name: str, address: str, link_address: str) -> Register:
        level = self.backend.feature_level
        gpus = tuple(gpu.gpu() for gpu in self.gpus)
        return Register(
            name=name,
            pid=os.getpid(),
            host=socket.gethostname(),
            machine=machine_id(),
            memory_group=system_info.memory_group(),
            address=address,
            device=self.kind,
            threads=self.threads,
            feature_level=level,
            total_memory_bytes=system_info.total_memory_bytes(),
            free_memory_bytes=max(0, self.free_memory_bytes - system_info.LOADING_BYTES),
            fingerprint=_fingerprint(self.kind, self.threads, level, gpus, len(os.sched_getaffinity(0))),
            machine_free_bytes=system_info.available_memory_bytes(),
            numerics_version=self.backend.numerics_version,
            gpus=gpus,
            gpu_layers=self.gpu_layers,
            kv_disk_bytes=self.kv_disk_bytes,
            link_address=link_address,
        )


def gpus_of(device: str, gpu_memory_bytes: int | None) -> tuple[Gpu, ...]:
    found = []
    for name in gpu_names(device):
        gpu = backends.open_gpu(name, 1, gpu_memory_bytes)
        found.append(gpu.gpu())
        gpu.close()
    return tuple(found)


def fingerprint(
    kind: str, threads: int, feature_level: str, gpus: tuple[Gpu, ...] = (), numa_node: int | None = None
) -> str:
    """Returns a text that is equal for workers with equal devices. Raises UsageError if `kind` is not available."""
    level = backends.open_processor(kind, 1, feature_level).feature_level
    cores = read_cores() if numa_node is None else read_cores().on_node(numa_node)
    return _fingerprint(kind, threads, level, gpus, len(cores.hardware_threads))


def _fingerprint(kind: str, threads: int, level: str, gpus: tuple[Gpu, ...], cores: int) -> str:
    alike = Counter(f"{gpu.name} with {gpu.total_bytes // MIB} MiB" for gpu in gpus)
    beside = "".join(f", {count} x {gpu}" for gpu, count in alike.items())
    return f"{system_info.processor_name()}, {cores} cores, {threads} threads, {kind} {level}{beside}"


def check_devices(devices: Iterable[tuple[str, str]], model: Model) -> None:
    """Raises UsageError if a (kind, feature level) is missing here, or ModelFileError if no kernels fit the model."""
    for kind, feature_level in sorted(set(devices)):
        backends.open_processor(kind, 1, feature_level)
        if kind != _REFERENCE:
            from llamaclust.kernels.packed.weights import check_weights

            program = model.program(0, model.layer_count)
            check_weights(program, model.tensors_for(program))
