"""The process that compiles grammars of requests, with little memory. Requests on stdin and replies on stdout are lines
of JSON."""

from __future__ import annotations

import json
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from llguidance.gbnf_to_lark import any_to_lark

from llamaclust.core.sampling_bounds import MAX_GRAMMAR_BYTES
from llamaclust.model.child_frames import end_with_parent, read_frame, write_frame
from llamaclust.model.grammars.definitions import GBNF, GBNF_START
from llamaclust.model.grammars.matcher import compiled, one_line
from llamaclust.model.grammars.vocabulary import GrammarVocabulary

_STACK_BYTES: Final = 1 << 20


def _checked(definition: str, vocabulary: GrammarVocabulary, compile_cpu_s: float) -> dict[str, str]:
    """Why a grammar cannot be used, or nothing, as far as its first token; and its definition where that is converted.
    The converter's time runs already."""
    converted = ""
    if definition.startswith(GBNF_START):
        try:
            lark = any_to_lark(json.loads(definition)[GBNF])
        except RecursionError:
            return _reply("the grammar is nested too deeply")
        except Exception as error:  # noqa: BLE001  the converter raises bare ones
            return _reply(str(error))
        converted = definition = json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False)
        if len(definition.encode()) > MAX_GRAMMAR_BYTES:
            return _reply(f"a grammar of more than {MAX_GRAMMAR_BYTES} bytes")
    signal.setitimer(signal.ITIMER_PROF, compile_cpu_s)
    state = compiled(definition, vocabulary)
    if state.is_error():
        return _reply(state.get_error())
    state.compute_bitmask()
    return _reply(f"the grammar is too complex: {state.get_error()}" if state.is_error() else "", converted)


def _reply(message: str, converted: str = "") -> dict[str, str]:
    return {"error": one_line(message), "definition": "" if message else converted}


def main() -> None:
    """Reads the vocabulary, then checks grammars until stdin ends. Workers have larger stacks than its threads."""
    threading.stack_size(_STACK_BYTES)
    end_with_parent()
    first = read_frame()
    words = [word.encode("latin-1") for word in first["words"]]
    vocabulary = GrammarVocabulary(words, first["ends"], lambda text: vocabulary.native.greedy_tokenize(text))
    for kind, bound in ((resource.RLIMIT_AS, first["memory"]), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(kind, (bound, bound))
    write_frame({})
    while True:
        definition = read_frame()["definition"]
        signal.setitimer(signal.ITIMER_PROF, first["convert_cpu_s"])  # its signal ends the process
        with ThreadPoolExecutor(1) as small:
            reply = small.submit(_checked, definition, vocabulary, first["compile_cpu_s"]).result()
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(reply)


if __name__ == "__main__":
    main()
