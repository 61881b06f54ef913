"""Rules for preparing images, by the projector's name in GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llamaclust.model.images.families import gemma, glm4v, idefics3, internvl, kimivl, lfm2, llama4, pixtral, qwen
from llamaclust.model.images.families.family import ImageFamily

FAMILIES: Mapping[str, ImageFamily] = MappingProxyType(
    {
        "gemma3": gemma.GEMMA3,
        "gemma4v": gemma.GEMMA4,
        "glm4v": glm4v.GLM4V,
        "idefics3": idefics3.IDEFICS3,
        "internvl": internvl.INTERNVL,
        "kimivl": kimivl.KIMIVL,
        "lfm2": lfm2.LFM2,
        "llama4": llama4.LLAMA4,
        "pixtral": pixtral.PIXTRAL,
        "qwen2.5vl_merger": qwen.QWEN,
        "qwen2vl_merger": qwen.QWEN,
        "qwen3vl_merger": qwen.QWEN,
    }
)
