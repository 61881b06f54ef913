"""Checks that tools are described in a message if the template does not show them."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.model.chat.tools.history import template_messages
from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS
from llamaclust.model.chat.tools.tool_format import ToolFormat

TOOL = {"type": "function", "function": {"name": "look"}}
USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("takes_system_role", [True, False])
@pytest.mark.parametrize("messages", [[], [USER], [SYSTEM, USER], [USER, SYSTEM]])
def test_tools_are_described_in_the_first_message(messages: list[dict[str, Any]], takes_system_role: bool) -> None:
    made = template_messages(ToolFormat(GENERIC_CALLS, takes_system_role=takes_system_role), messages, [TOOL])
    first, *others = made
    assert '"name": "look"' in first["content"]
    has_message = bool(messages) and (messages[0] == SYSTEM or not takes_system_role)
    assert others == messages[has_message:]
    assert first["role"] == (messages[0]["role"] if has_message else "system" if takes_system_role else "user")
