from __future__ import annotations

import asyncio

from llamaclust.wire.security.credentials import Identity

_LOOK_S = 5.0
"""Maximum duration of one sleep, in seconds. A sleep does not count the time in which the machine is suspended."""


async def until_renewal(identity: Identity) -> None:
    while (rest_s := identity.pair.renewal_in_s) > 0:  # noqa: ASYNC110  no event reports the time
        await asyncio.sleep(min(_LOOK_S, rest_s))
