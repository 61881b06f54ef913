"""A served model without workers, on an engine that follows a script or the real engine with fake stages."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

import httpx
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.request_stream import RequestStream, Sink, SubmittedRequest
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.http.certificate import ServerCertificate
from llamaclust.cluster.front.http.connections import ApiPort
from llamaclust.cluster.front.http.gates import Admission
from llamaclust.cluster.front.http.server import server_config
from llamaclust.cluster.front.models import AdapterControl
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer import Answer, TextChunk, join
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.cluster.front.text.vision import Vision
from llamaclust.cluster.scheduler.requests import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptScored,
    Timings,
    TokenSampled,
)
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.cluster.scheduler.validation import validate
from llamaclust.cluster.state.adapters import ServedAdapters
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.chat.template import ChatTemplate, load_chat_template
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from support.clusters.fakes import WIDTH, FakePipeline
from support.models.tiny_tokenizers import byte_level
from support.several_models.api_models import api_model

VOCABULARY = 320
CONTEXT = 200
MODEL = "tiny"
SETTINGS = SchedulerSettings(
    MODEL, VOCABULARY, CONTEXT, kv_blocks=200, max_sequences=8, max_waiting=64, embedding_length=WIDTH
)

END = VOCABULARY - 1  # <|im_end|>
Script = Callable[[GenerationRequest], Sequence[int]]


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(byte_level(VOCABULARY))


@cache
def chat_template() -> ChatTemplate:
    """Returns the chat template; all tests use the same one with its child process."""
    return load_chat_template(byte_level(VOCABULARY), tokenizer())


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special=False)


def logprob(place: int) -> float:
    """Returns a float32 value that needs all its digits."""
    return float(np.float32(-0.1) * np.float32(place + 1) / np.float32(7))


@dataclass
class ScriptedRequest:
    """One scripted request, whose events a task hands to its sink."""

    engine: ScriptedEngine
    generation: GenerationRequest
    sink: Sink
    given: int = 0
    is_done: bool = False
    progress: None = None
    task: asyncio.Task[None] | None = None

    async def give(self, events: Sequence[Event | LlamaclustError]) -> None:
        for event in events:
            await asyncio.sleep(0)
            await self.engine.gate.wait()
            self.given += isinstance(event, TokenSampled)
            if isinstance(event, LlamaclustError | Finished):
                self._end()
            if isinstance(event, LlamaclustError):
                self.sink.end(event)
                return
            self.sink.take(event)
        self.sink.end(None)

    @property
    def timings(self) -> Timings:
        return Timings(1.0, 2.0, 3.0, 4.0, len(self.generation.prompt), 0, self.given + self.engine.ahead)

    def abort(self, reason: FinishReason = FinishReason.ABORT) -> None:
        self.engine.aborted.append(reason)
        self._end()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()

    def _end(self) -> None:
        if not self.is_done:
            self.is_done = True
            self.engine.running -= 1


@dataclass
class ScriptedEngine:
    """An engine that answers with a script's tokens, and an end token if there is room; counts running requests."""

    script: Script
    failure: LlamaclustError | None = None  # comes after `failure_after` tokens
    failure_after: int = 0
    refusal: LlamaclustError | None = None  # raised at each submit
    submitted: list[GenerationRequest] = field(default_factory=list)
    aborted: list[FinishReason] = field(default_factory=list)
    ahead: int = 0  # Number of tokens that are computed and were not given yet.
    running: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def prepare_matchers(self) -> None:
        """Does nothing, since no worker has matchers."""

    def check_room(self, owner: str, more: int) -> None:
        """Does nothing, since the queue has room for everything."""

    def begin(self, generation: GenerationRequest, sink: Sink) -> ScriptedRequest:
        if self.refusal is not None:
            raise self.refusal
        fitting = replace(
            SETTINGS, vocabulary=VOCABULARY, context_length=CONTEXT, kv_blocks=1 + CONTEXT // KV_BLOCK_TOKENS
        )
        validate(generation, replace(fitting, adapters={0: "first", 1: "second"}))
        self.submitted.append(generation)
        self.running += 1
        request = ScriptedRequest(self, generation, sink)
        sink.begin(cast(SubmittedRequest, request))
        request.task = asyncio.get_running_loop().create_task(request.give(self._events(generation)))
        return request

    def submit(self, generation: GenerationRequest) -> RequestStream:
        return RequestStream(lambda sink: cast(SubmittedRequest, self.begin(generation, sink)))

    def _events(self, generation: GenerationRequest) -> list[Event | LlamaclustError]:
        events: list[Event | LlamaclustError] = []
        if generation.score_from is not None and len(generation.prompt) > 1:
            first = max(generation.score_from, 1)
            events.append(
                PromptScored(first, tuple(self._row(generation, i) for i in range(first, len(generation.prompt))))
            )
        tokens = [*self.script(generation), END][: generation.max_new_tokens]
        stop = next((i + 1 for i, token in enumerate(tokens) if token in generation.stop_token_ids), None)
        rows = [self._chosen(generation, token, place) for place, token in enumerate(tokens[:stop])]
        events += [TokenSampled(row) for row in rows]
        if self.failure is not None:
            return [*events[: self.failure_after], self.failure]
        reason = FinishReason.LENGTH if stop is None else FinishReason.STOP
        timings = Timings(1.5, 20.0, 100.0, 50.0, len(generation.prompt), 3, len(rows), 6, 4)
        return [*events, Finished(reason, timings)]

    def _row(self, generation: GenerationRequest, place: int) -> RowResult:
        return self._chosen(generation, generation.prompt[place], place)

    def _chosen(self, generation: GenerationRequest, token: int, place: int) -> RowResult:
        top = tuple((i, logprob(place + i)) for i in range(generation.top_logprobs))
        return RowResult(token, logprob(place), top)


def says(text: str) -> Script:
    tokens = ids(text)
    return lambda generation: tokens


def make_service(
    engine: Any,
    template: ChatTemplate | None = None,
    slots: int = 0,
    adapters: ServedAdapters | None = None,
    name: str = MODEL,
    vision: Vision | None = None,
) -> TextService:
    settings = TextSettings(
        name,
        CONTEXT,
        SETTINGS.max_sequences,
        embedding_length=WIDTH,
        slots=slots,
        adapters=adapters or ServedAdapters(),
        max_drafted=engine.scheduler.settings.max_drafted if isinstance(engine, Engine) else 0,
    )
    return TextService(engine, tokenizer(), template or chat_template(), settings, vision)


async def collect(chunks: AsyncIterable[TextChunk]) -> list[Answer]:
    """Returns the answers of all choices in order of their index; raises the error that ended a choice early."""
    by_index = defaultdict[int, list[TextChunk]](list)
    async for chunk in chunks:
        by_index[chunk.index].append(chunk)
    return [join(by_index[index]) for index in sorted(by_index)]


def make_app(
    engine: Any,
    chat_template: ChatTemplate | None = None,
    admission: Admission | None = None,
    workers: Any = None,
    control: AdapterControl | None = None,
    replies: Replies | None = None,
    vision: Vision | None = None,
    **settings: Any,
) -> Starlette:
    """Creates an app on an engine; if it is scripted, the operators' API shows an idle engine."""
    idle = engine if isinstance(engine, Engine) else Engine(FakePipeline(SETTINGS.kv_blocks), SETTINGS)
    replies = replies or Replies(ApiSettings(**settings))
    slots = SETTINGS.max_sequences if "slot_folder" in settings else 0
    service = make_service(engine, chat_template, slots, replies.settings.adapters, vision=vision)
    show = {"status": {"name": "test"}}.copy
    return create_app([api_model(service, idle, None, show, control, replies)], admission, workers)


def client(app: ASGIApp, **options: Any) -> httpx.AsyncClient:
    """Creates a client of an app in this process; each reply arrives as a whole."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080", **options)


@asynccontextmanager
async def real_engine(
    settings: SchedulerSettings = SETTINGS, **deadlines: float
) -> AsyncIterator[tuple[Engine, FakePipeline]]:
    """Yields the real engine on stages that answer at once; asserts that no KV block is held at the end."""
    pipeline = FakePipeline(settings.kv_blocks)
    async with Engine(pipeline, settings, EngineSettings(**deadlines)) as engine:
        yield engine, pipeline
        assert engine.scheduler.counts.kv_blocks_held == 0


@asynccontextmanager
async def serving(
    app: ASGIApp, settings: ApiSettings | None = None, certificate: ServerCertificate | None = None
) -> AsyncIterator[str]:
    """Runs a server on a free port of this machine and yields its URL. `settings` apply to its connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = ApiPort(listener, certificate)
        server = uvicorn.Server(server_config(app, settings or ApiSettings(), port))
        task = asyncio.create_task(server.serve([listener]))
        try:
            await until(lambda: server.started)
            yield port.url
        finally:
            server.should_exit = server.force_exit = True
            await task


def events_of(text: str) -> list[Any]:
    """Returns the data of server-sent events; skips comments, and keeps [DONE] as a string."""
    lines = [line.removeprefix("data: ").strip() for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition without a deadline; the test has one."""
    while not condition():  # noqa: ASYNC110  most conditions have no event
        await asyncio.sleep(0.005)


async def ended_response(http: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    """Returns a background response when it has ended; raises TimeoutError after a minute."""
    async with asyncio.timeout(60):
        while True:
            response: dict[str, Any] = (await http.get(f"/v1/responses/{response_id}")).json()
            if response["status"] not in ("queued", "in_progress"):
                return response
            await asyncio.sleep(0.005)
