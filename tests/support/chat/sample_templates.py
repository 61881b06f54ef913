"""Shortened chat templates of models, with tool calls in each of the usual formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import jinja2

from llamaclust.core.errors import RequestError
from llamaclust.model.chat.template_child import environment
from llamaclust.model.chat.template_probe import Message, Render
from llamaclust.model.chat.tools.format_derivation import derive_format
from llamaclust.model.chat.tools.tool_format import ToolFormat

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "CALLS<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOOLS = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"


def _template(calls: str) -> str:
    return _TOOLS + _CHATML.replace("CALLS", calls)


TEMPLATES: Mapping[str, str] = {
    "hermes": _template(
        "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    ),
    "coder": _template(
        "{% for c in m.tool_calls or [] %}\n<tool_call>\n<function={{ c.function.name }}>\n"
        "{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>{% endfor %}"
    ),
    "glm": _template(
        "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n"
        "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n"
        "{% endfor %}</tool_call>{% endfor %}"
    ),
    "mistral": _template(
        "{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}"
    ),
    "devstral": _template(
        "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]"
        "{{ c.function.arguments | tojson }}{% endfor %}"
    ),
    "deepseek": _template(
        "{% if m.tool_calls %}<calls_begin>{% for c in m.tool_calls %}<call_begin>{{ c.function.name }}<sep>"
        "{{ c.function.arguments }}<call_end>{% endfor %}<calls_end>{% endif %}"
    ),
    "llama": _template(
        "{% for c in m.tool_calls or [] %}"
        '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}'
    ),
    "plain": _CHATML.replace("CALLS", ""),
}

KNOWN_MARKS: Mapping[str, str] = {
    "harmony": "<|channel|><|start|>",
    "muse": "<atem:function_calls>",
    "functionary": ">>>all",
    "gemma": '<|tool_call><|"|>',
    "lfm2": "<|tool_call_start|>",
    "kimi-k3": "<|open|><|sep|>",
    "minimax-m3": "]<]minimax[>[",
    "kimi-k2": "<|tool_calls_section_begin|>",
}
"""Texts by which templates of known formats are recognized."""


def render_with(source: str) -> Render:
    """Returns a renderer of the template that runs in this process."""
    compiled = environment().from_string(source)

    def render(messages: Sequence[Message], add_generation_prompt: bool, variables: Mapping[str, object]) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RequestError(str(error)) from error

    return render


@cache
def form_of(name: str) -> ToolFormat:
    """Returns the format of a sample template."""
    source = TEMPLATES.get(name) or "{#" + KNOWN_MARKS[name] + "#}" + TEMPLATES["plain"]
    return derive_format(source, render_with(source))
