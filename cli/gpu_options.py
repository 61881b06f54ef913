"""Options that say which GPUs compute, of every command that takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import typer

from llamaclust.core.errors import UsageError

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
