"""Options of `generate` and `chat` that control answers. Most numeric options are made from the sampling table."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from llamaclust.cli.options import option_value, text_of
from llamaclust.core.errors import UsageError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.table import MAIN_NUMBERS, SAMPLING_TABLE

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_MORE: dict[str, tuple[Any, str, str]] = {
    "samplers": (str, "A;B", "Order of the samplers, e.g. 'top_k;xtc;temperature'."),
    "dry_sequence_breakers": (list[str], "TEXT", "Text at which a repetition ends for the DRY sampler; repeatable."),
    "speculative": (str, "WHEN", "Draft tokens when that is faster (auto or on, default), or never (off)."),
    "draft_max": (int, "N", "Maximum number of drafted tokens in a step; 0 for none."),
    "json_schema": (Path, "FILE", "JSON schema file that the answer must match."),
    "grammar": (Path, "FILE", "Grammar file (GBNF or Lark) that the answer must match."),
}
_NUMBERS = [name for name in SAMPLING_TABLE if name != "repeat_last_n"]
_NAMES = {
    "dry_sequence_breakers": ("--dry-sequence-breaker",),
    "draft_max": ("--draft-max", "--spec-draft-n-max"),
}


def _json_of(path: Path) -> Any:
    text = text_of(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


_FILES: dict[str, Callable[[Path], Any]] = {"json_schema": _json_of, "grammar": text_of}


def with_samplers(*, recommended: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds sampling options to a command. The command gets their values as the argument
    `more`. If `recommended` is True, the model file's recommendations replace default values."""
    added = {name: _number_option(name, recommended) for name in _NUMBERS} | {name: _option(name) for name in _MORE}

    def add(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        names = [name for name in own if name != "more"]
        place = names.index("endpoint")
        known = {name: parameter.replace(kind=_KEYWORD) for name, parameter in own.items()} | added
        parameters = {name: known[name] for name in (*names[:place], *MAIN_NUMBERS, *names[place:], *added)}

        @wraps(command)
        def run(**arguments: Any) -> None:
            more = {name: value for name in added if (value := arguments.pop(name)) not in (None, [])}
            if "samplers" in more:
                more["samplers"] = [name for name in more["samplers"].replace(";", ",").split(",") if name]
            for name, read in _FILES.items():
                if name in more:
                    more[name] = option_value(_option_name(name), read, more[name])
            command(**arguments, more=_with_most_drafted(more))

        run.__signature__ = inspect.Signature([*parameters.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
        return run

    return add


def _with_most_drafted(more: dict[str, Any]) -> dict[str, Any]:
    """Merges --speculative and --draft-max into the field `speculative`. Raises UsageError for invalid values."""
    from llamaclust.cluster.config.values import switched
    from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW

    when, most = more.pop("speculative", "auto"), more.pop("draft_max", None)
    if (is_on := switched(when)) is None:
        raise UsageError(f"--speculative {when}: give auto, on or off; --draft-max N limits drafted tokens")
    if most is not None and not 0 <= most <= MAX_WINDOW:
        raise UsageError(f"--draft-max {most}: give 0 to {MAX_WINDOW}")
    if not is_on:
        if most:
            raise UsageError(f"--speculative {when} and --draft-max {most} contradict each other: give one of them")
        return {**more, "speculative": False}
    return more if most is None else {**more, "speculative": most}


def _number_option(name: str, recommended: bool) -> inspect.Parameter:
    row, help_text = SAMPLING_TABLE[name], SAMPLING_TABLE[name].doc
    default = None
    if name in MAIN_NUMBERS and recommended:
        help_text += f" Default: recommendation in the model file, else {row.llamacpp:g}."
    elif name in MAIN_NUMBERS:
        default = getattr(SamplingParams(), name)
    option = Option(_option_name(row.llamacpp_name or name), metavar=row.placeholder, help=help_text)
    return _parameter(name, int if row.is_whole else float, option, default)


def _option(name: str) -> inspect.Parameter:
    kind, metavar, text = _MORE[name]
    return _parameter(name, kind, Option(*_NAMES.get(name, (_option_name(name),)), metavar=metavar, help=text), None)


def _option_name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _parameter(name: str, kind: Any, option: Any, default: float | None) -> inspect.Parameter:
    value: Any = kind | None if default is None else kind
    return inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[value, option])
