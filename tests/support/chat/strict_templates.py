"""Chat templates that refuse some orders of roles, or some roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_ALTERNATING: Final = (
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate user/assistant') }}{%- endif -%}"
)
_FIRST_SYSTEM: Final = (
    "{%- if messages and messages[0].role == 'system' -%}{%- set system = messages[0].content -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
)
_NEEDS_USER: Final = "{%- if not turns -%}{{ raise_exception('no user message') }}{%- endif -%}"

STRICT_TEMPLATES: Final[Mapping[str, str]] = {
    "gemma": (
        _FIRST_SYSTEM + "{{ bos_token }}{%- for message in turns -%}" + _ALTERNATING + "<start_of_turn>"
        "{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ system + '\n\n' if loop.first and system }}{{ message.content | trim }}<end_of_turn>\n{% endfor -%}"
        "{%- if add_generation_prompt -%}<start_of_turn>model\n{%- endif -%}"
    ),
    "mistral": (
        _FIRST_SYSTEM
        + _NEEDS_USER
        + "{{ bos_token }}{%- for message in turns -%}"
        + _ALTERNATING
        + "{%- if message.role == 'user' -%}[INST] {{ system + '\n\n' if loop.last and system }}{{ message.content }} "
        "[/INST]{%- else -%}{{ ' ' + message.content | trim }}{{ eos_token }}{%- endif -%}{%- endfor -%}"
    ),
    "llama-2": (
        _FIRST_SYSTEM
        + "{%- for message in turns -%}"
        + _ALTERNATING
        + "{%- if message.role == 'user' -%}[INST] "
        + "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system }}"
        "{{ message.content | trim }} [/INST]{%- else -%} {{ message.content | trim }} </s>{%- endif -%}{%- endfor -%}"
    ),
    "no system role": (
        "{%- for message in messages -%}{%- if message.role == 'system' -%}"
        "{{ raise_exception('System role not supported') }}{%- endif -%}"
        + _ALTERNATING
        + "<{{ message.role }}>{{ message.content }}{%- endfor -%}"
    ),
    "system is skipped": (
        "{%- for message in messages if message.role != 'system' -%}"
        "<{{ message.role }}>{{ message.content }}{%- endfor -%}"
    ),
    "later systems are skipped": (
        _FIRST_SYSTEM + "{{ system }}{%- for message in turns if message.role != 'system' -%}"
        "<{{ message.role }}>{{ message.content }}{%- endfor -%}"
    ),
    "one of each": (
        "{%- set last = namespace(role='') -%}{%- for message in messages -%}{%- if message.role == last.role -%}"
        "{{ raise_exception('two messages of ' + message.role) }}{%- endif -%}{%- set last.role = message.role -%}"
        "<{{ message.role }}>{{ message.content }}{%- endfor -%}"
    ),
}
"""Templates by their model or behaviour."""
