"""A reply's prompts under way: admitted together, their answers go to one log."""

from __future__ import annotations

from collections.abc import Sequence

from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.text.answer_log import MAX_UNREAD_ROWS, AnswerLog
from llamaclust.cluster.front.text.budget import NOTHING, ReplySize, RowStorage
from llamaclust.cluster.front.text.completion import Completion
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.state.adapters import AdapterUnloadedError


class Computation:
    """Nothing runs before `submit`; the caller closes it."""

    def __init__(self, reply: Reply, ticket: Ticket) -> None:
        self.reply = reply
        self._ticket = ticket
        self._completions: list[Completion] = []
        self._reserved = NOTHING

    async def submit(self, log: AnswerLog, *, is_kept: bool) -> None:
        """Submits all prompts, with one seed; where one is refused, none runs."""
        reply, ticket = self.reply, self._ticket
        try:
            requests = [ticket.request(*numbered) for numbered in enumerate(await reply.requests())]
            self._check_adapters({number for request in requests for number, _ in request.adapters})
            ready = [await reply.service.prepare(request) for request in requests]
            generations = [each.generation for each in ready]
            self._reserve(requests, generations)
            log.begin(generations, reply.content(is_kept=is_kept))
            if (recording := ticket.recording(requests)) is not None:
                log.subscribe(recording)
            for prompt, request in enumerate(requests):
                ticket.adapters.update(number for number, _ in request.adapters)
                self._completions.append(reply.service.submit(request, ready[prompt], log, prompt))
        except BaseException:
            await self.aclose()
            raise

    def _check_adapters(self, numbers: set[int]) -> None:
        """A restored request may name a model that is an adapter only now. AdapterUnloadedError for one that it did not
        use before."""
        restoration = self._ticket.restoration
        if restoration is not None and not restoration.adapters.issuperset(
            self.reply.service.settings.adapters.marks(numbers)
        ):
            raise AdapterUnloadedError("model: an adapter was loaded under this name meanwhile: send the request again")

    def _reserve(self, requests: Sequence[CompletionRequest], generations: Sequence[GenerationRequest]) -> None:
        """Of a streamed reply, the first prompt's answer is read while it runs, the others wait for their turn."""
        first = MAX_UNREAD_ROWS if self.reply.storage is RowStorage.STREAMED else None
        sizes = [
            ReplySize.of(generation, request.n, self.reply.storage, None if prompt else first)
            for prompt, (request, generation) in enumerate(zip(requests, generations, strict=True))
        ]
        self._reserved = self.reply.service.budget.reserve(sizes)

    async def aclose(self) -> None:
        """Nothing of it runs afterwards."""
        for completion in self._completions:
            await completion.aclose()
        self._completions.clear()
        self.reply.service.budget.release(self._reserved)
        self._reserved = NOTHING
