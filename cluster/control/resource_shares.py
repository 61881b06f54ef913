"""How the workers of a cluster file share this machine: threads, memory, and by what their measurements are known."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.launchers.base import WorkerSpec
from llamaclust.core.gpus import Gpu
from llamaclust.wire.control.messages import Register


def thread_shares(config: ClusterConfig) -> dict[str, int]:
    """Threads of each worker: those that name none share this machine's cores out."""
    share = max(1, len(os.sched_getaffinity(0)) // len(config.workers))
    return {worker.name: worker.threads or share for worker in config.workers}


def worker_specs(config: ClusterConfig) -> list[WorkerSpec]:
    threads, variables = thread_shares(config), environment()
    return [
        WorkerSpec(
            worker.name,
            worker.device,
            threads[worker.name],
            worker.memory,
            variables.feature_level or "",
            variables.prepared_dir if variables.prepared_bytes else None,
            variables.prepared_bytes,
            variables.log_format,
            config.name,
            variables.weights_dir if variables.weights_bytes else None,
            variables.weights_bytes,
            variables.kernels_dir,
            worker.gpu_layers,
            worker.gpu_memory,
        )
        for worker in config.workers
    ]


def memory_shares(caps_bytes: Mapping[str, int | None], free_bytes: int) -> dict[str, int]:
    """What each worker may take: its cap at most, and all together what is free. Small caps leave the others more."""
    shares, left = {}, free_bytes
    caps = sorted((free_bytes if cap is None else cap, name) for name, cap in caps_bytes.items())
    for index, (cap, name) in enumerate(caps):
        shares[name] = min(cap, left // (len(caps) - index))
        left -= shares[name]
    return shares


def machine_shares(registrations: Mapping[str, Register]) -> dict[str, int]:
    """What each worker may take, by name: those of one machine share out what is free there."""
    shares: dict[str, int] = {}
    for host in {one.host for one in registrations.values()}:
        here = {name: one for name, one in registrations.items() if one.host == host}
        free = min(one.machine_free_bytes or one.free_memory_bytes for one in here.values())
        shares |= memory_shares({name: one.free_memory_bytes for name, one in here.items()}, free)
    return shares


@dataclass(frozen=True, slots=True)
class WorkerGpus:
    """A worker's GPUs, of which it may take what is said to be free, and how many layers its user wants there."""

    gpus: tuple[Gpu, ...]
    gpu_layers: int | None


def gpu_shares(registrations: Mapping[str, Register]) -> dict[str, WorkerGpus]:
    """Of the workers that have GPUs, by name."""
    with_gpus = {name: one for name, one in registrations.items() if one.gpus}
    return shared_gpus(
        {name: one.host for name, one in with_gpus.items()},
        {name: WorkerGpus(one.gpus, one.gpu_layers) for name, one in with_gpus.items()},
    )


def shared_gpus(hosts: Mapping[str, str], workers: Mapping[str, WorkerGpus]) -> dict[str, WorkerGpus]:
    """Workers that have the same GPU share out what is free there. What a worker calls cuda:0 may be another one's
    cuda:1: as far as it is known, its own identity counts."""

    def identity(name: str, gpu: Gpu) -> str:
        return gpu.uuid or f"{gpu.device} of {hosts[name]}"

    sharers = Counter(identity(name, gpu) for name, one in workers.items() for gpu in one.gpus)

    def share(name: str, gpu: Gpu) -> Gpu:
        return replace(gpu, free_bytes=gpu.free_bytes // sharers[identity(name, gpu)])

    return {name: replace(one, gpus=tuple(share(name, gpu) for gpu in one.gpus)) for name, one in workers.items()}


def measurement_key(fingerprint: str, company: int, threads: int, model_id: str = "") -> str:
    """Equal where measurements would come out equal: `company` workers with `threads` in all share the machine. With a
    model where its steps were tried."""
    tried = f", model {model_id[:32]}" if model_id else ""
    return f"{fingerprint}, one of {company} workers with {threads} threads{tried}"
