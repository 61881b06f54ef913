"""The child process that checks grammars. Requests on stdin and replies on stdout are lines of JSON."""

from __future__ import annotations

import json
import re
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Any, Final

from llguidance.gbnf_to_lark import any_to_lark

from llamaclust.core.errors import RequestError
from llamaclust.core.sampler.bounds import MAX_GBNF_WORK, MAX_GRAMMAR_BYTES
from llamaclust.model.child_frames import end_with_parent, read_frame, write_frame
from llamaclust.model.grammars.definitions import GBNF, GBNF_START
from llamaclust.model.grammars.matcher import CANNOT_BE_USED, one_line
from llamaclust.model.grammars.recursion import endless_reference
from llamaclust.model.grammars.schema_parts import property_names
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.model.grammars.walk import GrammarWalk

_STACK_BYTES: Final = 1 << 20
_TOO_DEEP: Final = "the grammar is nested too deeply"


def _checked(definition: str, walk: GrammarWalk) -> dict[str, str]:
    converted = ""
    if definition.startswith(GBNF_START):
        text = json.loads(definition)[GBNF]
        if (work := (rules := text.count("::=")) * len(text)) > MAX_GBNF_WORK:
            return _reply(
                f"it is too large: {rules} rules times {len(text)} characters is {work}; the limit is {MAX_GBNF_WORK}"
            )
        try:
            lark = any_to_lark(text)
        except RecursionError:
            return _reply(_TOO_DEEP)
        except Exception as error:  # noqa: BLE001  the converter raises plain Exceptions
            return _reply(str(error))
        converted = definition = json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False)
        if len(definition.encode()) > MAX_GRAMMAR_BYTES:
            return _reply(f"the converted grammar has more than {MAX_GRAMMAR_BYTES} bytes")
    try:
        schemas = [*_schemas(definition)]
        for schema in schemas:
            if (reference := endless_reference(schema)) is not None:
                return _reply(f"the reference {reference[:100]!r} leads back to itself, so no finite value matches it")
        walk.run(definition, [*dict.fromkeys(chain.from_iterable(map(property_names, schemas)))])
    except RecursionError:
        return _reply(_TOO_DEEP)
    except RequestError as error:
        return _reply(str(error).removeprefix(CANNOT_BE_USED))
    return _reply("", converted)


def _schemas(definition: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    for part in json.loads(definition)["grammars"]:
        if "json_schema" in part:
            yield part["json_schema"]
        text = part.get("lark_grammar", "")
        for mark in re.finditer(r"%json\s*", text):
            with suppress(ValueError):  # llguidance reports invalid JSON later.
                yield decoder.raw_decode(text, mark.end())[0]


def _reply(message: str, converted: str = "") -> dict[str, str]:
    return {"error": one_line(message), "definition": "" if message else converted}


def main() -> None:
    # Smaller than a worker's stack, so that a grammar that passes the check cannot overflow it.
    threading.stack_size(_STACK_BYTES)
    end_with_parent()
    first = read_frame()
    words = [word.encode("latin-1") for word in first["words"]]
    vocabulary = GrammarVocabulary(words, first["ends"], lambda text: vocabulary.native.greedy_tokenize(text))
    vocabulary.native  # noqa: B018  the property builds the native tokenizer
    walk = GrammarWalk(vocabulary)
    for kind, bound in ((resource.RLIMIT_AS, first["memory"]), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(kind, (bound, bound))
    write_frame({})
    while True:
        definition = read_frame()["definition"]
        signal.setitimer(signal.ITIMER_PROF, first["guard_cpu_s"])  # The timer's signal ends the process.
        with ThreadPoolExecutor(1) as small:
            reply = small.submit(_checked, definition, walk).result()
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(reply)


if __name__ == "__main__":
    main()
