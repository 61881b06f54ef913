# ruff: noqa: E501 - a template's lines are easier to read whole
"""Chat templates that write tool calls in each known notation, and arguments that a notation cannot express."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from support.chat.sample_templates import TEMPLATES

_EACH = "{% for c in m.tool_calls or [] %}BODY{% endfor %}"
_ONE = "{% if m.tool_calls %}BEGIN{% for c in m.tool_calls %}BODY{% endfor %}END{% endif %}"
_NAME, _JSON = "{{ c.function.name }}", "{{ c.function.arguments | tojson }}"
_SHOWN = "{{ v if v is string else v | tojson }}"
_CODER_VALUE = "{{ v | tojson if v is mapping or (v is sequence and v is not string) else v }}"


def chat_template(calls: str, marks: str = "") -> str:
    """Returns a template in ChatML with the given text for the calls of a message `m`."""
    header = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}" + ("{#" + marks + "#}" if marks else "")
    return (
        header + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}" + calls + "<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _each(body: str) -> str:
    return _EACH.replace("BODY", body)


def _section(begin: str, body: str, end: str) -> str:
    return _ONE.replace("BEGIN", begin).replace("BODY", body).replace("END", end)


def _arguments(begin: str, value: str, end: str) -> str:
    return "{% for k, v in c.function.arguments.items() %}" + f"{begin}{value}{end}" + "{% endfor %}"


def _object(name: str, arguments: str, more: str = "") -> str:
    return f'{{"{more}{name}": "{_NAME}", "{arguments}": {_JSON}}}'


def _channels(call: str, content: str, begin: str, end: str) -> str:
    """Returns a template whose answers are messages with headers."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% for c in m.tool_calls or [] %}"
        + f"{begin}{call}"
        + "{% endfor %}{% if not m.tool_calls %}"
        + f"{begin}{content}"
        + "{{ m.content }}"
        + end
        + "{% endif %}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}"
        + begin
        + "{% endif %}"
    )


_GEMMA = (
    (
        "{%- macro shown(v) -%}{%- if v is string -%}<|\"|>{{ v }}<|\"|>{%- elif v is boolean -%}{{ 'true' if v else 'false' }}"
        "{%- elif v is mapping -%}{ {%- for k, i in v | dictsort -%}{{ k }}:{{ shown(i) }}{{ ',' if not loop.last }}{%- endfor -%}"
        "{%- elif v is sequence -%}[{%- for i in v -%}{{ shown(i) }}{{ ',' if not loop.last }}{%- endfor -%}]"
        "{%- else -%}{{ v }}{%- endif -%}{%- endmacro -%}"
    )
    .replace("{ {%-", "{{ '{' }}{%-")
    .replace("{%- endfor -%}{%- elif v is sequence", "{%- endfor -%}{{ '}' }}{%- elif v is sequence")
)
_ELEMENTS = (
    "{%- macro shown(v) -%}{%- if v is mapping -%}{%- for k, i in v.items() -%}]<]minimax[>[<{{ k }}>{{ shown(i) }}"
    "]<]minimax[>[</{{ k }}>{%- endfor -%}{%- elif v is sequence and v is not string -%}{%- for i in v -%}"
    "]<]minimax[>[<item>{{ shown(i) }}]<]minimax[>[</item>{%- endfor -%}{%- else -%}{{ v if v is string else v | tojson }}"
    "{%- endif -%}{%- endmacro -%}"
)
_CDATA_VALUE = "{{ '<![CDATA[' ~ v ~ ']]>' if v is string and ('<' in v or '&' in v or '\\n' in v) else (v if v is string else v | tojson) }}"

NOTATIONS: Mapping[str, str] = {
    **{name: TEMPLATES[name] for name in ("hermes", "mistral", "devstral", "deepseek", "llama", "plain")},
    "coder": chat_template(
        _each(
            f"\n<tool_call>\n<function={_NAME}>\n"
            + _arguments("<parameter={{ k }}>\n", _CODER_VALUE, "\n</parameter>\n")
            + "</function>\n</tool_call>"
        )
    ),
    "glm": chat_template(
        _each(
            f"\n<tool_call>{_NAME}\n"
            + _arguments("<arg_key>{{ k }}</arg_key>\n<arg_value>", _SHOWN, "</arg_value>\n")
            + "</tool_call>"
        )
    ),
    "flat tags": chat_template(
        _each(
            f"<seed:tool_call>\n<function={_NAME}>\n"
            + _arguments("<parameter={{ k }}>", "{{ v }}", "</parameter>\n")
            + "</function>\n</seed:tool_call>"
        )
    ),
    "tags with types": chat_template(
        _section(
            "\n\n<dsml:calls>\n",
            f'<dsml:invoke name="{_NAME}">\n'
            + _arguments(
                "<dsml:parameter name=\"{{ k }}\" string=\"{{ 'true' if v is string else 'false' }}\">",
                _SHOWN,
                "</dsml:parameter>\n",
            )
            + "</dsml:invoke>\n",
            "</dsml:calls>",
        )
    ),
    "tags with character data": chat_template(
        _each(
            f'<function name="{_NAME}">'
            + _arguments('<param name="{{ k }}">', _CDATA_VALUE, "</param>")
            + "</function>"
        )
    ),
    "escapes": chat_template(
        _each(f"<tool_call>\n{_object('name', 'arguments')}\n</tool_call>").replace(
            "tojson", "tojson(ensure_ascii=True)"
        )
    ),
    "pretty": chat_template(
        _each(
            "<tool_call>\n{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson(indent=4) }}\n</tool_call>"
        )
    ),
    "compact": chat_template(
        _each(
            "<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson(separators=(',', ':')) }}"
            "</tool_call>"
        )
    ),
    "arguments first": chat_template(
        _each(f'<tool_call>\n{{"arguments": {_JSON}, "name": "{_NAME}"}}\n</tool_call>'), "<tool_call>"
    ),
    "name as key": chat_template(_section("<|tools_prefix|>[", f'{{"{_NAME}": {_JSON}}}', "]<|tools_suffix|>")),
    "wrapped": chat_template(_each(f'<call>{{"function": {_object("name", "arguments")}}}</call>')),
    "action": chat_template(
        _section(
            "<|START_ACTION|>[\n",
            '    {"tool_call_id": "{{ loop.index0 }}", "tool_name": "' + _NAME + f'", "parameters": {_JSON}}}',
            "\n]<|END_ACTION|>",
        )
    ),
    "action in a code block": chat_template(
        _section(
            "Action:\n```json\n",
            "{{ [{'tool_name': c.function.name, 'parameters': c.function.arguments}] | tojson(indent=4) }}",
            "\n```",
        )
    ),
    "functools": chat_template(_section(" functools[", _object("name", "arguments"), "]")),
    "code block": chat_template(
        _section(
            "<｜tool▁calls▁begin｜>",
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{_NAME}\n```json\n{_JSON}\n```<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        )
    ),
    "name and json": chat_template(_each(f"<function={_NAME}>{_JSON}</function>")),
    "id first": chat_template(
        _section("<|calls|>", "<|call|>{{ c.id }}<|name|>" + f"{_NAME}<|args|>{_JSON}<|end|>", "<|done|>")
    ),
    "kimi-k2": chat_template(
        _section(
            "<|tool_calls_section_begin|>",
            f"<|tool_call_begin|>functions.{_NAME}:{{{{ loop.index0 }}}}<|tool_call_argument_begin|>{_JSON}<|tool_call_end|>",
            "<|tool_calls_section_end|>",
        )
    ),
    "kimi-k3": chat_template(
        _section(
            "<|open|>tools<|sep|>",
            f'<|open|>call tool="{_NAME}" index="{{{{ loop.index }}}}"<|sep|>'
            + _arguments(
                '<|open|>argument key="{{ k }}" type="{{ "string" if v is string else "number" }}"<|sep|>',
                _SHOWN,
                "<|close|>argument<|sep|>",
            )
            + "<|close|>call<|sep|>",
            "<|close|>tools<|sep|>",
        )
    ),
    "gemma": _GEMMA
    + chat_template(
        _each(
            f"<|tool_call>call:{_NAME}{{{{ '{{' }}}}"
            "{% for k, v in c.function.arguments | dictsort %}{{ k }}:{{ shown(v) }}{{ ',' if not loop.last }}{% endfor %}"
            "{{ '}' }}<tool_call|>"
        )
    ),
    "lfm2": chat_template(
        _section(
            "<|tool_call_start|>[",
            f"{_NAME}("
            "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson if v is string else v }}"
            "{{ ', ' if not loop.last }}{% endfor %})",
            "]<|tool_call_end|>",
        )
    ),
    "minimax-m3": _ELEMENTS
    + chat_template(
        _section(
            "]<]minimax[>[<tool_call>\n",
            f']<]minimax[>[<invoke name="{_NAME}">{{{{ shown(c.function.arguments) }}}}]<]minimax[>[</invoke>\n',
            "]<]minimax[>[</tool_call>",
        )
    ),
    "harmony": _channels(
        f" to=functions.{_NAME}<|channel|>commentary json<|message|>{_JSON}<|call|>",
        "<|channel|>final<|message|>",
        "<|start|>assistant",
        "<|end|>",
    ),
    "muse": _channels(
        f' to={_NAME}<|message|><atem:function_calls>\n<atem:invoke name="{_NAME}">\n'
        + _arguments('<atem:parameter name="{{ k }}">', _SHOWN, "</atem:parameter>\n")
        + "</atem:invoke>\n</atem:function_calls><|eot|>",
        " to=user<|message|>",
        "<|start|>assistant",
        "<|eom|>",
    ),
    "functionary": _channels(f"{_NAME}\n{_JSON}", "all\n", ">>>", ""),
}

_END_TAGS: Mapping[str, str] = {
    "coder": "</parameter>",
    "glm": "</arg_value>",
    "flat tags": "</parameter>",
    "tags with types": "</dsml:parameter>",
    "tags with character data": "]]></param>",
    "kimi-k3": "<|close|>argument<|sep|>",
    "gemma": '<|"|>',
    "minimax-m3": "]<]minimax[>[</value>",
    "muse": "</atem:parameter>",
}
"""The tag that ends a text. A text with this tag inside cannot be expressed, because none of these has an escape."""


def end_tag(notation: str) -> str:
    return _END_TAGS.get(notation, "")


_NO_ITEM_TYPES = "items of lists without a schema have no type: 1 and the text 1 are the same"
_NO_RAW_DELETE = "llguidance's JSON has no unescaped U+007F"
_NO_LARGER_INTEGERS = "the grammar's integers end at 2^63 - 1024"

JSON_NOTATIONS: Sequence[str] = [name for name in NOTATIONS if name not in (*_END_TAGS, "lfm2")]
EXCEPTIONS: Mapping[tuple[str, str], str] = {
    **{(name, label): _NO_LARGER_INTEGERS for name in NOTATIONS for label in ("largest", "smallest")},
    **{(name, "control"): _NO_RAW_DELETE for name in JSON_NOTATIONS if name != "escapes"},
    **{("minimax-m3", label): _NO_ITEM_TYPES for label in ("mixed-list", "nested-lists")},
}
"""The reason why a notation cannot express a sample of `argument_samples`. Keys are their names."""
