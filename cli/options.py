"""How options are declared, shown and read: help without Python's types, GPUs, samplers, keys of workers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import zip_longest
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from llamaclust.core.errors import UsageError


class PlainCommand(TyperCommand):
    """A command whose flags have no value in its help, and whose arguments have their name alone."""

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """The same for a command that has commands."""

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))


def _without_types(params: list[Any]) -> list[Any]:
    for one in params:
        if one.param_type_name == "argument":
            one.display_type_rich = lambda ctx: None
        elif one.is_flag:
            one.metavar = ""
    return params


_KEYS = {
    "--device": "device",
    "-dev": "device",
    "--gpu-layers": "gpu_layers",
    "--n-gpu-layers": "gpu_layers",
    "-ngl": "gpu_layers",
    "--gpu-memory": "gpu_memory",
    "--threads": "threads",
    "-t": "threads",
    "--memory": "memory",
}


class FileCommand(PlainCommand):
    """A command that reads a cluster file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """UsageError for a worker's option."""
        for word, following in zip_longest(args, args[1:], fillvalue=""):
            option, _, value = word.partition("=")
            if key := _KEYS.get(option):
                told = f"--set workers.0.{key}={value or following or '...'}"
                raise UsageError(f"{option}: is a key of a worker here, `{key}` in the cluster file: {told}")
        rest: list[str] = super().parse_args(ctx, args)
        return rest


Devices = Annotated[
    list[str],
    typer.Option(
        "--device", metavar="DEVICE", help="What computes: cpu (default), or GPUs beside it: cuda:0 or cuda:0,cuda:1."
    ),
]
GpuLayers = Annotated[
    str, typer.Option("--gpu-layers", "-ngl", metavar="N", help="Layers on GPUs, or auto: as many as VRAM takes.")
]
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Gpus:
    """What it computes on, as options."""

    devices: Sequence[str] = ()  # none: the processor
    gpu_layers: str = "auto"
    gpu_memory: str | None = None

    @property
    def parsed(self) -> tuple[str, int | None, int | None]:
        """Device, layers on its GPUs, cap in bytes. UsageError names the option with a bad value."""
        from llamaclust.cluster.config.values import parse_device, parse_gpu_layers, parse_size

        device = option_value("--device", parse_device, ",".join(self.devices) or "cpu")
        layers = option_value("--gpu-layers", parse_gpu_layers, self.gpu_layers)
        memory = None if self.gpu_memory is None else option_value("--gpu-memory", parse_size, self.gpu_memory)
        for name, given in (("--gpu-layers", layers), ("--gpu-memory", memory)):
            if device == "cpu" and given is not None:
                raise UsageError(f"{name}: is for workers with a GPU: give --device cuda:0 as well")
        return device, layers, memory


NO_GPUS = Gpus()


def option_value(option: str, read: Callable[[str], _Value], given: str) -> _Value:
    """UsageError that names the option with a bad value."""
    try:
        return read(given)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


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
