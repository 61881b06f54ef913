"""Every await has a deadline with a name of its own, so that what did not come can be said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llamaclust.errors import DeadlineError


@asynccontextmanager
async def deadline(what: str, seconds: float) -> AsyncIterator[None]:
    """Cancels the block after `seconds` and raises a DeadlineError that names `what`."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineError(f"{what}: not within {seconds:g} s") from error
