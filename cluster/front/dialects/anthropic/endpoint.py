"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted, parse_body, read_body
from llamaclust.cluster.front.dialects.anthropic.message import MessageView
from llamaclust.cluster.front.dialects.anthropic.schema import MessagesBody
from llamaclust.cluster.front.fields.model_name import ModelNames
from llamaclust.cluster.front.foreign_fields import MESSAGES
from llamaclust.cluster.front.http.error_responses import JsonResponse
from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer_log import Timed
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService


class MessagesEndpoint:
    """Chats of Anthropic's API."""

    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        """Its clients name Anthropic's models, for some of their requests by names of their own."""
        self._service = service
        self._settings = settings
        self._models = ModelNames(service.settings.model_name, settings, any_by_default=True)

    async def create(self, data: bytes, ticket: Ticket) -> Reply:
        body = await parse_body(data, MessagesBody, MESSAGES, self._settings)
        adapters, model = self._models.adapters(body.model, body.lora, ticket.scales), self._models.shown(body.model)
        chat = (await converted(body, body.request)).admitted(ticket.created, adapters)

        async def requests() -> list[CompletionRequest]:
            return [await self._service.chat(chat)]

        return Reply(
            service=self._service,
            requests=requests,
            view=partial(MessageView, model, ticket.id),
            is_streamed=body.stream,
            timed=Timed.FIRST,
            has_measurements=True,  # the first event has counts of the prefix cache
        )

    async def count(self, request: Request) -> Response:
        """The tokens of a chat's prompt."""
        body = await read_body(request, MessagesBody, MESSAGES, self._settings)
        self._models.adapters(body.model, body.lora)
        chat = await converted(body, body.request)
        completion = await unless_disconnected(request, self._service.chat_prompt(chat))
        return JsonResponse({"input_tokens": len(completion.prompt)})
