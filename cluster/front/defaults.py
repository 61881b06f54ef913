"""Decides which of the server's defaults apply to a request. The fields of the request take precedence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import combinations
from operator import ne
from typing import Any, Final

from llamaclust.cluster.front.structured_output import CONSTRAINTS, constrains
from llamaclust.cluster.front.thought_switches import SWITCHES, has_budget, has_switch

_Refuses = Callable[[Any, Any], bool]
"""A predicate of two fields' values (None if absent). It returns True if one request cannot have both values."""

_LOGPROBS: Final = "message.output_text.logprobs"
_KWARGS: Final = "chat_template_kwargs"


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _both(one: Any, other: Any) -> bool:
    return not _is_empty(one) and not _is_empty(other)


def _both_constrain(name: str, other_name: str, one: Any, other: Any) -> bool:
    return constrains(name, one) and constrains(other_name, other)


def _alone(one: Any, other: Any) -> bool:
    return not _is_empty(one) and _is_empty(other)


def _exceeds(least: Any, most: Any) -> bool:
    return isinstance(least, int | float) and isinstance(most, int | float) and 0 <= most < least


_EXCLUDED: Final[Collection[tuple[str, str, _Refuses]]] = (
    ("max_tokens", "max_completion_tokens", ne),
    ("min_tokens", "max_tokens", _exceeds),
    ("min_tokens", "max_completion_tokens", _exceeds),
    ("n", "best_of", ne),
    ("ignore_eos", "stop_token_ids", _both),
    ("continue_final_message", "add_generation_prompt", _both),
    ("background", "store", lambda background, store: background is True and store is False),
    *(("suffix", other, _both) for other in ("raw", "context", "system", "echo")),
    ("raw", "system", _both),
    *((one, other, lambda _, __: True) for one, other in combinations(SWITCHES, 2) if _KWARGS not in (one, other)),
    *((_KWARGS, other, lambda variables, _: has_switch(variables)) for other in SWITCHES if other != _KWARGS),
    *(
        ("reasoning_budget", other, lambda _, switch: has_budget(switch))
        for other in ("thinking", "think", "reasoning")
    ),
    *((one, other, partial(_both_constrain, one, other)) for one, other in combinations(CONSTRAINTS, 2)),
)
"""Pairs of fields, with a predicate that is True if their two values cannot be in one request."""
_NEEDED: Final[Collection[tuple[str, str, _Refuses]]] = (
    ("stream_options", "stream", _alone),
    ("top_logprobs", "logprobs", _alone),
    ("top_logprobs", "include", lambda top, names: not isinstance(names, list) or _LOGPROBS not in names),
    ("score_from", "echo", _alone),
    ("score_from", "logprobs", _alone),
    ("tool_choice", "tools", lambda choice, tools: choice not in ("auto", "none") and _is_empty(tools)),
)
"""Pairs of a field and a field that it requires. The predicate is True if the requirement is not met."""


def usable_defaults(defaults: Mapping[str, Any], given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns the entries of `defaults` that are in `known`, are not in `given`, and do not conflict with `given`."""
    absent = {name: value for name, value in defaults.items() if name in known and name not in given}
    values = {**absent, **given}
    excluded = {
        name
        for one, other, refuses in _EXCLUDED
        for name, field in ((one, other), (other, one))
        if name in absent and field in given and field in known and refuses(values[one], values[other])
    }
    left = {name: value for name, value in values.items() if name not in excluded}
    lacking = {
        name
        for name, needed, refuses in _NEEDED
        if name in absent and name in left and needed in known and refuses(left[name], left.get(needed))
    }
    return {name: value for name, value in left.items() if name in absent and name not in lacking}
