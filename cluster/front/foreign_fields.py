"""Fields of other servers' APIs that this server does not implement, each with a predicate for harmless values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from llamaclust.cluster.front.schema import ForeignFields, Neutral


def only(*values: Any) -> Neutral:
    """Makes a predicate that is True for `values` and for empty values."""
    known = [(type(value), value) for value in values]
    return lambda value: value in ([], {}, "") or (type(value), value) in known


def anything(value: Any) -> bool:
    """Returns True. Used as the predicate for fields that never change the answer."""
    return True


def negative(value: Any) -> bool:
    """Returns True for negative integers. Used for fields that a negative number switches off."""
    return type(value) is int and value < 0


def number(neutral: float) -> Neutral:
    """Makes a predicate that is True for the number `neutral`, as an int or a float."""
    return lambda value: type(value) in (int, float) and value == neutral


def _names(names: str, neutral: Neutral) -> dict[str, Neutral]:
    return dict.fromkeys(names.split(), neutral)


_LIMITS: Final = {**_names("t_max_predict_ms t_max_prompt_ms", only(-1, 0)), "n_indent": number(0)}
"""Limits of llama.cpp that all endpoints ignore."""

_HINTS: Final = {
    **_LIMITS,
    **_names("user metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention", anything),
    **_names("request_id cache_prompt n_keep n_discard", anything),
    **_names("store early_stopping backend_sampling cache_reuse", only(False)),
    "priority": number(0),
}
"""Fields that most endpoints ignore."""

_SLOTS: Final = _names("id_slot slot_id", anything)
_NOT_DRAFTED: Final = _names("speculative speculative.n_max", anything)

_REFUSED: Final = {
    **_names("grammar_triggers bad_words allowed_token_ids logits_processors structural_tag", only()),
    **_names("guided_whitespace_pattern", only()),
    "grammar_lazy": only(False),
    **_names("top_a smoothing_factor", number(0)),
    **_names("use_beam_search include_stop_str_in_output return_tokens_as_token_ids", only(False)),
    **_names("skip_special_tokens spaces_between_special_tokens", only(True)),
    **_names("truncate_prompt_tokens prompt_logprobs", only()),
    "length_penalty": number(1),
    "min_keep": only(0, 1),
}
"""Fields of samplers, constraints and output formats that no endpoint implements."""

_LENGTHS: Final = {"min_tokens": number(0), "stop_token_ids": only()}
"""Fields about the length of an answer that only OpenAI's endpoints have."""

_OTHER_NAMES: Final = {"typ_p": "typical_p", "tfs": "tfs_z", "speculative.n_max": "speculative"}

_SLOT_NAME: Final = {"slot_id": "id_slot"}

_BUDGETS: Final = dict.fromkeys(
    ("reasoning_budget_tokens", "thinking_budget_tokens", "thinking_budget", "thinking_token_budget"),
    "reasoning_budget",
)
"""Names of `reasoning_budget` in llama.cpp, DashScope and vLLM."""

_OPENAI_NAMES: Final = {**_OTHER_NAMES, "repeat_penalty": "repetition_penalty", "n_predict": "max_tokens"}

SLOTS_NOT_KEPT: Final = _names("id_slot slot_id", negative)
"""Fields that have no effect unless `api.slot_folder` is set."""

ALWAYS_LOADED: Final = _names("keep_alive", negative)
"""Fields that have no effect without `models` in the cluster file, because the only model is never unloaded."""

CHAT: Final = ForeignFields(
    refused={
        **_REFUSED,
        **_names("functions audio web_search_options chat_template", only()),
        **_names("function_call", only("none", "auto")),
        **_names("echo add_special_tokens", only(False)),
        "modalities": only(["text"]),
        "best_of": number(1),
        "n_cmpl": number(1),
    },
    hints={
        **_HINTS,
        **_names("verbosity", only("medium")),
        **_names("prediction", only()),
    },
    other_names={**_OPENAI_NAMES, **_SLOT_NAME, **_BUDGETS},
)

MESSAGE: Final = ForeignFields(
    refused=_names("audio function_call", only()),
    hints=_names("id refusal annotations cache_control", anything),
)
"""Fields of chat messages. A client may send an answer back as a message, with fields that another server added."""

COMPLETION: Final = ForeignFields(
    refused={**_REFUSED, **_names("prompt_embeds", only()), "n_cmpl": number(1)},
    hints=_HINTS,
    other_names={**_OPENAI_NAMES, **_SLOT_NAME, "n_probs": "logprobs"},
)

LLAMACPP: Final = ForeignFields(
    refused={
        **_REFUSED,
        **_names("image_data multimodal_data", only()),
        **_names("post_sampling_probs echo", only(False)),
        **_names("n n_cmpl", number(1)),
        **_LENGTHS,
    },
    hints={**_HINTS, "response_fields": only()},
    other_names={**_OTHER_NAMES, **_SLOT_NAME, "max_tokens": "n_predict", "repetition_penalty": "repeat_penalty"},
)

EMBEDDING: Final = ForeignFields(
    refused=_names("truncate_prompt_tokens lora", only()),
    hints={**_HINTS, **_SLOTS, **_NOT_DRAFTED},
)

RERANK: Final = ForeignFields(
    refused=_names("truncate_prompt_tokens max_tokens_per_doc rank_fields lora", only())
    | _names("truncate", only(False)),
    hints={**_HINTS, **_SLOTS, **_NOT_DRAFTED, **_names("raw_scores truncation_direction", anything)},
)
"""Fields of reranking requests. Scores are the raw scores of the model, as in llama.cpp."""

TEXT_ONLY: Final = ForeignFields(hints={"model": anything})

_CHAT_ONLY: Final = {
    **_REFUSED,
    **_names("response_format json_schema grammar structured_outputs logit_bias", only()),
    **_names("guided_json guided_regex guided_choice guided_grammar regex ebnf", only()),
    **_names("guided_json_object ignore_eos", only(False)),
    "n": number(1),
    **_LENGTHS,
}
"""Fields of `/v1/chat/completions` that the other chat APIs refuse."""

RESPONSES: Final = ForeignFields(
    refused={
        **_CHAT_ONLY,
        **_names("conversation prompt", only()),
    },
    hints={
        **_LIMITS,
        **_names(
            "user service_tier safety_identifier prompt_cache_key prompt_cache_retention client_metadata", anything
        ),
        **_names("max_tool_calls context_management", only(False)),
        "truncation": only("disabled"),
    },
    other_names={
        **_OTHER_NAMES,
        **_BUDGETS,
        "repeat_penalty": "repetition_penalty",
        "n_predict": "max_output_tokens",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
    },
)

COMPACTION: Final = replace(RESPONSES, other_names={})

MESSAGES: Final = ForeignFields(
    refused={**_CHAT_ONLY, **_names("mcp_servers container fallback_model", only())},
    hints={
        **_LIMITS,
        **_names("metadata service_tier cache_control context_management", anything),
        **_names("inference_geo speed betas user_profile_id", anything),
    },
    other_names={**_OPENAI_NAMES, **_BUDGETS, "stop": "stop_sequences"},
)
"""Anthropic's fields. The ignored fields concern costs, caches, regions, and the shortening of chats."""

SWITCH: Final = ForeignFields(
    hints={"display": only("summarized"), "exclude": only(False), **_names("keep clear_thinking", only())},
    other_names={"max_tokens": "budget_tokens"},
)
"""Keys of the objects `thinking` and `reasoning`."""

ANTHROPIC_TOOL: Final = ForeignFields(
    hints=_names("cache_control strict defer_loading allowed_callers input_examples eager_input_streaming", anything)
)

OLLAMA_OPTIONS: Final = ForeignFields(
    refused={**_CHAT_ONLY, "lora": only(), **_names("rope_frequency_base rope_frequency_scale", number(0))},
    hints={
        **_LIMITS,
        **_names("num_keep num_batch num_gpu main_gpu num_thread low_vram vocab_only numa num_gqa", anything),
        **_names("use_mmap use_mlock f16_kv logits_all", anything),
        "num_ctx": only(),
    },
    other_names={"penalize_newline": "penalize_nl", "max_tokens": "num_predict", "repetition_penalty": "repeat_penalty"}
    | _OTHER_NAMES
    | _BUDGETS,
)
"""Ollama's options. Options that set how a model is computed are ignored, because the cluster file sets this."""

OLLAMA_GENERATE: Final = ForeignFields(
    refused={**_CHAT_ONLY, **_names("template adapters lora", only())},
    hints={**_LIMITS, **_names("truncate shift", anything)},
)
OLLAMA: Final = replace(OLLAMA_GENERATE, refused={**OLLAMA_GENERATE.refused, "images": only()})
"""Fields of Ollama's requests. `truncate` and `shift` have no effect, because this server never shortens prompts."""

OLLAMA_MESSAGE: Final = ForeignFields(other_names={"name": "tool_name"})

OF_ADAPTERS: Final = ForeignFields(
    refused=_names("load_inplace is_3d_lora_weight", only(False)), hints=_names("lora_int_id", anything)
)
