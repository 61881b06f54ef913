"""Architectures as pages that emit programs, by GGUF's name of the architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from llamaclust.model.architectures import baichuan, llama, qwen2
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.gguf import ModelFile
from llamaclust.model.gguf_values import shown
from llamaclust.model.hyperparameters import read_architecture, read_hyperparameters
from llamaclust.model.program import KvType, Program

ARCHITECTURES: Mapping[str, Callable[[ProgramBuilder], Program]] = MappingProxyType(
    {"baichuan": baichuan.build, "llama": llama.build, "qwen2": qwen2.build}
)


def build_program(model: ModelFile, start: int, end: int, kv_type: KvType = KvType.F16) -> Program:
    """The program of layers [start, end) of a model, every tensor of it checked to be in the file with the right shape.

    ModelFileError, naming what is wrong, for an architecture, a key or a tensor that is missing or does not fit.
    """
    check_architecture(model)
    page = ProgramBuilder(model, read_hyperparameters(model), start, end, kv_type)
    return ARCHITECTURES[read_architecture(model)](page)


def check_architecture(model: ModelFile) -> None:
    """ModelFileError for an architecture that there is no page for."""
    name = read_architecture(model)
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise model.error("general.architecture", f"{shown(name)} is not supported, only {known}", "take another model")
