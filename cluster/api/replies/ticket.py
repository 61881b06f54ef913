"""A request's identity: what its reply is called, and what makes the reply the same when it is computed again."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from starlette.datastructures import Headers

from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.security import bearer_key
from llamaclust.cluster.state.journal import Admission, ChoiceKey, Journal, OpenRequest
from llamaclust.cluster.text.request import CompletionRequest, draw_seed
from llamaclust.cluster.text.stream import Record
from llamaclust.core.sampling import RowResult

_RECORDED_ROWS = 64
_MAX_NAME = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Of one request, drawn at its admission or read from the journal."""

    id: str
    seed: int  # where the body has none
    created: int  # Unix time in seconds
    owner: str  # digest of the API key; others may not read the reply
    conversation: str = ""  # llama.cpp's X-Conversation-Id: names its newest reply
    idempotency_key: str = ""
    answered: Mapping[ChoiceKey, tuple[RowResult, ...]] = field(default_factory=dict)
    journal: Journal | None = None

    @classmethod
    def draw(cls, headers: Headers, api_keys: Sequence[str], journal: Journal | None) -> Ticket:
        """Of a new request. HttpError for a header that cannot be a name."""
        return cls(
            id=secrets.token_hex(12),
            seed=draw_seed(),
            created=int(time.time()),
            owner=owner(headers, api_keys),
            conversation=_name(headers, "x-conversation-id"),
            idempotency_key=_name(headers, "idempotency-key"),
            journal=journal,
        )

    @classmethod
    def restored(cls, request: OpenRequest, journal: Journal) -> Ticket:
        """Of a request that an earlier coordinator admitted."""
        known = request.admission
        return cls(
            id=known.id,
            seed=known.seed,
            created=known.created,
            owner=known.owner,
            conversation=known.conversation,
            idempotency_key=known.idempotency_key,
            answered=request.answered,
            journal=journal,
        )

    @property
    def is_kept(self) -> bool:
        """Whether the client may be cut off and come back."""
        return bool(self.conversation or self.idempotency_key)

    def admission(self, endpoint: str, body: bytes, served: str, request_s: float, *, is_streamed: bool) -> Admission:
        return Admission(
            id=self.id,
            endpoint=endpoint,
            body=body.decode(),
            seed=self.seed,
            created=self.created,
            deadline=time.time() + request_s,
            served=served,
            owner=self.owner,
            conversation=self.conversation,
            idempotency_key=self.idempotency_key,
            is_streamed=is_streamed,
        )

    def request(self, prompt: int, request: CompletionRequest) -> CompletionRequest:
        """The completion of one of its prompts, with its seed and the tokens that are known."""
        answered = {choice: rows for (of, choice), rows in self.answered.items() if of == prompt}
        seed = self.seed if request.seed is None else request.seed
        name = self.id if prompt == 0 else f"{self.id}-p{prompt}"
        return request.identified(name, self.id, seed, answered)

    def recording(self, prompt: int, request: CompletionRequest) -> Record | None:
        """Takes the tokens of the completion into the journal, where tokens are all that it needs to go on."""
        if self.journal is None or request.top_logprobs or request.score_from is not None or request.params.needs_state:
            return None
        known = {choice: len(rows) for choice, rows in request.answered.items()}
        return _Recording(partial(self._record, prompt), known).add

    def _record(self, prompt: int, choice: int, rows: list[RowResult]) -> None:
        assert self.journal is not None
        self.journal.answer(self.id, (prompt, choice), rows)


class _Recording:
    """Rows of a completion's choices, recorded some at a time."""

    def __init__(self, write: partial[None], known: dict[int, int]) -> None:
        self._write = write
        self._known = known
        self._rows: dict[int, list[RowResult]] = {}

    def add(self, choice: int, row: RowResult) -> None:
        if self._known.get(choice, 0):
            self._known[choice] -= 1
            return
        rows = self._rows.setdefault(choice, [])
        rows.append(row)
        if len(rows) == _RECORDED_ROWS:
            self._write(choice, rows)
            self._rows[choice] = []


def owner(headers: Headers, api_keys: Sequence[str]) -> str:
    """Digest of the configured API key that a request shows; "" where none is needed, whatever it shows."""
    key = bearer_key(headers.get("authorization", ""))
    return hashlib.sha256(key.encode()).hexdigest()[:32] if key in api_keys else ""


def _name(headers: Headers, header: str) -> str:
    name = headers.get(header, "")
    if len(name) > _MAX_NAME or not name.isprintable() or not name.isascii():
        raise HttpError(400, "bad_header", f"{header}: must be 1 to {_MAX_NAME} printable ASCII characters")
    return name
