"""A worker's certificate is renewed in time: another key, certified over the membership stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.wire.control.messages import CertificateRenewed, RenewalFailed, RenewCertificate
from llamaclust.wire.security.credentials import Identity

if TYPE_CHECKING:
    from llamaclust.wire.security.certificates import NewKey

_AGAIN_S = 60.0
_log = logging.getLogger(__name__)


class Renewal:
    """Of the identity of one member."""

    def __init__(self, identity: Identity, send: Callable[[RenewCertificate], Awaitable[None]]) -> None:
        self._identity = identity
        self._send = send
        self._key: NewKey | None = None

    async def run(self) -> None:
        """Asks when two thirds of the certificate's life are over, and again where no answer came. Until the stream
        ends."""
        from llamaclust.wire.security.certificates import NewKey

        with contextlib.suppress(WorkerError):  # of the stream, which its reader reports
            while True:
                await asyncio.sleep(self._identity.pair.renewal_in_s)
                self._key = NewKey()
                await self._send(RenewCertificate(self._key.request))
                await asyncio.sleep(min(_AGAIN_S, self._identity.pair.life_s / 10))

    def receive(self, answer: CertificateRenewed | RenewalFailed) -> None:
        """ProtocolError for an answer to nothing, or of another key."""
        if isinstance(answer, RenewalFailed):
            _log.error("the certificate was not renewed: %s", answer.failure.message)
            return
        key, self._key = self._key, None
        if key is None:
            raise ProtocolError("the coordinator renews a certificate that was not asked for")
        self._identity.pair = key.with_certificate(answer.certificate)
        _log.info("the certificate is renewed")
