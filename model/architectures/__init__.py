"""Architectures by their GGUF name; each emits a program through a ProgramBuilder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from llamaclust.model.architectures import (
    baichuan,
    chatglm,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    internlm2,
    llama,
    phi3,
    qwen2,
    qwen2moe,
    qwen3,
    qwen3moe,
    starcoder2,
)
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.values import shown
from llamaclust.model.hyperparameters import read_architecture, read_hyperparameters
from llamaclust.model.program import KvType, Program

ARCHITECTURES: Mapping[str, Callable[[ProgramBuilder], Program]] = MappingProxyType(
    {
        "baichuan": baichuan.build,
        "chatglm": chatglm.build,
        "falcon": falcon.build,
        "gemma": gemma.build,
        "gemma2": gemma2.build,
        "gemma3": gemma3.build,
        "glm4": glm4.build,
        "gpt2": gpt2.build,
        "internlm2": internlm2.build,
        "llama": llama.build,
        "phi3": phi3.build,
        "qwen2": qwen2.build,
        "qwen2moe": qwen2moe.build,
        "qwen3": qwen3.build,
        "qwen3moe": qwen3moe.build,
        "starcoder2": starcoder2.build,
    }
)


def build_program(
    model: ModelFile, start: int, end: int, kv_type: KvType = KvType.F16, context_tokens: int | None = None
) -> Program:
    """The program of layers [start, end) of a model, every tensor of it checked to be in the file with the right shape.

    `context_tokens`: the longest sequence it is for, all that the model was made for unless said otherwise.
    ModelFileError, naming what is wrong, for an architecture, a key or a tensor that is missing or does not fit.
    """
    check_architecture(model)
    builder = ProgramBuilder(model, read_hyperparameters(model), start, end, kv_type, context_tokens)
    return ARCHITECTURES[read_architecture(model)](builder)


def check_architecture(model: ModelFile) -> None:
    """ModelFileError for an unsupported architecture."""
    name = read_architecture(model)
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise model.error("general.architecture", f"{shown(name)} is not supported, only {known}", "take another model")
