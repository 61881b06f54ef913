"""The registry: the service that workers join, and those that have."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from llamaclust.cluster.membership.join_handler import JoinHandler, JoinSettings
from llamaclust.cluster.membership.members import Members
from llamaclust.core.errors import DeadlineError
from llamaclust.wire.control.messages import Shutdown
from llamaclust.wire.rpc.client import JOIN
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.server import Server
from llamaclust.wire.security.credentials import Credentials

_GOODBYE_S = 0.5


class Registry(Members):
    """Serves the Coordinator service while it is entered."""

    def __init__(
        self, listen: str, credentials: Credentials, read_last_error: Callable[[str], str], settings: JoinSettings
    ) -> None:
        super().__init__(read_last_error)
        self._listen = listen
        self._credentials = credentials
        self._joining = JoinHandler(self, settings)
        self._server: Server | None = None

    @property
    def address(self) -> str:
        """gRPC target that workers join."""
        assert self._server is not None
        return self._server.address

    async def __aenter__(self) -> Registry:
        self._server = await Server.start(self._listen, self._credentials, {JOIN: self._joining.join})
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends every worker."""
        present = self.present.values()
        for handle in present:
            handle.left = True
        goodbye = Shutdown("the cluster was stopped")
        with contextlib.suppress(DeadlineError):
            async with deadline("saying goodbye", _GOODBYE_S):
                await asyncio.gather(*(handle.channel.send(goodbye) for handle in present), return_exceptions=True)
        assert self._server is not None
        self._joining.is_closed = True
        await self._server.stop(_GOODBYE_S)
        await self.losing.close()
