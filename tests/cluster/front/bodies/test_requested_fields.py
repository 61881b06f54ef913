"""Checks that fields of bodies with the mark `Requested` set the fields of a completion request."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import pytest

from llamaclust.cluster.front.schema import Body, read_fields
from llamaclust.cluster.front.shared_fields import Requested, SamplerFields
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.server.front import BODIES

REQUEST = {field.name for field in fields(CompletionRequest)}
MARKED = [
    pytest.param(kind, mark.name or name, id=f"{kind.__name__}.{name}")
    for kind in BODIES
    for name, info in kind.model_fields.items()
    for mark in info.metadata
    if isinstance(mark, Requested)
]


class Longer(SamplerFields):
    """A body with fields of its own."""

    own_names = {}  # noqa: RUF012
    min_tokens: Annotated[int, Requested()] = 0
    token_bonus: Annotated[int, Requested("n")] = 1
    ends: Annotated[bool, Requested("ignore_eos")] = False
    shown: bool = False

    def params(self, logit_bias: tuple[tuple[int, float], ...] = ()) -> Any:
        return None

    def _window(self, name: str) -> None:
        return None


@pytest.mark.parametrize(("kind", "name"), MARKED)
def test_marked_fields_are_those_of_a_request(kind: type[Body], name: str) -> None:
    assert name in REQUEST


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"min_tokens": 3}, "min_tokens", 3),
        ({"token_bonus": 5}, "n", 5),
        ({"ends": True}, "ignore_eos", True),
        ({"penalize_nl": False}, "penalize_nl", False),
        ({"dry_sequence_breakers": ["a"]}, "dry_breakers", ("a",)),
    ],
)
def test_a_marked_field_takes_effect_without_another_place(given: dict[str, Any], name: str, value: Any) -> None:
    plain, changed = (read_fields(Longer, body).completion("a", 1) for body in ({}, given))
    assert getattr(changed, name) == value != getattr(plain, name)
    differing = {field.name for field in fields(plain) if getattr(plain, field.name) != getattr(changed, field.name)}
    assert differing == {name}


def test_a_field_without_a_mark_changes_no_request() -> None:
    assert read_fields(Longer, {"shown": True}).completion("a", 1) == read_fields(Longer, {}).completion("a", 1)
