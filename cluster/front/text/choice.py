"""One sequence's events as text: whole characters only, stop strings held back, end tokens not shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.request import AnswerReading
from llamaclust.cluster.scheduler.requests import Event, Finished, FinishReason, PromptScored, Timings, TokenSampled
from llamaclust.core.sampling import RowResult
from llamaclust.model.chat.tools.events import AnswerEvent, ContentText
from llamaclust.model.tokenizers.tokenizer import Detokenizer, Tokenizer

SCORED_TOKENS = 256
"""Scored prompt tokens of one chunk: it ends where as many tokens, or a multiple, are before its end in the prompt."""


class ChoiceText:
    """Turns the events of one choice into chunks, which depend on the request alone: not on how many prompt tokens the
    engine computes at a time."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        stop: tuple[str, ...],
        min_tokens: int,
        reading: AnswerReading | None = None,
    ) -> None:
        """`reading`: of a chat's answer, whose text is its content then."""
        self._index = index
        self._detokenizer = Detokenizer(tokenizer, shown=frozenset() if reading is None else reading.shown_control_ids)
        self._parser = None if reading is None else reading.parser()
        self._end_ids = end_ids
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._characters = 0
        self._end_token: int | None = None
        self._scored: list[RowResult] = []  # not in a chunk yet
        self._scored_start = 0  # the first one's place in the prompt

    @property
    def is_stopped(self) -> bool:
        """A stop string was found: the engine need not go on."""
        return self._stop.matched is not None

    def take(self, event: Event) -> Sequence[TextChunk]:
        """The chunks that are complete with the event, the last one of the choice among them when it has finished."""
        if isinstance(event, TokenSampled):
            return (*self._rest_of_scores(), self._sampled(event.row))
        if isinstance(event, Finished):
            return (*self._rest_of_scores(), self._finished(event.reason, event.timings))
        return [*self._score(event.start, event.rows)] if isinstance(event, PromptScored) else ()

    def stopped(self, timings: Timings) -> TextChunk:
        """The last chunk of a choice that a stop string ended."""
        text, events = self._read("", is_last=True)
        return TextChunk(
            self._index,
            text,
            finish_reason=FinishReason.STOP,
            stopped_by=self._stop.matched,
            timings=timings,
            events=events,
        )

    def _score(self, start: int, rows: Sequence[RowResult]) -> Iterator[TextChunk]:
        if not self._scored:
            self._scored_start = start
        self._scored += rows
        while len(self._scored) >= (count := SCORED_TOKENS - self._scored_start % SCORED_TOKENS):
            yield self._scores(count)

    def _rest_of_scores(self) -> Sequence[TextChunk]:
        return (self._scores(len(self._scored)),) if self._scored else ()

    def _scores(self, count: int) -> TextChunk:
        chunk = TextChunk(self._index, prompt_start=self._scored_start, prompt_rows=tuple(self._scored[:count]))
        self._scored_start += count
        del self._scored[:count]
        return chunk

    def _sampled(self, row: RowResult) -> TextChunk:
        offset = self._characters
        self._tokens += 1
        text = ""
        if row.token in self._end_ids:
            self._end_token = row.token
        else:
            text = self._shown(self._detokenizer.push(row.token))
        text, events = self._read(text)
        return TextChunk(self._index, text, (row,), (offset,), events=events)

    def _shown(self, text: str) -> str:
        self._characters += len(text)
        return text if self._tokens <= self._min_tokens else self._stop.push(text)

    def _finished(self, reason: FinishReason, timings: Timings) -> TextChunk:
        text = self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        is_stop_string = self._stop.matched is not None
        text, events = self._read(text, is_last=True)
        return TextChunk(
            self._index,
            text,
            finish_reason=FinishReason.STOP if is_stop_string else reason,
            stopped_by=self._stop.matched if is_stop_string else self._end_token,
            timings=timings,
            events=events,
        )

    def _read(self, text: str, *, is_last: bool = False) -> tuple[str, tuple[AnswerEvent, ...]]:
        """The content in a piece of text, and all events."""
        if self._parser is None:
            return text, ()
        events = self._parser.feed(text) if text else []
        if is_last:
            events = [*events, *self._parser.end()]
        return "".join(event.text for event in events if isinstance(event, ContentText)), tuple(events)


class StopStrings:
    """Finds stop strings in a text that comes piece by piece, and holds back what may be the beginning of one.

    Each character costs a few steps a stop string, however long the strings are.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._patterns = [_Pattern(string) for string in strings]
        self._held = ""
        self.matched: str | None = None  # the stop string that was found; the stream has ended then

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string. Ends with the first stop string completed; of
        several completed by one character, the one that begins first."""
        if not self._patterns or self.matched is not None:
            return "" if self.matched is not None else text
        text = self._held + text
        for at in range(len(self._held), len(text)):
            complete = [pattern.text for pattern in self._patterns if pattern.step(text[at])]
            if complete:
                self.matched = max(complete, key=len)
                return text[: at + 1 - len(self.matched)]
        keep = max(pattern.state for pattern in self._patterns)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once the text has ended without a stop string."""
        rest, self._held = self._held, ""
        return rest if self.matched is None else ""


class _Pattern:
    """Knuth, Morris and Pratt's search for one string."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0  # characters of the string that the text read so far ends with
        self._fallback = [0] * len(text)  # [i]: longest proper prefix that text[: i + 1] ends with
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            length += text[i] == text[length]
            self._fallback[i] = length

    def step(self, character: str) -> bool:
        """Whether the string is complete with this character; no more steps after that."""
        state = self.state
        while state and character != self.text[state]:
            state = self._fallback[state - 1]
        self.state = state + (character == self.text[state])
        return self.state == len(self.text)
