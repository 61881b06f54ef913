"""Options of samplers beyond the plain ones, by llama.cpp's names, for commands that choose tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

_HELP: dict[str, tuple[type, str, str]] = {
    "top_n_sigma": (float, "X", "Only tokens within so many standard deviations of the likeliest's logit."),
    "tfs_z": (float, "Z", "Tail-free sampling; 1: off."),
    "typical_p": (float, "P", "Only the tokens of the most typical probability; 1: off."),
    "xtc_probability": (float, "P", "How often the likeliest tokens are taken out."),
    "xtc_threshold": (float, "P", "All at least so likely but the last."),
    "dynatemp_range": (float, "X", "How far the temperature goes with the entropy, down and up."),
    "dynatemp_exponent": (float, "X", "The power of the entropy that it goes with."),
    "dry_multiplier": (float, "X", "What repetitions cost (DRY); 0: off."),
    "dry_base": (float, "X", "How it grows with each token repeated."),
    "dry_allowed_length": (int, "N", "Shorter repetitions cost nothing."),
    "dry_penalty_last_n": (int, "N", "Last tokens that DRY looks at; -1: all."),
    "mirostat": (int, "N", "1 or 2: that version of Mirostat; 0: off."),
    "mirostat_tau": (float, "X", "The surprise that it aims at, in bits."),
    "mirostat_eta": (float, "X", "How fast it learns."),
    "repetition_penalty": (float, "X", "Divides the logits of tokens that occurred; 1: off."),
    "frequency_penalty": (float, "X", "Subtracted for each time a token occurred."),
    "presence_penalty": (float, "X", "Subtracted from the logits of tokens that occurred."),
}


def with_samplers(command: Callable[..., None]) -> Callable[..., None]:
    """The command with these options; those that are given reach it in its argument `more`, by name."""
    signature = inspect.signature(command, eval_str=True)
    own = {name: one for name, one in signature.parameters.items() if name != "more"}
    added = {name: _parameter(name) for name in (*_HELP, "samplers", "dry_sequence_breakers")}

    @wraps(command)
    def run(**arguments: Any) -> None:
        given = {name: value for name in added if (value := arguments.pop(name)) not in (None, [])}
        if "samplers" in given:
            given["samplers"] = [name for name in given["samplers"].replace(";", ",").split(",") if name]
        command(**arguments, more=given)

    parameters = [*own.values(), *added.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _parameter(name: str) -> inspect.Parameter:
    annotation = _annotation(name)
    default: list[str] | None = [] if name == "dry_sequence_breakers" else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(name: str) -> Any:
    if name == "samplers":
        said = "Which samplers act, in this order: penalties, dry, top_n_sigma, top_k, tfs_z, typ_p, top_p, min_p, ..."
        return Annotated[str | None, typer.Option("--samplers", metavar="A;B", help=said)]
    if name == "dry_sequence_breakers":
        said = "No repetition goes beyond this text; may be given several times."
        return Annotated[list[str], typer.Option("--dry-sequence-breaker", metavar="TEXT", help=said)]
    kind, metavar, said = _HELP[name]
    option = "--repeat-penalty" if name == "repetition_penalty" else f"--{name.replace('_', '-')}"
    return Annotated[kind | None, typer.Option(option, metavar=metavar, help=said)]
