"""Fields of other servers that are no-ops here, and the values at which those that are not supported mean nothing."""

from __future__ import annotations

from typing import Any, Final

from llamaclust.cluster.api.schema import Neutral


def only(*values: Any) -> Neutral:
    """Neutral at these values, or where nothing is in it."""

    def check(value: Any) -> bool:
        if isinstance(value, list | dict | str) and not value:
            return True
        return any(type(value) is type(known) and value == known for known in values)

    return check


def anything(value: Any) -> bool:
    """A field that never changes the answer."""
    return True


def number(neutral: float) -> Neutral:
    """Neutral at one number, written as 1 or 1.0."""

    def check(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == neutral

    return check


def _names(names: str, neutral: Neutral) -> dict[str, Neutral]:
    return dict.fromkeys(names.split(), neutral)


_SAMPLERS: Final = {"typ_p": number(1), **_names("top_a smoothing_factor", number(0))}
"""Samplers that are not built."""

_CONSTRAINTS: Final = _names(
    "grammar json_schema grammar_triggers guided_json guided_regex guided_choice guided_grammar structured_outputs "
    "bad_words allowed_token_ids logits_processors",
    only(),
) | {"grammar_lazy": only(False)}

_NO_OPS: Final = _names(
    "user metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention request_id "
    "cache_prompt id_slot slot_id n_keep n_discard timings_per_token return_progress",
    anything,
)
"""Of all endpoints. `metadata` is for stored completions, and none are stored; `n_keep` and `n_discard` are for a
context that shifts; this one ends."""

_BOTH: Final = {
    **_NO_OPS,
    **_SAMPLERS,
    **_CONSTRAINTS,
    "store": only(False),
    "response_format": only({"type": "text"}),
    "use_beam_search": only(False),
    "early_stopping": only(False),
    "length_penalty": number(1),
    "include_stop_str_in_output": only(False),
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": only(True),
    "truncate_prompt_tokens": only(),
    "priority": number(0),
    "lora": only(),
}

CHAT: Final[dict[str, Neutral]] = {
    **_BOTH,
    "tools": only(),
    "functions": only(),
    "tool_choice": only("none", "auto"),
    "function_call": only("none", "auto"),
    "parallel_tool_calls": only(True, False),
    "modalities": only(["text"]),
    "audio": only(),
    "web_search_options": only(),
    "prediction": only(),
    "reasoning_effort": only("medium"),
    "verbosity": only("medium"),
    "chat_template": only(),
    "documents": only(),
    "echo": only(False),
    "best_of": number(1),
    "prompt_logprobs": only(),
    "add_generation_prompt": only(True),
    "continue_final_message": only(False),
    "add_special_tokens": only(False),
    "return_tokens_as_token_ids": only(False),
}

MESSAGE: Final[dict[str, Neutral]] = {
    "refusal": only(),
    "annotations": only(),
    "audio": only(),
    "function_call": only(),
    "tool_calls": only(),
    "tool_call_id": only(),
}
"""An answer of this API may be sent back as a message."""

COMPLETION: Final[dict[str, Neutral]] = {
    **_BOTH,
    "suffix": only(),
    "prompt_logprobs": only(),
    "return_tokens_as_token_ids": only(False),
    "prompt_embeds": only(),
}

LLAMACPP: Final[dict[str, Neutral]] = {
    **_NO_OPS,
    **_SAMPLERS,
    **_CONSTRAINTS,
    "n_indent": number(0),
    "min_keep": only(0, 1),
    "n_cmpl": number(1),
    "t_max_predict_ms": only(-1, 0),
    "t_max_prompt_ms": only(-1, 0),
    "post_sampling_probs": only(False),
    "response_fields": only(),
    "lora": only(),
    "image_data": only(),
    "multimodal_data": only(),
    "backend_sampling": only(False),
}

TEMPLATE: Final[dict[str, Neutral]] = {"tools": only(), "add_generation_prompt": only(True)}
