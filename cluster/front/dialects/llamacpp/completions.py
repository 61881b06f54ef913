"""`POST /completions`, which both llama.cpp and OpenAI's clients without `/v1` in their base URL use."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.cluster.front.body import has_field
from llamaclust.cluster.front.replies.reply import MakeReply, Reply
from llamaclust.cluster.front.replies.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Completions:
    """The endpoints of both."""

    openai: MakeReply
    llamacpp: MakeReply

    async def create(self, data: bytes, ticket: Ticket) -> Reply:
        """llama.cpp's reply unless the body names a model, as OpenAI's clients must."""
        make = self.openai if await has_field(data, "model") else self.llamacpp
        return await make(data, ticket)
