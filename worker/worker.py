"""The parts of a worker that outlive a membership."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from llamaclust.core.errors import UsageError
from llamaclust.kernels._native import tls_library
from llamaclust.wire.rpc.server import Handler
from llamaclust.wire.security.credentials import Credentials, Identity
from llamaclust.worker.devices.cores import read_cores
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.groups.listener import LinkListener, link_address
from llamaclust.worker.kv_disk.folder import KvFolder
from llamaclust.worker.kv_disk.kv_disk import KvDisk
from llamaclust.worker.readiness import Readiness
from llamaclust.worker.seen_terms import SeenTerms
from llamaclust.worker.service import StageService
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.weights.weights import Weights, weight_cache

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Worker:
    name: str
    device: Device
    service: StageService
    compute: Compute
    weights: Weights
    readiness: Readiness = field(default_factory=Readiness)
    terms: SeenTerms = field(default_factory=SeenTerms)
    kv_disk: KvDisk | None = None  # None if KV memory is not kept on disk.
    links: LinkListener = field(default_factory=LinkListener)
    # Held by loads and measurements, which need the whole machine.
    exclusive: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def open(cls, settings: WorkerSettings) -> Worker:
        """Opens the device and the caches. Raises UsageError if the device is missing or cannot keep KV on disk."""
        kv_disk = _open_kv_disk(settings)
        device, service = Device.open(settings), StageService(settings.name)
        for line in read_cores().lines(device.threads):
            _log.info("%s", line)
        weights = Weights(weight_cache(settings), settings.model_dir, settings.models_dir)
        return cls(settings.name, device, service, Compute(), weights, Readiness(settings.ready_file), kv_disk=kv_disk)

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {**self.service.handlers, **self.weights.giver.handlers}

    async def accept_links(self, stages: str, port: int | None, credentials: Credentials) -> None:
        """Makes `links` listen at an address derived from `stages`. Raises UsageError if the given `port` is in use."""
        if isinstance(credentials, Identity) and not tls_library():
            _log.info(
                "this worker takes part in no group: links need OpenSSL, but this llamaclust was built without it"
            )
            return
        address = link_address(stages, port)
        try:
            await self.links.listen(address, or_any_port=port is None)
        except OSError as error:
            reason = (error.strerror or str(error)).partition(" (while")[0]  # Python's text repeats the address.
            why = f"links of groups cannot be accepted at {address}: {reason}"
            if port is not None:
                raise UsageError(f"{why}; free the port, or choose another port with --link-port N") from error
            _log.warning("this worker takes part in no group: %s", why)


def _open_kv_disk(settings: WorkerSettings) -> KvDisk | None:
    if settings.kv_disk_bytes is None:
        return None
    if settings.device != "cpu":
        raise UsageError(f"kv_disk needs device cpu, but this worker has device {settings.device}; remove kv_disk")
    assert settings.kv_disk_dir is not None
    return KvDisk(KvFolder(settings.kv_disk_dir, settings.kv_disk_bytes))
