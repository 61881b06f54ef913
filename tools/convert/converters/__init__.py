"""Maps a checkpoint's architecture to GGUF's name for it and to the function that converts its tensors. Only the text
model of a multimodal checkpoint is converted."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import (
    dense,
    falcon,
    glm,
    glm_moe,
    gpt,
    gpt_oss,
    hunyuan,
    llama,
    llama4,
    mixtures,
    olmo,
    phi3,
    qwen,
    qwen_delta,
)
from llamaclust.tools.convert.converters.gemma import gemma, gemma3n, gemma4
from llamaclust.tools.convert.converters.latent import deepseek
from llamaclust.tools.convert.converters.recurrent import falcon_h1, granite_hybrid, kimi, lfm2, nemotron_h
from llamaclust.tools.convert.converters.text_parts import MULTIMODAL, text_part
from llamaclust.tools.convert.settings import Checkpoint

CONVERTERS: Mapping[str, tuple[str, Callable[[ConvertedModel], None]]] = MappingProxyType(
    {
        "LlamaForCausalLM": ("llama", llama.build),
        "LLaMAForCausalLM": ("llama", llama.build),
        "MistralForCausalLM": ("llama", llama.build),
        "MixtralForCausalLM": ("llama", llama.build),
        "YiForCausalLM": ("llama", llama.build),
        "Meta": ("llama", llama.build_meta),
        "Llama4ForCausalLM": ("llama4", llama4.build),
        "SmolLM3ForCausalLM": ("smollm3", llama.build_smollm3),
        "Ministral3ForCausalLM": ("mistral3", llama.build_mistral3),
        "BaichuanForCausalLM": ("baichuan", llama.build_baichuan),
        "BaiChuanForCausalLM": ("baichuan", llama.build_baichuan),
        "Qwen2ForCausalLM": ("qwen2", qwen.build),
        "Qwen2MoeForCausalLM": ("qwen2moe", qwen.build),
        "Qwen3ForCausalLM": ("qwen3", qwen.build),
        "Qwen3MoeForCausalLM": ("qwen3moe", qwen.build),
        "Qwen3NextForCausalLM": ("qwen3next", qwen_delta.build),
        "Qwen3_5ForCausalLM": ("qwen35", qwen_delta.build),
        "Qwen3_5MoeForCausalLM": ("qwen35moe", qwen_delta.build),
        "Qwen3VLForCausalLM": ("qwen3vl", qwen.build),
        "Qwen3VLMoeForCausalLM": ("qwen3vlmoe", qwen.build),
        "ChatGLMModel": ("chatglm", glm.build_chatglm),
        "ChatGLMForConditionalGeneration": ("chatglm", glm.build_chatglm),
        "Olmo2ForCausalLM": ("olmo2", olmo.build),
        "Olmo3ForCausalLM": ("olmo2", olmo.build_olmo3),
        "Phi3ForCausalLM": ("phi3", phi3.build),
        "InternLM2ForCausalLM": ("internlm2", llama.build_internlm2),
        "GemmaForCausalLM": ("gemma", gemma.build),
        "Gemma2ForCausalLM": ("gemma2", gemma.build),
        "Gemma3ForCausalLM": ("gemma3", gemma.build),
        "Gemma3nForCausalLM": ("gemma3n", gemma3n.build),
        "Gemma4ForCausalLM": ("gemma4", gemma4.build),
        "GlmForCausalLM": ("chatglm", glm.build),
        "Glm4ForCausalLM": ("glm4", glm.build),
        "Glm4MoeForCausalLM": ("glm4moe", glm_moe.build),
        "SeedOssForCausalLM": ("seed_oss", dense.build_seed_oss),
        "Ernie4_5ForCausalLM": ("ernie4_5", dense.build_ernie4_5),
        "Exaone4ForCausalLM": ("exaone4", dense.build_exaone4),
        "GraniteForCausalLM": ("granite", dense.build_granite),
        "GraniteMoeForCausalLM": ("granitemoe", mixtures.build_granite),
        "GraniteMoeSharedForCausalLM": ("granitemoe", mixtures.build_granite),
        "GraniteMoeHybridForCausalLM": ("granitehybrid", granite_hybrid.build),
        "Ernie4_5_MoeForCausalLM": ("ernie4_5-moe", mixtures.build_ernie),
        "BailingMoeV2ForCausalLM": ("bailingmoe2", mixtures.build_bailing),
        "MiniMaxM2ForCausalLM": ("minimax-m2", mixtures.build_minimax),
        "HunYuanDenseV1ForCausalLM": ("hunyuan-dense", hunyuan.build_dense),
        "HunYuanMoEV1ForCausalLM": ("hunyuan-moe", hunyuan.build_moe),
        "DeepseekV2ForCausalLM": ("deepseek2", deepseek.build_v2),
        "DeepseekV3ForCausalLM": ("deepseek2", deepseek.build_v3),
        "Glm4MoeLiteForCausalLM": ("deepseek2", deepseek.build_glm_flash),
        "Mistral4ForCausalLM": ("mistral4", deepseek.build_mistral4),
        "KimiLinearForCausalLM": ("kimi-linear", kimi.build),
        "Cohere2ForCausalLM": ("cohere2", dense.build_cohere2),
        "GptOssForCausalLM": ("gpt-oss", gpt_oss.build),
        "FalconForCausalLM": ("falcon", falcon.build),
        "RWForCausalLM": ("falcon", falcon.build),
        "FalconH1ForCausalLM": ("falcon-h1", falcon_h1.build),
        "NemotronHForCausalLM": ("nemotron_h", nemotron_h.build),
        "Lfm2ForCausalLM": ("lfm2", lfm2.build),
        "LFM2ForCausalLM": ("lfm2", lfm2.build),
        "Lfm2MoeForCausalLM": ("lfm2moe", lfm2.build),
        "Starcoder2ForCausalLM": ("starcoder2", gpt.build_starcoder2),
        "GPT2LMHeadModel": ("gpt2", gpt.build_gpt2),
    }
)

_LONGEST_NAME: Final = 100
_NOTE: Final = "only the text model is written, without the parts for images and sound"


def convert_checkpoint(checkpoint: Checkpoint) -> ConvertedModel:
    text = text_part(checkpoint)
    found = CONVERTERS.get(text.family)
    if found is None:
        names = [name for name in (*CONVERTERS, *MULTIMODAL) if name != "Meta"]
        near = difflib.get_close_matches(checkpoint.family[:_LONGEST_NAME], names, 3)
        hint = f", did you mean {' or '.join(near)}?" if near else ""
        known = f"{len(names)} architectures can: docs/models.md"
        what = f"{shown(checkpoint.family)} cannot be converted{hint}; {known}"
        raise checkpoint.settings.error("architectures", what)
    architecture, build = found
    model = ConvertedModel(text, architecture)
    if text is not checkpoint:
        model.notes.append(_NOTE)
    build(model)
    model.finish()
    return model
