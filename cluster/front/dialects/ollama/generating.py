"""`POST /api/generate` and `POST /api/chat`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from llamaclust.cluster.front.body import converted, parse_body
from llamaclust.cluster.front.dialects.ollama.names import OllamaNames
from llamaclust.cluster.front.dialects.ollama.reply import Lines, LoadView, OllamaView, Show, as_message, as_text
from llamaclust.cluster.front.dialects.ollama.schema import AnswerFields, GenerateBody, OllamaChatBody
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.fields.keep_alive import KeepAlive, read_keep_alive
from llamaclust.cluster.front.foreign_fields import OLLAMA
from llamaclust.cluster.front.replies.reply import MakeView, Reply, Requests
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.fill_in import Gap, fill_in_prompt
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.core.errors import ParameterError


class OllamaGenerating:
    """One served model under Ollama's names."""

    def __init__(self, service: TextService, settings: ApiSettings, names: OllamaNames) -> None:
        self._service = service
        self._settings = settings
        self._names = names

    async def generate(self, data: bytes, ticket: Ticket) -> Reply:
        body = await parse_body(data, GenerateBody, OLLAMA, self._settings)

        adapters = self._names.adapters(body.model, ticket.scales)

        async def requests() -> list[CompletionRequest]:
            return [replace(await self._generation(body, ticket), adapters=adapters)]

        return self._reply(body, ticket, requests, as_text, with_context=not body.raw)

    async def chat(self, data: bytes, ticket: Ticket) -> Reply:
        body = await parse_body(data, OllamaChatBody, OLLAMA, self._settings)

        adapters = self._names.adapters(body.model, ticket.scales)

        async def requests() -> list[CompletionRequest]:
            await self._check_reasoning(body)
            chat = (await converted(body, body.chat)).admitted(ticket.created, adapters)
            return [await self._service.chat(chat)]

        return self._reply(body, ticket, requests, as_message, with_context=False)

    def _reply(
        self,
        body: GenerateBody | OllamaChatBody,
        ticket: Ticket,
        requests: Requests,
        show: Show,
        *,
        with_context: bool,
    ) -> Reply:
        service = self._service
        lines = Lines(self._names.shown(body.model), ticket.created, show)
        view: MakeView = partial(
            OllamaView, service.tokenizer, lines, with_logprobs=body.logprobs, with_context=with_context
        )
        if body.is_load:
            unloads = self._settings.can_unload and read_keep_alive({"keep_alive": body.keep_alive}) == KeepAlive(0)
            loaded = LoadView(lines, "unload" if unloads else "load")
            return Reply(service=service, requests=_nothing, view=lambda _: loaded, is_streamed=body.stream)

        return Reply(service=service, requests=requests, view=view, is_streamed=body.stream)

    async def _generation(self, body: GenerateBody, ticket: Ticket) -> CompletionRequest:
        """The context of an earlier reply stands before the prompt, whose BOS it has."""
        earlier = tuple(body.context)
        await self._check_reasoning(body)
        if body.suffix:
            return await self._fill_in(body)
        if body.raw:
            if not earlier:
                return await converted(body, body.completion, body.prompt)
            (prompt,) = await self._service.tokenize_all([body.prompt], "prompt")
            return await converted(body, body.completion, (*earlier, *prompt))
        request = await self._service.chat((await converted(body, body.chat)).admitted(ticket.created, ()))
        assert not isinstance(request.prompt, str)
        bos = self._service.tokenizer.bos_id
        own = request.prompt[1:] if earlier and request.prompt[:1] == (bos,) else request.prompt
        return replace(request, prompt=(*earlier, *own))

    async def _fill_in(self, body: GenerateBody) -> CompletionRequest:
        service, tokens = self._service, self._service.tokenizer.vocabulary.fill_in
        if tokens is None:
            message = f"{service.settings.model_name!r} does not support insert; leave suffix out"
            raise HttpError(400, "unsupported_parameter", message, param="suffix")
        if body.raw or body.context or body.system:
            raise ParameterError("suffix", "cannot be used together with raw, context or system")
        request, gap = await converted(body, body.completion), Gap(body.prompt, body.suffix)
        context = service.settings.context_length
        prompt = await fill_in_prompt(service.tokenizer, tokens, gap, context, request.max_new_tokens)
        return replace(request, prompt=prompt)

    async def _check_reasoning(self, body: AnswerFields) -> None:
        """Reasoning of a model that knows none is refused, as Ollama does."""
        if body.wants_reasoning and not (await self._service.chat_format.get()).knows_reasoning:
            message = f"{self._service.settings.model_name!r} does not support thinking; leave think out"
            raise HttpError(400, "unsupported_parameter", message, param="think")


async def _nothing() -> list[CompletionRequest]:
    """A request that only loads a model computes nothing."""
    return []
