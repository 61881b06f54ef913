"""How `--help` shows options: by the names that the manual gives their values, never by Python's types."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class PlainCommand(TyperCommand):
    """A command whose flags have no value in its help, and whose arguments have their name alone."""

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """The same for a command that has commands."""

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))


def _without_types(params: list[Any]) -> list[Any]:
    for one in params:
        if one.param_type_name == "argument":
            one.display_type_rich = lambda ctx: None
        elif one.is_flag:
            one.metavar = ""
    return params
