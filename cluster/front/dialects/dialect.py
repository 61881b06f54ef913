"""Base classes for the endpoints of all APIs. They parse a request's body, check its model, and create the reply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Generic, ParamSpec

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted, parse_body, read_body
from llamaclust.cluster.front.errors import ErrorShape
from llamaclust.cluster.front.http.responses import JsonResponse, Route
from llamaclust.cluster.front.http.sse import StreamFormat, unless_disconnected
from llamaclust.cluster.front.images.chat_images import with_images
from llamaclust.cluster.front.images.urls import ImageRules
from llamaclust.cluster.front.models import ApiModel
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.schema import AnyBody
from llamaclust.cluster.front.settings import ModelNames
from llamaclust.cluster.front.text.request import ChatRequest
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.limits import AdapterScales
from llamaclust.wire.rpc.deadlines import deadline

_Arguments = ParamSpec("_Arguments")


@dataclass(frozen=True, slots=True)
class ParsedRequest(Generic[AnyBody]):
    body: AnyBody
    context: RequestContext
    adapters: AdapterScales
    model: str  # The model name that the reply shows.

    async def chat(
        self, make: Callable[_Arguments, ChatRequest], *given: _Arguments.args, **named: _Arguments.kwargs
    ) -> ChatRequest:
        """Makes a chat with `make`. Adds the request's creation time, its adapters, and the fetched images."""
        chat = await converted(self.body, make, *given, **named)
        admitted = chat.admitted(self.context.created, self.adapters)
        return await with_images(admitted, self.context)


class Endpoint(ABC, Generic[AnyBody]):
    """An API endpoint for one model. A subclass is served on its `paths` if `ENDPOINTS` in front/app.py lists it."""

    paths: ClassVar[tuple[str, ...]]
    body: type[AnyBody]
    takes_any_model: ClassVar[bool] = False
    """True to accept any model name, even on `/v1/` paths. `api.strict_model` takes precedence."""
    form: ClassVar[StreamFormat] = StreamFormat.EVENTS
    errors: ClassVar[ErrorShape | None] = None
    """The format of error replies on `paths` and all paths below them. None: `shape_of_path` selects it by the path."""

    def __init__(self, model: ApiModel, path: str) -> None:
        self.model = model
        self.service = model.service
        self.settings = model.settings
        self.path = path
        takes_any = self.takes_any_model or not path.startswith("/v1/")
        self.models = ModelNames(model.name, self.settings, any_by_default=takes_any)

    def routes(self) -> Iterator[Route]:
        form = self.form.value
        yield Route("POST", self.path, self.answer, self.body, computes=True, errors=self.errors, form=form)

    @property
    def images(self) -> ImageRules | None:
        return None if self.service.vision is None else ImageRules(self.settings.image_hosts)

    @abstractmethod
    async def answer(self, request: Request) -> Response: ...

    async def read(self, request: Request) -> AnyBody:
        body = await read_body(request, self.body, self.settings, self.images)
        self.check_model(body)
        return body

    def check_model(self, body: AnyBody) -> None:
        """Raises HttpError if the body names an unknown model, and ParameterError if it names an unknown adapter."""
        self.models.check(self.named(body))

    def named(self, body: AnyBody) -> str | None:
        name: str | None = getattr(body, "model", None)
        return name


class Dialect(Endpoint[AnyBody]):
    """An endpoint that generates text. Subclasses can override `make` to refuse requests, and `routes` to add paths."""

    def __init__(self, model: ApiModel, path: str) -> None:
        super().__init__(model, path)
        self._answer = model.replies.endpoint(path, self.make, self.settings, self.form)

    @abstractmethod
    async def reply(self, parsed: ParsedRequest[AnyBody]) -> Reply:
        """Describes how to compute and format the reply. Errors from this method are sent to the client."""

    async def make(self, data: bytes, context: RequestContext) -> Reply:
        body = await parse_body(data, self.body, self.settings, self.images)
        adapters = self._adapters(body, context.scales)
        if not context.is_restored:  # A restored request waits for room.
            self.service.check_queue(self.sequences(body))
        parsed = ParsedRequest(body, context, adapters, self.models.shown(self.named(body)))
        async with deadline("reading the request (timeouts.request)", self.settings.request_s):
            return await self.reply(parsed)

    def sequences(self, body: AnyBody) -> int:
        """Returns the number of sequences that need room in the queue at once: the first answer to each prompt."""
        return 1

    async def answer(self, request: Request) -> Response:
        return await self._answer(request)

    async def counted(self, request: Request, chat: ChatRequest, **fields: str) -> Response:
        """Replies with a JSON object of `fields` and `input_tokens`, the number of tokens in the chat's prompt."""

        async def count() -> int:
            async with deadline("counting the request's tokens (timeouts.request)", self.settings.request_s):
                return await self.service.count(await with_images(chat))

        return JsonResponse({**fields, "input_tokens": await unless_disconnected(request, count())})

    def check_model(self, body: AnyBody) -> None:
        self._adapters(body)

    def _adapters(self, body: AnyBody, default: AdapterScales = ()) -> AdapterScales:
        return self.models.adapters(self.named(body), getattr(body, "lora", None), default)
