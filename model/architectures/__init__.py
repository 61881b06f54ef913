"""Architectures by their names in GGUF files. Each architecture appends the steps of its layers to a ProgramBuilder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from llamaclust.model.architectures import (
    bert,
    cohere,
    glm,
    gpt,
    gpt_oss,
    granite,
    lfm2,
    llama,
    mixtures,
    olmo,
    phi3,
    qwen,
)
from llamaclust.model.architectures.encoder_layers import EncoderBuilder
from llamaclust.model.architectures.gemma import gemma, gemma3n, gemma4
from llamaclust.model.architectures.latent import deepseek
from llamaclust.model.architectures.recurrent import falcon_h1, granite_hybrid, kimi, nemotron_h
from llamaclust.model.architectures.recurrent import qwen as recurrent_qwen
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.values import shown
from llamaclust.model.kv_type import KvType
from llamaclust.model.model_keys import ModelKeys, hyperparameters_of, read_architecture
from llamaclust.model.program import Program

ARCHITECTURES: Mapping[str, Callable[[EncoderBuilder], None]] = MappingProxyType(
    {
        "baichuan": llama.baichuan,
        "bailingmoe2": mixtures.bailingmoe2,
        "bert": bert.bert,
        "chatglm": glm.chatglm,
        "cohere2": cohere.cohere2,
        "deepseek2": deepseek.deepseek2,
        "ernie4_5": llama.ernie4_5,
        "ernie4_5-moe": mixtures.ernie4_5_moe,
        "exaone4": olmo.exaone4,
        "falcon": gpt.falcon,
        "falcon-h1": falcon_h1.falcon_h1,
        "gemma": gemma.gemma,
        "gemma2": gemma.gemma2,
        "gemma3": gemma.gemma3,
        "gemma3n": gemma3n.gemma3n,
        "gemma4": gemma4.gemma4,
        "gemma-embedding": gemma.gemma_embedding,
        "glm4": glm.glm4,
        "glm4moe": mixtures.glm4moe,
        "gpt-oss": gpt_oss.gpt_oss,
        "gpt2": gpt.gpt2,
        "granite": granite.granite,
        "granitehybrid": granite_hybrid.granite_hybrid,
        "granitemoe": granite.granite,
        "hunyuan-dense": llama.hunyuan_dense,
        "hunyuan-moe": mixtures.hunyuan_moe,
        "internlm2": llama.internlm2,
        "jina-bert-v2": bert.jina_bert_v2,
        "jina-bert-v3": bert.jina_bert_v3,
        "kimi-linear": kimi.kimi_linear,
        "lfm2": lfm2.lfm2,
        "lfm2moe": lfm2.lfm2,
        "llama": llama.llama,
        "llama4": mixtures.llama4,
        "minimax-m2": mixtures.minimax_m2,
        "mistral3": llama.mistral3,
        "mistral4": deepseek.mistral4,
        "modern-bert": bert.modern_bert,
        "nomic-bert": bert.nomic_bert,
        "nomic-bert-moe": bert.nomic_bert_moe,
        "nemotron_h": nemotron_h.nemotron_h,
        "nemotron_h_moe": nemotron_h.nemotron_h,
        "olmo2": olmo.olmo2,
        "phi3": phi3.phi3,
        "qwen2": qwen.qwen2,
        "qwen2moe": qwen.qwen2moe,
        "qwen2vl": qwen.qwen2vl,
        "qwen3": qwen.qwen3,
        "qwen35": recurrent_qwen.qwen35,
        "qwen35moe": recurrent_qwen.qwen35moe,
        "qwen3moe": qwen.qwen3moe,
        "qwen3next": recurrent_qwen.qwen3next,
        "qwen3vl": qwen.qwen3vl,
        "qwen3vlmoe": qwen.qwen3vlmoe,
        "seed_oss": llama.seed_oss,
        "smollm3": llama.smollm3,
        "starcoder2": gpt.starcoder2,
    }
)

_RESHAPES: Mapping[str, Callable[[ModelFile], ModelFile]] = MappingProxyType({"kimi-linear": kimi.without_ones})


def build_program(
    model: ModelFile, start: int, end: int, kv_type: KvType = KvType.F16, context_tokens: int | None = None
) -> Program:
    """Returns the program of layers [start, end). `context_tokens` is the maximum sequence length. None means the
    model's context length. Raises ModelFileError, which names the invalid architecture, key or tensor."""
    keys = ModelKeys(as_programs_read(model))
    builder = EncoderBuilder(keys, hyperparameters_of(keys), start, end, kv_type, context_tokens)
    ARCHITECTURES[keys.architecture](builder)
    keys.refuse_unread()
    return builder.program()


def as_programs_read(model: ModelFile) -> ModelFile:
    """Returns the model with its tensors reshaped as programs expect. Raises ModelFileError if the architecture is not
    supported."""
    check_architecture(model)
    reshape = _RESHAPES.get(read_architecture(model))
    return model if reshape is None else reshape(model)


def check_architecture(model: ModelFile) -> None:
    name = read_architecture(model)
    if name not in ARCHITECTURES:
        what = f"{shown(name)} is not one of the {len(ARCHITECTURES)} supported architectures in docs/models.md"
        raise model.error("general.architecture", what, "use another model")
