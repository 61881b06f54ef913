"""The text service of one model. It tokenizes requests, submits them to an engine, and collects the answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from llamaclust.cluster.front.text.answer_log import AnswerLog, LogContent
from llamaclust.cluster.front.text.call_constraint import answer_grammar
from llamaclust.cluster.front.text.chat import ChatFormat, answer_reasoning
from llamaclust.cluster.front.text.completion import Choice, ChoiceText, Completion
from llamaclust.cluster.front.text.embedder import Embedder, Embedding, EmbeddingOptions, Rank
from llamaclust.cluster.front.text.image_rows import RowLeases
from llamaclust.cluster.front.text.images import PromptImages
from llamaclust.cluster.front.text.request import SEEDS, ChatRequest, CompletionRequest, ToolMode, draw_seed
from llamaclust.cluster.front.text.sharing import (
    BREAKERS,
    TOKENIZING,
    ReplyBudget,
    RowStorage,
    current_owner,
    run_on,
    tokenizing,
)
from llamaclust.cluster.front.text.slots import Slots
from llamaclust.cluster.front.text.stop_strings import stop_patterns
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.cluster.front.text.vision import ImagePrompt, Vision
from llamaclust.cluster.scheduler.dry_breakers import Breakers, BreakerTokens
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.validation import NO_TEXT
from llamaclust.core.errors import ContextLengthError, ParameterError
from llamaclust.core.sampler.bounds import MAX_BIAS
from llamaclust.core.sampler.params import SamplerChain, SamplingParams
from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.grammars.checker import GrammarChecker
from llamaclust.model.ranking import PairTemplate
from llamaclust.model.tokenizers.gaps import Gap, fill_in_prompt
from llamaclust.model.tokenizers.pairs import PairForm
from llamaclust.model.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llamaclust.cluster.engine.engine import Engine

_BLOCKING_CHARACTERS = 2048
"""Texts with more characters than this are tokenized on a thread."""
_TOO_MANY_NUMBERS = "the embeddings have {count} numbers; the limit of a reply is {most}: send fewer prompts at once"
_TOO_MANY_PAIRS = (
    "the documents, each with the query, have {count} tokens; the limit is {most}: send fewer documents at once"
)
_ANSWER_SHARE = 4
"""Infilling without `max_new_tokens` keeps a quarter (1 / 4) of the context free for the answer."""


class TextService:
    """Serves text requests with one model. Not thread-safe: use it on one event loop."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        settings: TextSettings,
        vision: Vision | None = None,  # None if the model reads only text.
    ) -> None:
        self.tokenizer = tokenizer
        self.vision = vision
        self.chat_template = chat_template
        self.settings = settings
        self.budget = ReplyBudget()
        self.slots = Slots(engine, settings.slots)
        self._engine = engine
        self._embedder = Embedder(engine)
        self._grammars = GrammarChecker(tokenizer)
        self.chat_format = ChatFormat(chat_template, tokenizer)
        self._formats = {template: ChatFormat(template, tokenizer) for template in chat_template.named.values()}
        self._breaker_tokens = BreakerTokens(tokenizer)
        self.active_requests = 0
        """Number of requests that were accepted and have not ended, including requests in preparation."""

    async def aclose(self) -> None:
        await asyncio.to_thread(self._grammars.close)

    def check_queue(self, sequences: int) -> None:
        """Raises QueueFullError if the queue has no room for the client's sequences. Callers call it before any work on
        texts, because a client may send many requests that are refused."""
        if sequences:
            self._engine.check_room(current_owner.get(), sequences)

    async def start(self, request: CompletionRequest) -> Completion:
        """Prepares and submits a request. The caller reads the log of the completion, and must close the completion."""
        with RowLeases() as leases:
            generation, log = await self.prepare(request, leases), AnswerLog()
            log.begin([generation], LogContent(RowStorage.STREAMED))
            return self.submit(request, await self.choices(request, generation), log, leases=leases)

    async def prepare(self, request: CompletionRequest, leases: RowLeases) -> GenerationRequest:
        """Returns the request of the first choice, and adds leases of image rows to `leases`. Raises RequestError."""
        await asyncio.sleep(0)  # Preparing a short text does not wait, and there may be many.
        request.check_text()
        self.slots.check(request.slot, has_images=isinstance(request.prompt, PromptImages))
        with self._counted():
            if request.grammar is not None:
                self._engine.prepare_matchers()
                request = replace(request, grammar=await self._grammars.check(request.grammar, current_owner.get()))
            prompt, images = await self._prompt(request, leases)
            if len(prompt) + (request.max_new_tokens != 0) > self.settings.context_length:
                room = " with no room for an answer" if len(prompt) == self.settings.context_length else ""
                raise self._too_long(f"has {len(prompt)} tokens{room}", len(prompt))
            breakers = await self._breakers(request)
        return replace(self._generation(request, prompt, breakers), images=images)

    async def choices(self, request: CompletionRequest, generation: GenerationRequest) -> list[Choice]:
        """Makes the choices of a prepared request."""
        make = partial(self._choices, request, generation)
        with self._counted():
            is_long = request.setup_characters > _BLOCKING_CHARACTERS
            return await run_on(TOKENIZING, make) if is_long else make()

    def submit(
        self,
        request: CompletionRequest,
        choices: Sequence[Choice],
        log: AnswerLog,
        prompt: int = 0,
        leases: RowLeases | None = None,
    ) -> Completion:
        """Submits a prepared request. The caller must have called `log.begin`, and must close the completion. Raises
        RequestError, QueueFullError or WorkerError."""
        held, (generation, _) = ExitStack(), choices[0]
        try:
            held.enter_context(self._counted())
            if leases is not None:
                held.enter_context(leases.moved())
            self.settings.adapters.use(generation.adapters, request.received_ns)
            held.callback(self.settings.adapters.release, generation.adapters)
            with self.slots.recording(request.slot, generation, log, prompt):
                return Completion(self._engine, choices, log, prompt, held.close)
        except BaseException:
            held.close()
            raise

    def _choices(self, request: CompletionRequest, generation: GenerationRequest) -> list[Choice]:
        name, ends, stop = generation.request_id, generation.stop_token_ids, stop_patterns(request.stop)
        return [
            (
                replace(
                    generation,
                    request_id=f"{name}-{index}" if index else name,
                    choice=index,
                    answered=request.answered.get(index, ()),
                ),
                ChoiceText(
                    index, self.tokenizer, ends, stop, request.min_tokens, request.reading, request.answer_stop_ids
                ),
            )
            for index in range(request.n)
        ]

    @asynccontextmanager
    async def embed(
        self, prompts: Sequence[Sequence[str | int]], options: EmbeddingOptions
    ) -> AsyncIterator[list[Embedding]]:
        """Yields the embeddings of prompts. Raises RequestError, QueueFullError, DeadlineError or WorkerError."""
        length = self.settings.embedding_length
        if self.settings.ranking is not None:
            raise ParameterError("model", "this model ranks documents and makes no embeddings: use /v1/rerank")
        if options.dimensions is not None and options.dimensions > length:
            raise ParameterError(
                "dimensions",
                f"expected at most {length}, the size of this model's embeddings, found {options.dimensions}",
            )
        self.check_queue(1)  # Later prompts wait until the queue has room.
        with self._counted():
            ids = [tuple(await self._input_ids(prompt)) for prompt in prompts]
            vectors = sum(options.pooling.vectors(len(prompt)) for prompt in ids)
            with self.budget.reserve_numbers(vectors * length, "input", _TOO_MANY_NUMBERS):
                yield await self._embedder.embed(ids, options)

    async def rank(self, query: str, documents: Sequence[str], cache_salt: str = "") -> list[Rank]:
        """Scores documents, in the given order. Raises RequestError, QueueFullError, DeadlineError or WorkerError."""
        ranking, budget = self.settings.ranking, self.budget
        if ranking is None:
            raise ParameterError("model", "this model does not rank documents")
        self.check_queue(1)
        with self._counted():
            pair = await self._pair_reader(ranking.prompts, query)
            least = len(await pair("", "query")) * len(documents)
            with budget.reserve_numbers(least, "documents", _TOO_MANY_PAIRS):
                pairs = [await pair(document, "documents") for document in documents]
            with budget.reserve_numbers(sum(map(len, pairs)), "documents", _TOO_MANY_PAIRS):
                return await self._embedder.rank(pairs, ranking, cache_salt)

    async def _pair_reader(
        self, form: PairForm | PairTemplate, query: str
    ) -> Callable[[str, str], Awaitable[tuple[int, ...]]]:
        """Returns a function that tokenizes a document together with the query."""
        tokenizer, context = self.tokenizer, self.settings.context_length
        self._check_characters(len(query), "query")
        if isinstance(form, PairTemplate):
            beside = len(query)
        else:
            beside, begin = 0, await run_on(TOKENIZING, tokenizer.encode, query, add_special=False)

        def read(document: str) -> tuple[int, ...]:
            if isinstance(form, PairTemplate):
                return form.prompt(tokenizer, query, document)
            return form.prompt(begin, tokenizer.encode(document, add_special=False) if document else ())

        async def prompt(document: str, param: str) -> tuple[int, ...]:
            self._check_characters(beside + len(document), param)
            ids = await run_on(TOKENIZING, read, document)
            if len(ids) > context:
                what = "has" if param == "query" else "one document with the query has"
                raise self._too_long(f"{what} {len(ids)} tokens", len(ids), param)
            return ids

        return prompt

    async def _input_ids(self, prompt: Sequence[str | int]) -> list[int]:
        ids = [token for part in await self.tokenize_all(prompt, "input", add_special=True) for token in part]
        context = self.settings.context_length
        if not ids:
            raise ParameterError("input", "a prompt has no tokens; give at least one token")
        if len(ids) > context:
            raise self._too_long(f"a prompt has {len(ids)} tokens", len(ids), "input")
        return ids

    async def fill_in(self, gap: Gap, max_new_tokens: int | None) -> tuple[int, ...]:
        """Returns the prompt of an infill request. Raises ContextLengthError if the texts are too long."""
        tokens, context = self.tokenizer.vocabulary.fill_in, self.settings.context_length
        assert tokens is not None, "the caller has checked that the tokens are known"
        self._check_characters(gap.characters, "input_prefix")
        room = context - (context // _ANSWER_SHARE if max_new_tokens is None else max_new_tokens)
        threads = tokenizing(gap.characters)
        return tuple(await run_on(threads, fill_in_prompt, self.tokenizer, tokens, gap, room))

    async def fill_suffix(self, prompt: object, suffix: str, max_new_tokens: int | None) -> tuple[int, ...]:
        """Returns the prompt for a gap between `prompt` and `suffix`. Raises ParameterError if this is not possible."""
        if self.tokenizer.vocabulary.fill_in is None:
            name = repr(self.settings.model_name)
            raise ParameterError("suffix", f"{name} does not support insert: no token marks a suffix; remove the field")
        if not isinstance(prompt, str):
            raise ParameterError("suffix", "requires a prompt that is a text, not token ids")
        return await self.fill_in(Gap(prompt, suffix), max_new_tokens)

    async def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        if len(text) <= _BLOCKING_CHARACTERS:
            return self.tokenizer.encode(text, add_special, parse_special)
        return await run_on(tokenizing(len(text)), self.tokenizer.encode, text, add_special, parse_special)

    async def tokenize_all(
        self, parts: Sequence[str | int], param: str, most_tokens: int | None = None, add_special: bool = False
    ) -> list[list[int]]:
        """Returns each part's token ids. Raises ParameterError if they surely exceed `most_tokens` (None: context)."""
        self._check_room(f"has {len(parts)} parts", len(parts), param, most_tokens)
        characters = sum(len(part) for part in parts if isinstance(part, str))
        self._check_characters(characters, param, most_tokens)
        return await run_on(tokenizing(characters), self._encode_all, parts, add_special)

    async def chat(self, chat: ChatRequest) -> CompletionRequest:
        """Returns the completion request of a chat. Raises RequestError."""
        if not self.settings.generates:
            raise ParameterError("model", NO_TEXT)
        unconstrained = await self.chat_prompt(chat)
        unconstrained.check_begun()
        if chat.answer.grammar is not None or (unconstrained.reading is not None and unconstrained.reading.tools):
            self._engine.prepare_matchers()
        with self._counted():
            grammar = await answer_grammar(chat, unconstrained.reading, self.tokenizer, self._grammars)
        own = None if chat.tool_use.mode is ToolMode.REQUIRED else grammar
        followed = partial(answer_reasoning, unconstrained.reading, chat.thoughts.limit, own, self.tokenizer)
        is_long = unconstrained.begun_characters > _BLOCKING_CHARACTERS
        reasoning = await run_on(TOKENIZING, followed) if is_long else followed()
        return replace(unconstrained, grammar=grammar, reasoning=reasoning)

    async def chat_prompt(self, chat: ChatRequest) -> CompletionRequest:
        with self._counted():
            return await self._format_of(chat).completion(chat, self._check_characters)

    async def count(self, chat: ChatRequest) -> int:
        with self._counted():
            request = await self._format_of(chat).completion(chat, self._check_characters)
            if not isinstance(request.prompt, PromptImages):
                return len(await self._prompt_ids(request.prompt, request))
            assert self.vision is not None, "bodies with images are refused"
            return len(await self.vision.lay_out(request.prompt, self._check_image_prompt))

    async def chat_text(self, chat: ChatRequest) -> str:
        return await self._format_of(chat).text(chat)

    def _format_of(self, chat: ChatRequest) -> ChatFormat:
        """Returns the chat template's format. Raises ParameterError if the template cannot show the documents."""
        template = self.chat_template.variant(uses_tools=chat.uses_tools, has_documents=chat.has_documents)
        if chat.has_documents and "documents" not in (template.source or ""):
            raise ParameterError(
                "documents", "the model's chat template does not show documents; write them into a message"
            )
        return self._formats.get(template, self.chat_format)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.active_requests += 1
        try:
            yield
        finally:
            self.active_requests -= 1

    async def _prompt(self, request: CompletionRequest, leases: RowLeases) -> ImagePrompt:
        if not isinstance(request.prompt, PromptImages):
            return await self._prompt_ids(request.prompt, request), ()
        assert self.vision is not None, "bodies with images are refused"
        self._check_image_prompt(request.prompt.least_tokens)
        return await self.vision.image_prompt(request.prompt, self._check_image_prompt, leases)

    async def _prompt_ids(self, prompt: str | tuple[int, ...], request: CompletionRequest) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        self._check_characters(len(prompt))
        return tuple(await self.tokenize(prompt, request.add_special, request.parse_special))

    def _check_image_prompt(self, tokens: int) -> None:
        self._check_room("has text and images", tokens, "prompt", None)

    def _encode_all(self, parts: Sequence[str | int], add_special: bool) -> list[list[int]]:
        encode = self.tokenizer.encode
        return [
            [part] if isinstance(part, int) else encode(part, add_special and place == 0, parse_special=True)
            for place, part in enumerate(parts)
        ]

    def _check_characters(self, characters: int, param: str = "prompt", most_tokens: int | None = None) -> None:
        """Raises an error if a text with this many characters certainly has too many tokens."""
        self._check_room(
            f"has {characters} characters", -(-characters // self.tokenizer.longest_word), param, most_tokens
        )

    def _check_room(self, has: str, tokens: int, param: str, most_tokens: int | None) -> None:
        """Raises an error if `tokens`, a lower bound of the number of tokens, exceeds the limit."""
        context = self.settings.context_length
        if most_tokens is None and tokens > context:
            raise self._too_long(f"{has} (at least {tokens} tokens)", tokens, param)
        if most_tokens is not None and tokens > most_tokens:
            raise ParameterError(param, f"{has} (at least {tokens} tokens); the limit is {most_tokens}; shorten it")

    def _too_long(self, has: str, tokens: int, param: str = "prompt") -> ContextLengthError:
        context = self.settings.context
        return ContextLengthError(has, tokens, context.tokens, param, context.advice(tokens))

    async def _breakers(self, request: CompletionRequest) -> Breakers:
        chain = request.params.chain
        if chain is None or not chain.needs_history:
            return {}
        return await run_on(BREAKERS, self._breaker_tokens.of, request.dry_breakers)

    def _params(self, request: CompletionRequest) -> SamplingParams:
        """Returns the sampling parameters. Unless `penalize_nl` is true, line breaks are exempt from penalties. Tokens
        that the model file suppresses have a bias that makes them impossible."""
        params = request.params
        if suppressed := self.tokenizer.vocabulary.suppressed:
            biases = dict(params.logit_bias) | dict.fromkeys(suppressed, -MAX_BIAS)
            params = replace(params, logit_bias=tuple(sorted(biases.items())))
        if request.penalize_nl or not params.needs_history:
            return params
        line_break = self.tokenizer.encode("\n", add_special=False)[-1:]
        return replace(params, chain=replace(params.chain or SamplerChain(), unpenalized=tuple(line_break)))

    def _generation(self, request: CompletionRequest, prompt: tuple[int, ...], breakers: Breakers) -> GenerationRequest:
        context = self.settings.context_length
        max_new_tokens = request.max_new_tokens
        if max_new_tokens != 0:  # The engine refuses a prompt that leaves no room for an answer.
            room = max(context - len(prompt), 1)
            max_new_tokens = room if max_new_tokens is None else min(max_new_tokens, room)
        request_id = request.request_id or secrets.token_hex(12)
        return GenerationRequest(
            request_id,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            params=self._params(request),
            seed=draw_seed() if request.seed is None else request.seed % SEEDS,
            stop_token_ids=self.tokenizer.end_of_generation | (request.stop_token_ids - request.answer_stop_ids),
            late_token_ids=request.answer_stop_ids,
            min_tokens=max_new_tokens if request.ignore_eos else request.min_tokens,
            penalty_window=context if request.penalty_window is None else request.penalty_window,
            dry_window=context if request.dry_window is None else request.dry_window,
            breakers=breakers,
            group=request.group or request_id,
            owner=current_owner.get(),
            **request.options,
        )
