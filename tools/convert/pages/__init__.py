"""Pages by architecture: the name in a checkpoint, and the page that maps its tensors."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.formats.checkpoint import Checkpoint
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import (
    baichuan,
    chatglm,
    falcon,
    gemma,
    glm,
    gpt2,
    internlm2,
    llama,
    meta,
    phi3,
    qwen,
    starcoder2,
)
from llamaclust.tools.convert.text_part import NOTE, TEXT_PARTS, text_part

PAGES: Mapping[str, tuple[str, Callable[[Page], None]]] = MappingProxyType(
    {
        "LlamaForCausalLM": ("llama", llama.build),
        "LLaMAForCausalLM": ("llama", llama.build),
        "MistralForCausalLM": ("llama", llama.build),
        "MixtralForCausalLM": ("llama", llama.build),
        "YiForCausalLM": ("llama", llama.build),
        "Meta": ("llama", meta.build),
        "BaichuanForCausalLM": ("baichuan", baichuan.build),
        "BaiChuanForCausalLM": ("baichuan", baichuan.build),
        "Qwen2ForCausalLM": ("qwen2", qwen.build),
        "Qwen2MoeForCausalLM": ("qwen2moe", qwen.build),
        "Qwen3ForCausalLM": ("qwen3", qwen.build),
        "Qwen3MoeForCausalLM": ("qwen3moe", qwen.build),
        "ChatGLMModel": ("chatglm", chatglm.build),
        "ChatGLMForConditionalGeneration": ("chatglm", chatglm.build),
        "Phi3ForCausalLM": ("phi3", phi3.build),
        "InternLM2ForCausalLM": ("internlm2", internlm2.build),
        "GemmaForCausalLM": ("gemma", gemma.build),
        "Gemma2ForCausalLM": ("gemma2", gemma.build),
        "Gemma3ForCausalLM": ("gemma3", gemma.build),
        "GlmForCausalLM": ("chatglm", glm.build),
        "Glm4ForCausalLM": ("glm4", glm.build),
        "FalconForCausalLM": ("falcon", falcon.build),
        "RWForCausalLM": ("falcon", falcon.build),
        "Starcoder2ForCausalLM": ("starcoder2", starcoder2.build),
        "GPT2LMHeadModel": ("gpt2", gpt2.build),
    }
)


def build_page(checkpoint: Checkpoint) -> Page:
    """Metadata and tensors of a checkpoint under GGUF's names; ModelFileError for an architecture without a page."""
    text = text_part(checkpoint)
    found = PAGES.get(text.family)
    if found is None:
        names = [name for name in (*PAGES, *TEXT_PARTS) if name != "Meta"]
        near = difflib.get_close_matches(checkpoint.family, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        what = f"{shown(checkpoint.family)} cannot be converted, only {', '.join(names)}{hint}"
        raise checkpoint.settings.error("architectures", what)
    architecture, build = found
    page = Page(text, architecture)
    if text is not checkpoint:
        page.notes.append(NOTE)
    build(page)
    page.finish()
    return page
