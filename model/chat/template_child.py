"""The child process that renders chat templates, which are untrusted programs. The process is in a sandbox with little
memory, little CPU time and few system calls. Requests on stdin and replies on stdout are lines of JSON."""

from __future__ import annotations

import codecs
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final

import jinja2
import jinja2.debug
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from llamaclust.model.child_frames import end_with_parent, read_frame, write_frame
from llamaclust.model.confinement import confine, limit_cpu, limit_resources

_MAX_MESSAGE_CHARACTERS: Final = 500
_LATE_MODULES: Final = ("jinja2.constants", "pprint", "random", "textwrap", "unicodedata", "_strptime")
_CODECS: Final = ("ascii", "latin-1", "utf-8", "utf-16", "utf-32", "unicode-escape", "raw-unicode-escape", "idna")
"""Codecs that a template may need. They are loaded at the start, because a confined process cannot load them."""


class _GenerationTag(jinja2.ext.Extension):
    """Jinja's tag `{% generation %}...{% endgeneration %}`, which marks answers for training. Renders only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares this attribute in the same way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TooLong(Exception):
    """The rendered text exceeded its limit."""


def environment() -> jinja2.Environment:
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns plain JSON for a template. Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_as_list
    )


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def raise_exception(message: object = None) -> None:
    reason = "" if message is None else str(message)
    raise jinja2.TemplateError(reason or "the template refuses these messages without a reason")


def strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _clock(now_s: float) -> Callable[[str], str]:
    return lambda form: datetime.fromtimestamp(now_s).astimezone().strftime(form)


def functions_of(tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Returns the tools as JSON for the variable `functions`, which old templates read."""
    return json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False, indent=4) if tools else ""


def _render(template: jinja2.Template, variables: dict[str, Any], max_bytes: int, *, with_functions: bool) -> str:
    if with_functions:
        variables = {"functions": functions_of(variables.get("tools")), **variables}
    if (now_s := variables.pop("now_s", None)) is not None:
        variables = {"strftime_now": _clock(now_s), **variables}
    pieces: list[str] = []
    size = 0
    for piece in template.generate(**variables):
        size += len(piece.encode("utf-8", "surrogatepass"))
        if size > max_bytes:
            raise _TooLong(f"more than {max_bytes} bytes of text")
        pieces.append(piece)
    return "".join(pieces)


def _answer(work: Callable[[], str]) -> dict[str, str]:
    try:
        return {"text": work()}
    except MemoryError:
        return {"error": "the template needs more memory than its limit"}
    except RecursionError:
        return {"error": "the template is nested too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"[:_MAX_MESSAGE_CHARACTERS]}
    except Exception as error:  # noqa: BLE001 - a template may raise any error
        return {"error": (str(error) or type(error).__name__)[:_MAX_MESSAGE_CHARACTERS]}


def _confine() -> str | None:
    for name in _LATE_MODULES:
        importlib.import_module(name)
    for name in _CODECS:
        codecs.lookup(name)
    strftime_now("%Z")
    return confine()


def main() -> None:
    end_with_parent()
    unconfined = _confine()
    first = read_frame()
    limit_resources(first["memory_bytes"])
    limit_cpu(first["cpu_seconds"])
    template: jinja2.Template | None = None

    def compile_it() -> str:
        nonlocal template
        template = environment().from_string(first["source"])
        return ""

    write_frame({**_answer(compile_it), "unconfined": unconfined})
    with_functions = "functions" in first["source"]
    while template is not None:
        variables = read_frame()
        limit_cpu(first["cpu_seconds"])
        render = partial(_render, template, variables, first["max_text_bytes"], with_functions=with_functions)
        write_frame(_answer(render))


if __name__ == "__main__":
    main()
