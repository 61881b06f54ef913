"""Pages by architecture: the name in a checkpoint, and the page that maps its tensors. Of a multimodal checkpoint the
text model is taken."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import falcon, gemma, glm, gpt, llama, phi3, qwen
from llamaclust.tools.convert.settings import Checkpoint

PAGES: Mapping[str, tuple[str, Callable[[Page], None]]] = MappingProxyType(
    {
        "LlamaForCausalLM": ("llama", llama.build),
        "LLaMAForCausalLM": ("llama", llama.build),
        "MistralForCausalLM": ("llama", llama.build),
        "MixtralForCausalLM": ("llama", llama.build),
        "YiForCausalLM": ("llama", llama.build),
        "Meta": ("llama", llama.build_meta),
        "BaichuanForCausalLM": ("baichuan", llama.build_baichuan),
        "BaiChuanForCausalLM": ("baichuan", llama.build_baichuan),
        "Qwen2ForCausalLM": ("qwen2", qwen.build),
        "Qwen2MoeForCausalLM": ("qwen2moe", qwen.build),
        "Qwen3ForCausalLM": ("qwen3", qwen.build),
        "Qwen3MoeForCausalLM": ("qwen3moe", qwen.build),
        "ChatGLMModel": ("chatglm", glm.build_chatglm),
        "ChatGLMForConditionalGeneration": ("chatglm", glm.build_chatglm),
        "Phi3ForCausalLM": ("phi3", phi3.build),
        "InternLM2ForCausalLM": ("internlm2", llama.build_internlm2),
        "GemmaForCausalLM": ("gemma", gemma.build),
        "Gemma2ForCausalLM": ("gemma2", gemma.build),
        "Gemma3ForCausalLM": ("gemma3", gemma.build),
        "GlmForCausalLM": ("chatglm", glm.build),
        "Glm4ForCausalLM": ("glm4", glm.build),
        "FalconForCausalLM": ("falcon", falcon.build),
        "RWForCausalLM": ("falcon", falcon.build),
        "Starcoder2ForCausalLM": ("starcoder2", gpt.build_starcoder2),
        "GPT2LMHeadModel": ("gpt2", gpt.build_gpt2),
    }
)


_TEXT_PARTS: Final = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
_NOTE: Final = "only the text model is written, without what sees pictures"

_DEFAULTS: Final[Mapping[str, Any]] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
}
"""Defaults of Gemma 3's text model, which the authors' configurations omit."""
_PREFIXES: Final = (("language_model.model.", "model."), ("language_model.", ""), ("model.language_model.", "model."))
_PICTURES: Final = tuple(
    f"{root}{part}." for root in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)


def build_page(checkpoint: Checkpoint) -> Page:
    """Metadata and tensors of a checkpoint under GGUF's names; ModelFileError for an architecture without a page."""
    text = _text_part(checkpoint)
    found = PAGES.get(text.family)
    if found is None:
        names = [name for name in (*PAGES, *_TEXT_PARTS) if name != "Meta"]
        near = difflib.get_close_matches(checkpoint.family, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        what = f"{shown(checkpoint.family)} cannot be converted, only {', '.join(names)}{hint}"
        raise checkpoint.settings.error("architectures", what)
    architecture, build = found
    page = Page(text, architecture)
    if text is not checkpoint:
        page.notes.append(_NOTE)
    build(page)
    page.finish()
    return page


def _text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The text model of a multimodal checkpoint; any other checkpoint unchanged."""
    family = _TEXT_PARTS.get(checkpoint.family)
    if family is None:
        return checkpoint
    inner = checkpoint.settings.inner("text_config")
    settings = Settings({**_DEFAULTS, **inner.values}, inner.origin)
    tensors = {_name(name): tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(_PICTURES)}
    return replace(checkpoint, family=family, settings=settings, tensors=tensors)


def _name(name: str) -> str:
    for prefix, other in _PREFIXES:
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name
