"""One sequence's events as text: whole characters only, stop strings held back, end tokens not shown."""

from __future__ import annotations

from llamaclust.cluster.scheduler.requests import Event, Finished, FinishReason, PromptScored, Timings, TokenSampled
from llamaclust.cluster.text.answer import TextChunk
from llamaclust.cluster.text.stop_strings import StopStrings
from llamaclust.core.sampling import RowResult
from llamaclust.model.tokenizers.tokenizer import Detokenizer, Tokenizer


class ChoiceText:
    """Turns the events of one choice into chunks."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, end_ids: frozenset[int], stop: tuple[str, ...], min_tokens: int
    ) -> None:
        self._index = index
        self._detokenizer = Detokenizer(tokenizer)
        self._end_ids = end_ids
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._characters = 0
        self._end_token: int | None = None

    @property
    def is_stopped(self) -> bool:
        """A stop string was found: the engine need not go on."""
        return self._stop.matched is not None

    def take(self, event: Event) -> TextChunk:
        match event:
            case PromptScored(start, rows):
                return TextChunk(self._index, prompt_start=start, prompt_rows=rows)
            case TokenSampled(row):
                return self._chosen(row)
            case Finished(reason, timings):
                return self._finished(reason, timings)

    def stopped(self, timings: Timings) -> TextChunk:
        """The last chunk of a choice that a stop string ended."""
        return TextChunk(self._index, finish_reason=FinishReason.STOP, stopped_by=self._stop.matched, timings=timings)

    def _chosen(self, row: RowResult) -> TextChunk:
        offset = self._characters
        self._tokens += 1
        text = ""
        if row.token in self._end_ids:
            self._end_token = row.token
        else:
            text = self._shown(self._detokenizer.push(row.token))
        return TextChunk(self._index, text, (row,), (offset,))

    def _shown(self, text: str) -> str:
        self._characters += len(text)
        return text if self._tokens <= self._min_tokens else self._stop.push(text)

    def _finished(self, reason: FinishReason, timings: Timings) -> TextChunk:
        text = self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        is_stop_string = self._stop.matched is not None
        return TextChunk(
            self._index,
            text,
            finish_reason=FinishReason.STOP if is_stop_string else reason,
            stopped_by=self._stop.matched if is_stop_string else self._end_token,
            timings=timings,
        )
