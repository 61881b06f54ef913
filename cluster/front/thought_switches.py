"""Request fields that switch a model's thoughts on or off, or limit them, under the names of all APIs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.foreign_fields import SWITCH
from llamaclust.cluster.front.schema import Body, read_part
from llamaclust.cluster.front.text.request import (
    BUDGET_VARIABLE,
    EFFORT_VARIABLES,
    MAX_MESSAGE_CHARACTERS,
    SWITCH_VARIABLES,
    ReasoningBudget,
    Thoughts,
)
from llamaclust.core.errors import ParameterError

_OFF: Final = ("none", "off", "disabled", "no_think")
_ON: Final = ("on", "enabled")
_UNDECIDED: Final = ("auto", "default", "adaptive")
_AMOUNTS: Final = ("minimal", "low", "medium", "high", "xhigh", "max")
_WORDS: Final = (*_OFF, *_ON, *_UNDECIDED, *_AMOUNTS)


class Switch(Body, foreign=SWITCH):
    """The value of `thinking`, `think` or `reasoning`. A boolean means `enabled`, a text means `effort`."""

    type: Literal["enabled", "adaptive", "between_tools", "auto", "disabled"] | None = None
    enabled: bool | None = None
    effort: str | None = None
    """The amount of reasoning, such as `low`. The chat template receives it. `none` means no reasoning."""
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    """The maximum number of reasoning tokens, after which the server ends the reasoning. The default is no limit."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted without effect, because reasoning is always shown in full."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """The older name for `summary`."""

    def statements(self) -> dict[str, bool | None]:
        """Returns whether each key switches the thoughts on (True), off (False) or neither (None)."""
        by_type = None if self.type not in ("enabled", "disabled") else self.type == "enabled"
        return {"type": by_type, "enabled": self.enabled, "effort": _switched(self.effort)}


def _switched(effort: Any) -> bool | None:
    return True if effort in _ON else False if effort in _OFF else None


def _amount(effort: str | None) -> str | None:
    return None if effort in (*_OFF, *_ON, *_UNDECIDED) else effort


def _switch(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, bool):
        return Switch(enabled=value)
    if isinstance(value, str) and value in _WORDS:
        return Switch(effort=value)
    if not isinstance(value, dict):
        raise ValueError(f"must be a boolean, an object or one of {', '.join(_WORDS)}")
    return read_part(Switch, value, info.context)


_FORMS: Final = {"anyOf": [{"type": "boolean"}, {"enum": [*_WORDS]}, {"type": "object"}]}
SwitchField = Annotated[Switch, BeforeValidator(_switch), WithJsonSchema(_FORMS)]


class BudgetFields(Body):
    reasoning_budget: Annotated[int, Field(ge=-1)] = -1
    """Maximum number of reasoning tokens. 0 for no reasoning, -1 for no limit."""
    reasoning_budget_message: Annotated[str, Field(max_length=MAX_MESSAGE_CHARACTERS)] = ""
    """Text to insert before the end of reasoning if the budget forces the end."""


class SwitchFields(Body):
    reasoning_effort: str | None = None
    """The amount of reasoning, such as `low`, for the chat template. `none` means no reasoning."""
    enable_thinking: bool | None = None
    """True to reason before the answer, false for no reasoning. By default, the chat template decides."""
    thinking: SwitchField | None = None
    """`enable_thinking` in other APIs: a boolean, an amount such as `low`, or `{"type": "enabled" or "disabled",
    "budget_tokens": N}`."""
    think: SwitchField | None = None
    """Another name for `thinking`."""
    reasoning: SwitchField | None = None
    """`enable_thinking` in other APIs: `{"enabled": true or false, "effort": "low", "max_tokens": N}`."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Additional variables for the chat template. They override variables that other fields set."""

    def thoughts(self, budget: BudgetFields, effort_fields: Mapping[str, str | None] | None = None) -> Thoughts:
        """Combines all fields about thoughts. `effort_fields` are an API's own names of `reasoning_effort`. Raises
        ParameterError if two fields contradict each other. Off precedes any amount."""
        named = {"thinking": self.thinking, "think": self.think, "reasoning": self.reasoning}
        switches = {name: switch for name, switch in named.items() if switch is not None}
        efforts = {"reasoning_effort": self.reasoning_effort, **(effort_fields or {})}
        efforts |= {f"{name}.effort": switch.effort for name, switch in switches.items()}
        inner = {f"{name}.{key}": is_on for name, each in switches.items() for key, is_on in each.statements().items()}
        is_on = _agreed(
            {"enable_thinking": self.enable_thinking, **{name: _switched(each) for name, each in efforts.items()}}
            | inner
        )
        own = None if budget.reasoning_budget < 0 else budget.reasoning_budget
        budgets = {f"{name}.budget_tokens": switch.budget_tokens for name, switch in switches.items()}
        tokens = _agreed({"reasoning_budget": own, **budgets})
        return Thoughts(
            _of_template(self.chat_template_kwargs, is_on),
            _agreed({name: _amount(effort) for name, effort in efforts.items()}),
            None if tokens is None else ReasoningBudget(tokens, budget.reasoning_budget_message),
            self.chat_template_kwargs,
        )


SWITCHES: Final = (*SwitchFields.model_fields,)


def _agreed(values: Mapping[str, Any]) -> Any:
    """Returns the one value that is not None, or None. Raises ParameterError if there are two."""
    given = [(name, value) for name, value in values.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise ParameterError(name, f"contradicts {given[0][0]}; leave out one of the two fields")
    return given[0][1] if given else None


def has_budget(switch: Any) -> bool:
    return isinstance(switch, dict) and any(switch.get(name) is not None for name in ("budget_tokens", "max_tokens"))


def has_switch(variables: Any) -> bool:
    return isinstance(variables, dict) and _of_template(variables, None) is not None


def _of_template(variables: Mapping[str, Any], is_on: bool | None) -> bool | None:
    """Returns the switch that the template's variables set, or else `is_on`. Off precedes on."""
    texts = (variables.get(name) for name in EFFORT_VARIABLES)
    switched = [_switched(each) if _amount(each) is None else True for each in texts if isinstance(each, str)]
    for name, values in SWITCH_VARIABLES.items():
        switched += [
            is_equal for is_equal, value in zip((False, True), values, strict=True) if variables.get(name) == value
        ]
    switched += [False] if variables.get(BUDGET_VARIABLE) == 0 else []
    decided = [each for each in switched if each is not None]
    return all(decided) if decided else is_on
