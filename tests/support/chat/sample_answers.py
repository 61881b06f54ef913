"""Sample answers in each tool format with their meaning, for tests of the parser."""

from __future__ import annotations

from dataclasses import dataclass

TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "run": {"type": "object", "properties": {"code": {"type": "string"}, "options": {"type": "object"}}},
}


@dataclass(frozen=True)
class Sample:
    """The name of a format, an answer in it, and its reasoning, content and calls (name, arguments, id)."""

    form: str
    text: str
    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, str, str], ...] = ()


_CITY = ("get_weather", '{"city": "Rom", "days": 2}', "")
_RUN = ("run", '{"code": "print(\\"<a>\\")\\nx = {1: 2}"}', "")

SAMPLES = (
    Sample("hermes", "Hello, <b>world</b>!\n", content="Hello, <b>world</b>!\n"),
    Sample("hermes", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    Sample(
        "hermes",
        "<think>\nA <tool_call> is needed.\n</think>\n\nI look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"code": "print(\\"<a>\\")\\nx = {1: 2}"}, "name": "run"}\n</tool_call>',
        "A <tool_call> is needed.",
        "I look.",
        (_CITY, _RUN),
    ),
    Sample("hermes", "Use <tool_call> like this.", content="Use <tool_call> like this."),
    Sample(
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "run", "arguments": "{\\"code\\": \\"\\\\u00e9\\"}"}}',
        calls=(("run", '{"code": "\\u00e9"}', ""),),
    ),
    Sample(
        "coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRom\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=run>\n<parameter=code>\n"
        'print("<a>")\nx = {1: 2}\n</parameter>\n</function>\n</tool_call>\nDone.',
        content="Done.",
        calls=(_CITY, _RUN),
    ),
    Sample("coder", "<function=run>\n</function>", calls=(("run", "{}", ""),)),
    Sample(
        "glm",
        "<think>So.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rom</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        "So.",
        calls=(_CITY,),
    ),
    Sample(
        "mistral",
        'I see. [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rom", "days": 2}, "id": "123456789"}]',
        content="I see.",
        calls=((*_CITY[:2], "123456789"),),
    ),
    Sample(
        "devstral",
        '[TOOL_CALLS]get_weather[CALL_ID]a1[ARGS]{"city": "Rom", "days": 2}[TOOL_CALLS]run[ARGS]{}',
        calls=((*_CITY[:2], "a1"), ("run", "{}", "")),
    ),
    Sample(
        "deepseek",
        '<calls_begin><call_begin>get_weather<sep>{"city": "Rom", "days": 2}<call_end>'
        '<call_begin>run<sep>{"code": "print(\\"<a>\\")\\nx = {1: 2}"}<call_end><calls_end>',
        calls=(_CITY, _RUN),
    ),
    Sample("llama", '{"name": "get_weather", "parameters": {"city": "Rom", "days": 2}}', calls=(_CITY,)),
    Sample("llama", '{"answer": {"city": "Rom"}}', content='{"answer": {"city": "Rom"}}'),
    Sample("llama", '{"name": "other", "parameters": {}}', content='{"name": "other", "parameters": {}}'),
    Sample(
        "llama",
        '{"name": "get_weather", "parameters": {"city": "Rom", "days": 2}, "note": "x"} So.',
        content="So.",
        calls=(_CITY,),
    ),
    Sample(
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json"
        '<|message|>{"city": "Rom", "days": 2}<|call|>',
        "Hm.",
        calls=(_CITY,),
    ),
    Sample("harmony", "<|channel|>final<|message|>Hi <|there|>.<|return|>", content="Hi <|there|>."),
    Sample(
        "muse",
        " to=user<|message|>I run it.<|eom|><|start|>assistant to=run<|message|><atem:function_calls>\n"
        '<atem:invoke name="run">\n<atem:parameter name="code">print("<a>")\nx = {1: 2}</atem:parameter>\n'
        "</atem:invoke>\n"
        "</atem:function_calls><|eot|>",
        content="I run it.",
        calls=(_RUN,),
    ),
    Sample("functionary", 'all\nSo:\n>>>run\n{"code": "1"}', content="So:", calls=(("run", '{"code": "1"}', ""),)),
    Sample(
        "gemma",
        '<|channel>thought\nHm.<channel|>Yes.<|tool_call>call:get_weather{city:<|"|>Rom<|"|>,days:2}<tool_call|>',
        "Hm.",
        "Yes.",
        (("get_weather", '{"city":"Rom","days":2}', ""),),
    ),
    Sample(
        "lfm2",
        '<|tool_call_start|>[get_weather(city="Rom", days=2), run(options={"a": None, \'b\': True})]'
        "<|tool_call_end|>Ok",
        content="Ok",
        calls=(_CITY, ("run", '{"options": {"a": null, "b": true}}', "")),
    ),
    Sample(
        "kimi-k3",
        "<|open|>think<|sep|>Hm.<|close|>think<|sep|><|open|>response<|sep|>Yes.<|close|>response<|sep|>"
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"'
        '<|sep|>Rom<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>2<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
        "Hm.",
        "Yes.",
        (_CITY,),
    ),
    Sample(
        "minimax-m3",
        ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="run">]<]minimax[>[<options>]<]minimax[>[<a>1]<]minimax[>['
        "</a>]<]minimax[>[</options>]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
        calls=(("run", '{"options": {"a": 1}}', ""),),
    ),
    Sample(
        "kimi-k2",
        "<think>Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Rom", "days": 2}<|tool_call_end|><|tool_calls_section_end|>',
        "Hm.",
        calls=((*_CITY[:2], "functions.get_weather:0"),),
    ),
)
