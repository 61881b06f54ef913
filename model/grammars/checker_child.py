"""The process that compiles grammars of requests, with little memory. Requests on stdin and replies on stdout are lines
of JSON."""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from llguidance import LLMatcher

from llamaclust.core.errors import RequestError
from llamaclust.core.sampling import Grammar
from llamaclust.core.sampling_bounds import MAX_GRAMMAR_BYTES
from llamaclust.model.grammars.matcher import GrammarMatcher, limits, one_line
from llamaclust.model.grammars.vocabulary import GrammarVocabulary

_MAX_REQUEST_BYTES: Final = (1 << 28) + 6 * MAX_GRAMMAR_BYTES
_SET_PARENT_DEATH_SIGNAL: Final = 1
_STACK_BYTES: Final = 1 << 20


def _read_frame() -> dict[str, Any]:
    """The next request; ends the process where the parent has gone."""
    line = sys.stdin.buffer.readline(_MAX_REQUEST_BYTES)
    if not line.endswith(b"\n"):
        sys.exit(2 if line else 0)
    frame: dict[str, Any] = json.loads(line)
    return frame


def _write_frame(frame: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(frame).encode() + b"\n")
    sys.stdout.buffer.flush()


def _reason(definition: str, vocabulary: GrammarVocabulary) -> str:
    """Why a grammar cannot be used, or nothing; as far as its first token."""
    message = LLMatcher.validate_grammar(definition, vocabulary.native, limits=limits())
    if not message:
        try:
            GrammarMatcher(Grammar(definition), vocabulary).allowed()
        except RequestError as error:
            message = str(error)
    return one_line(message)


def main() -> None:
    """Reads the vocabulary, then checks grammars until stdin ends. Workers have larger stacks than its threads."""
    threading.stack_size(_STACK_BYTES)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    first = _read_frame()
    words = [word.encode("latin-1") for word in first["words"]]
    vocabulary = GrammarVocabulary(words, first["ends"], lambda text: vocabulary.native.greedy_tokenize(text))
    for kind, bound in ((resource.RLIMIT_AS, first["memory"]), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(kind, (bound, bound))
    _write_frame({})
    while True:
        definition = _read_frame()["definition"]
        with ThreadPoolExecutor(1) as small:
            _write_frame({"error": small.submit(_reason, definition, vocabulary).result()})


if __name__ == "__main__":
    main()
