"""Fields of other servers that are no-ops here, and the values at which those that are not supported mean nothing."""

from __future__ import annotations

from typing import Any, Final

from llamaclust.cluster.api.schema import Neutral


def only(*values: Any) -> Neutral:
    """Neutral at these values, or where nothing is in it."""
    known = [(type(value), value) for value in values]
    return lambda value: value in ([], {}, "") or (type(value), value) in known


def anything(value: Any) -> bool:
    """A field that never changes the answer."""
    return True


def number(neutral: float) -> Neutral:
    """Neutral at one number, written as 1 or 1.0."""
    return lambda value: type(value) in (int, float) and value == neutral


def _names(names: str, neutral: Neutral) -> dict[str, Neutral]:
    return dict.fromkeys(names.split(), neutral)


_SAMPLERS: Final = {"typ_p": number(1), **_names("top_a smoothing_factor", number(0))}
"""Samplers that are not built."""

_CONSTRAINTS: Final = _names("grammar_triggers bad_words allowed_token_ids logits_processors", only()) | {
    "grammar_lazy": only(False)
}

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
    **_names("store use_beam_search early_stopping include_stop_str_in_output return_tokens_as_token_ids", only(False)),
    **_names("skip_special_tokens spaces_between_special_tokens", only(True)),
    **_names("truncate_prompt_tokens lora prompt_logprobs", only()),
    "length_penalty": number(1),
    "priority": number(0),
}

CHAT: Final[dict[str, Neutral]] = {
    **_BOTH,
    **_names("tools functions audio web_search_options prediction chat_template documents", only()),
    **_names("tool_choice function_call", only("none", "auto")),
    **_names("reasoning_effort verbosity", only("medium")),
    **_names("echo continue_final_message add_special_tokens", only(False)),
    "parallel_tool_calls": only(True, False),
    "modalities": only(["text"]),
    "best_of": number(1),
    "add_generation_prompt": only(True),
}

MESSAGE: Final[dict[str, Neutral]] = _names("refusal annotations audio function_call tool_calls tool_call_id", only())
"""An answer of this API may be sent back as a message."""

COMPLETION: Final[dict[str, Neutral]] = {**_BOTH, **_names("suffix prompt_embeds", only())}

LLAMACPP: Final[dict[str, Neutral]] = {
    **_NO_OPS,
    **_SAMPLERS,
    **_CONSTRAINTS,
    **_names("response_fields lora image_data multimodal_data", only()),
    **_names("post_sampling_probs backend_sampling", only(False)),
    **_names("t_max_predict_ms t_max_prompt_ms", only(-1, 0)),
    "n_indent": number(0),
    "min_keep": only(0, 1),
    "n_cmpl": number(1),
}

TEMPLATE: Final[dict[str, Neutral]] = {"tools": only(), "add_generation_prompt": only(True)}
