"""What a worker computes on: its backend, the memory it may take and what the machine reaches."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from llamaclust.errors import UsageError
from llamaclust.kernels.backend import Backend
from llamaclust.kernels.cpu.prepared_files import PreparedFolder
from llamaclust.model.loader import Model
from llamaclust.wire.control import Measured, Register, StageTrial
from llamaclust.worker.machine import available_memory_bytes, processor_name, resident_bytes, total_memory_bytes
from llamaclust.worker.settings import WorkerSettings


@dataclass(slots=True)
class Device:
    """A backend and its share of the machine."""

    kind: str
    threads: int
    feature_level: str  # as asked for; "" is the best there is
    memory_cap_bytes: int | None
    backend: Backend

    @classmethod
    def open(cls, settings: WorkerSettings) -> Device:
        """UsageError for a device or feature level that this machine does not have."""
        threads = settings.threads or len(os.sched_getaffinity(0))
        level = settings.feature_level
        backend = _backend(settings.device, threads, level, _prepared(settings))
        return cls(settings.device, threads, level, settings.memory_bytes, backend)

    @property
    def free_memory_bytes(self) -> int:
        """What may still be taken: of the machine, and of the cap that holds for all this process has."""
        available = available_memory_bytes()
        if self.memory_cap_bytes is None:
            return available
        return max(0, min(available, self.memory_cap_bytes - resident_bytes()))

    def measure(self, model: Model | None = None) -> Measured:
        """What the machine reaches, and what steps of the model take; blocks for a second, longer for large layers."""
        from llamaclust.kernels.probes import measure_machine
        from llamaclust.worker.trial import TrialDevice, try_stages

        speed = measure_machine(self.threads)
        trials: tuple[StageTrial, ...] = ()
        if model is not None and self.kind == "cpu":
            device = TrialDevice(self.backend, self.threads, self.feature_level, self.free_memory_bytes)
            trials = try_stages(device, model)
        return Measured(speed.read_gb_s * 1e9, speed.int8_gmac_s * 1e9, trials)

    def registration(self, name: str, address: str) -> Register:
        level = self.backend.feature_level
        return Register(
            name=name,
            pid=os.getpid(),
            host=socket.gethostname(),
            address=address,
            device=self.kind,
            threads=self.threads,
            feature_level=level,
            total_memory_bytes=total_memory_bytes(),
            free_memory_bytes=self.free_memory_bytes,
            fingerprint=fingerprint(self.kind, self.threads, level),
            machine_free_bytes=available_memory_bytes(),
            numerics_version=self.backend.numerics_version,
        )


def fingerprint(kind: str, threads: int, feature_level: str) -> str:
    """Of this machine as such a device uses it; a feature level of "" is the best there is. UsageError for one that is
    not available here."""
    cores = len(os.sched_getaffinity(0))
    level = _backend(kind, 1, feature_level).feature_level
    return f"{processor_name()}, {cores} cores, {threads} threads, {kind} {level}"


def check_devices(devices: Iterable[tuple[str, str]], model: Model) -> None:
    """What is clear of devices, each with its feature level, before a start and without reading weights.

    UsageError for what this machine does not have, ModelFileError where a device cannot run the model.
    """
    for kind, feature_level in sorted(set(devices)):
        _backend(kind, 1, feature_level)
        _check_model(kind, model)


def _check_model(kind: str, model: Model) -> None:
    if kind == "cpu":
        from llamaclust.kernels.cpu.weights import check_weights

        program = model.program(0, model.layer_count)
        check_weights(program, model.tensors_for(program))


def _backend(device: str, threads: int, feature_level: str, prepared: PreparedFolder | None = None) -> Backend:
    if device == "cpu":
        from llamaclust.kernels.cpu.backend import CpuBackend

        return CpuBackend(threads, feature_level, prepared=prepared)
    if device == "reference":
        from llamaclust.kernels.reference.backend import ReferenceBackend

        return ReferenceBackend()
    raise UsageError(f"device {device!r}: only cpu and reference are supported")


def _prepared(settings: WorkerSettings) -> PreparedFolder | None:
    if settings.prepared_dir is None:
        return None
    return PreparedFolder(settings.prepared_dir, settings.prepared_bytes)
