"""Serves chats with tools and reasoning by a short chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import ScriptedEngine, client, make_app

# Short, since the tiny model's context is short.
TEMPLATE = (
    "{% for t in tools or [] %}+{{ t.function.name }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}{% endfor %}'
    "{% if add_generation_prompt %}<assistant>{% if opens and enable_thinking %}<think>{% endif %}{% endif %}"
)
CALL = '<tool_call>{"name": "look", "arguments": {"city": "Rom"}}</tool_call>'


@asynccontextmanager
async def served(engine: ScriptedEngine, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with client(make_app(engine, template, **settings)) as http:
            yield http
