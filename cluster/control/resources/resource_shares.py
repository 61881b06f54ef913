"""Computes each worker's share of its machine's memory and GPUs. Makes the keys of stored measurements."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.gpus import Gpu
from llamaclust.core.version import VERSION


def memory_shares(caps_bytes: Mapping[str, int | None], free_bytes: int) -> dict[str, int]:
    """Divides `free_bytes` equally. A worker with a cap gets at most its cap, and other workers share the rest."""
    shares, left = {}, free_bytes
    caps = sorted((free_bytes if cap is None else cap, name) for name, cap in caps_bytes.items())
    for index, (cap, name) in enumerate(caps):
        shares[name] = min(cap, left // (len(caps) - index))
        left -= shares[name]
    return shares


@dataclass(frozen=True, slots=True)
class WorkerResources:
    machine: str
    free_memory_bytes: int  # Free memory for this worker.
    machine_free_bytes: int = 0  # Free memory for all workers of the machine together. 0 if it is unknown.
    gpus: tuple[Gpu, ...] = ()
    gpu_layers: int | None = None
    memory_group: str = ""  # Control group that limits the worker's memory. "" if there is none.
    threads: int = 1
    accepts_links: bool = False  # True if members of a group can connect to the worker.
    is_fresh: bool = False  # True if the memory was reported after the registration. It then limits the share.
    measuring_bytes: int = 0  # Bytes that measurements have taken since `machine_free_bytes` was reported.

    @property
    def joins_groups(self) -> bool:
        return self.accepts_links and not self.gpus

    @classmethod
    def of(cls, worker: WorkerHandle) -> WorkerResources:
        registration, fresh, taken_bytes = worker.registration, worker.fresh_memory, worker.measuring_bytes
        return cls(
            registration.machine,
            max(0, registration.free_memory_bytes - taken_bytes) if fresh is None else fresh.free_bytes,
            max(registration.machine_free_bytes, 0 if fresh is None else fresh.free_bytes),
            registration.gpus if fresh is None else fresh.gpus,
            registration.gpu_layers,
            registration.memory_group,
            registration.threads,
            bool(registration.link_address) and not worker.closed_port,
            is_fresh=fresh is not None,
            measuring_bytes=taken_bytes,
        )


def machine_shares(workers: Mapping[str, WorkerResources]) -> dict[str, int]:
    """Divides each machine's free memory among its workers. A control group with a memory limit counts as a machine."""
    shares: dict[str, int] = {}
    for place in {(worker.machine, worker.memory_group) for worker in workers.values()}:
        here = {name: worker for name, worker in workers.items() if (worker.machine, worker.memory_group) == place}
        free = min(worker.machine_free_bytes or worker.free_memory_bytes for worker in here.values())
        left = max(0, free - sum(worker.measuring_bytes for worker in here.values()))
        shares |= memory_shares({name: worker.free_memory_bytes for name, worker in here.items()}, left)
    return shares


def share_gpus(workers: Mapping[str, WorkerResources]) -> dict[str, WorkerResources]:
    """Divides each GPU's free memory among its workers. GPUs are identified by UUID, because their names may differ."""

    def identity(worker: WorkerResources, gpu: Gpu) -> str:
        return gpu.uuid or f"{gpu.device} of {worker.machine}"

    sharers = Counter(identity(worker, gpu) for worker in workers.values() for gpu in worker.gpus)

    def share(worker: WorkerResources, gpu: Gpu) -> Gpu:
        return replace(gpu, free_bytes=gpu.free_bytes // sharers[identity(worker, gpu)])

    return {
        name: replace(worker, gpus=tuple(share(worker, gpu) for gpu in worker.gpus)) for name, worker in workers.items()
    }


_STEPS_UNIT = 2

_KEY = re.compile(r"(?P<hardware>.*), one of (?P<sharers>\d+) workers with \d+ threads(?P<model>.*)")


def measurement_key(fingerprint: str, sharers: int, threads: int, model_id: str = "") -> str:
    """Returns the key of a stored measurement. `model_id` is "" if the measurement did not time steps of a model."""
    profiled = f", model {model_id[:32]}, unit {_STEPS_UNIT}" if model_id else ""
    return f"{fingerprint}, one of {sharers} workers with {threads} threads, program {VERSION}{profiled}"


def most_similar_key(key: str, known: Iterable[str]) -> str | None:
    """Returns `key` if it is known, or else the key with equal hardware and model and the closest number of workers."""
    wanted = _KEY.fullmatch(key)
    assert wanted is not None
    found = [match for other in known if (match := _KEY.fullmatch(other)) is not None]
    alike = [match for match in found if match["hardware"] == wanted["hardware"] and match["model"] == wanted["model"]]
    sharers = int(wanted["sharers"])
    nearest = min(alike, key=lambda match: (match[0] != key, abs(int(match["sharers"]) - sharers)), default=None)
    return None if nearest is None else nearest[0]
