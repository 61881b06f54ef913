"""Chat templates that only put fixed texts around messages. They have llama.cpp's names and are converted to Jinja."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final

Around = tuple[str, str]


@dataclass(frozen=True, slots=True)
class TurnFormat:
    """The texts before and after the messages of each role. Messages with other roles are refused."""

    around: dict[str, Around]  # The keys are roles.
    prompt: str = ""  # The generation prompt, which comes just before the answer.
    begin: str = ""
    turn: str = ""  # Text before the first message and before each message that follows an assistant's message.
    default_system: str | None = None  # System message for chats that do not begin with a system message.
    trimmed: frozenset[str] = field(default_factory=frozenset)  # Roles whose messages are stripped of white space.

    @property
    def jinja(self) -> str:
        lines = [_text(self.begin)] if self.begin else []
        if self.default_system is not None:
            before, after = self.around["system"]
            lines += [
                "{%- if not messages or messages[0]['role'] != 'system' -%}",
                _text(before + self.default_system + after),
                "{%- endif -%}",
            ]
        lines += ["{%- set state = namespace(is_answered=true) -%}", "{%- for message in messages -%}"]
        if self.turn:
            lines += [f"{{%- if state.is_answered -%}}{_text(self.turn)}{{%- endif -%}}"]
        lines += ["{%- set state.is_answered = message['role'] == 'assistant' -%}"]
        for place, (role, (before, after)) in enumerate(self.around.items()):
            content = "message['content'] | trim" if role in self.trimmed else "message['content']"
            lines += [
                f"{{%- {'elif' if place else 'if'} message['role'] == '{role}' -%}}",
                f"{{{{- {json.dumps(before)} + ({content}) + {json.dumps(after)} -}}}}",
            ]
        roles = ", ".join(self.around)
        lines += [
            "{%- else -%}",
            f"{{{{- raise_exception('the roles are {roles}, not ' + message['role']) -}}}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{_text(self.prompt)}{{%- endif -%}}",
        ]
        return "\n".join(lines)


def _text(text: str) -> str:
    return f"{{{{- {json.dumps(text)} -}}}}"


_ROLES: Final = ("system", "user", "assistant")
_ALL: Final = frozenset(_ROLES)


def _named(
    before: str, after: str, roles: tuple[str, ...] = _ROLES, trimmed: frozenset[str] = frozenset()
) -> TurnFormat:
    around = {role: (before.replace("{role}", role), after) for role in roles}
    return TurnFormat(around, around["assistant"][0], trimmed=trimmed)


def _of(system: Around, user: Around, assistant: Around, prompt: str = "", *, trimmed: bool = False) -> TurnFormat:
    around = dict(zip(_ROLES, (system, user, assistant), strict=True))
    return TurnFormat(around, prompt, trimmed=_ALL if trimmed else frozenset())


def _inst(
    turn: str, system: Around, user_end: str, assistant: Around, trimmed: frozenset[str] = frozenset()
) -> TurnFormat:
    around = {"system": system, "user": ("", user_end), "assistant": assistant}
    return TurnFormat(around, turn=turn, trimmed=trimmed)


_SYS: Final = ("<<SYS>>\n", "\n<</SYS>>\n\n")
_AFTER_SYSTEM: Final = ("", "\n\n")
_END: Final = ("", "</s>")
_DEEPSEEK_END: Final = "<｜end▁of▁sentence｜>"
_PANGU_END: Final = "[unused10]"
_GRANITE: Final = _named("<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>\n")
_BAILING: Final = {"system": "<role>SYSTEM</role>", "user": "<role>HUMAN</role>", "assistant": "<role>ASSISTANT</role>"}
_BAILING_AROUND: Final = {role: (before, "") for role, before in _BAILING.items()}
_WITH_TOOL: Final = (*_ROLES, "tool")
_EXAONE: Final = {
    "system": ("[|system|]", "[|endofturn|]\n"),
    "user": ("[|user|]", "\n"),
    "assistant": ("[|assistant|]", "[|endofturn|]\n"),
}

TURN_FORMATS: Final[dict[str, TurnFormat]] = {
    "bailing": TurnFormat(_BAILING_AROUND, _BAILING["assistant"]),
    "bailing-think": TurnFormat(_BAILING_AROUND, _BAILING["assistant"] + "<think>"),
    "bailing2": TurnFormat(
        {role: (before, "<|role_end|>") for role, before in _BAILING.items()},
        _BAILING["assistant"],
        default_system="detailed thinking off",
    ),
    "command-r": TurnFormat(
        {
            role: (f"<|START_OF_TURN_TOKEN|><|{name}_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
            for role, name in zip(_ROLES, ("SYSTEM", "USER", "CHATBOT"), strict=True)
        },
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        trimmed=_ALL,
    ),
    "deepseek": _of(("", ""), ("### Instruction:\n", "\n"), ("### Response:\n", "\n<|EOT|>\n"), "### Response:\n"),
    "deepseek2": _of(_AFTER_SYSTEM, ("User: ", "\n\n"), ("Assistant: ", _DEEPSEEK_END), "Assistant:"),
    "deepseek3": _of(_AFTER_SYSTEM, ("<｜User｜>", ""), ("<｜Assistant｜>", _DEEPSEEK_END), "<｜Assistant｜>"),
    "deepseek-ocr": _of(("", ""), ("", ""), ("", "")),
    "exaone3": TurnFormat(_EXAONE, "[|assistant|]", trimmed=_ALL),
    "exaone4": TurnFormat(
        _EXAONE | {"tool": ("[|tool|]", "[|endofturn|]\n")}, "[|assistant|]", trimmed=_ALL | {"tool"}
    ),
    "exaone-moe": _named("<|{role}|>\n", "<|endofturn|>\n", _WITH_TOOL, _ALL | {"tool"}),
    "falcon3": _named("<|{role}|>\n", "\n"),
    "gigachat": TurnFormat(
        {
            "system": ("", "<|message_sep|>"),
            "user": ("user<|role_sep|>", "<|message_sep|>available functions<|role_sep|>[]<|message_sep|>"),
            "assistant": ("assistant<|role_sep|>", "<|message_sep|>"),
        },
        "assistant<|role_sep|>",
        begin="<s>",
    ),
    "glmedge": TurnFormat(_named("<|{role}|>\n", "").around, "<|assistant|>"),
    "gpt-oss": TurnFormat(
        _named("<|start|>{role}<|message|>", "<|end|>").around
        | {"assistant": ("<|start|>assistant<|message|>", "<|return|>")},
        "<|start|>assistant",
    ),
    "granite": _GRANITE,
    "granite-4.0": _GRANITE,
    "granite-4.1": _GRANITE,
    "grok-2": TurnFormat(
        {
            "system": ("System: ", "<|separator|>\n\n"),
            "user": ("Human: ", "<|separator|>\n\n"),
            "assistant": ("Assistant: ", "<|separator|>\n\n"),
        },
        "Assistant:",
        trimmed=frozenset({"system", "user"}),
    ),
    "hunyuan-dense": _of(
        ("", "<｜hy_place▁holder▁no▁3｜>"),
        ("<｜hy_User｜>", ""),
        ("<｜hy_Assistant｜>", "<｜hy_place▁holder▁no▁2｜>"),
        "<｜hy_Assistant｜>",
    ),
    "hunyuan-moe": _of(("<|startoftext|>", "<|extra_4|>"), ("<|startoftext|>", "<|extra_0|>"), ("", "<|eos|>")),
    "hunyuan-vl": TurnFormat(
        {
            "system": ("", "<｜hy_place▁holder▁no▁3｜>"),
            "user": ("", "<｜hy_User｜>"),
            "assistant": ("", "<｜hy_Assistant｜>"),
        },
        begin="<｜hy_begin▁of▁sentence｜>",
    ),
    "kimi-k2": TurnFormat(
        {
            "system": ("<|im_system|>system<|im_middle|>", "<|im_end|>"),
            "user": ("<|im_user|>user<|im_middle|>", "<|im_end|>"),
            "assistant": ("<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
            "tool": ("<|im_system|>tool<|im_middle|>", "<|im_end|>"),
        },
        "<|im_assistant|>assistant<|im_middle|>",
    ),
    "llama2": _inst("[INST] ", ("", "\n"), " [/INST]", _END),
    "llama2-sys": _inst("[INST] ", _SYS, " [/INST]", _END),
    "llama2-sys-bos": _inst("<s>[INST] ", _SYS, " [/INST]", _END),
    "llama2-sys-strip": _inst("[INST] ", _SYS, " [/INST]", _END, _ALL),
    "llama4": _named("<|header_start|>{role}<|header_end|>\n\n", "<|eot|>", trimmed=_ALL),
    "megrez": _named("<|role_start|>{role}<|role_end|>", "<|turn_end|>"),
    "minicpm": _of(("", ""), ("<用户>", "<AI>"), ("", ""), trimmed=True),
    "mistral-v1": _inst(" [INST] ", _AFTER_SYSTEM, " [/INST]", (" ", "</s>")),
    "mistral-v3": _inst("[INST] ", _AFTER_SYSTEM, "[/INST]", (" ", "</s>"), frozenset({"assistant"})),
    "mistral-v3-tekken": _inst("[INST]", _AFTER_SYSTEM, "[/INST]", _END),
    "mistral-v7": _of(("[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]"), ("[INST] ", "[/INST]"), (" ", "</s>")),
    "mistral-v7-tekken": _of(("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("[INST]", "[/INST]"), _END),
    "monarch": _named("<s>{role}\n", "</s>\n"),
    "openchat": _of(
        ("", "<|end_of_turn|>"),
        ("GPT4 Correct User: ", "<|end_of_turn|>"),
        ("GPT4 Correct Assistant: ", "<|end_of_turn|>"),
        "GPT4 Correct Assistant:",
    ),
    "orion": _inst("Human: ", _AFTER_SYSTEM, "\n\nAssistant: </s>", _END),
    "pangu-embedded": TurnFormat(
        {
            "system": ("[unused9]系统：", _PANGU_END),
            "user": ("[unused9]用户：", _PANGU_END),
            "assistant": ("[unused9]助手：", _PANGU_END),
            "tool": ("[unused9]工具：", _PANGU_END),
        },
        "[unused9]助手：",
        default_system="",
    ),
    "phi4": _named("<|im_start|>{role}<|im_sep|>", "<|im_end|>"),
    "rwkv-world": _of(("System: ", "\n\n"), ("User: ", "\n\n"), ("Assistant: ", "\n\n"), "Assistant:", trimmed=True),
    "seed_oss": _named("<seed:bos>{role}\n", "<seed:eos>", trimmed=frozenset({"assistant"})),
    "smolvlm": TurnFormat(
        {
            "system": ("", "\n\n"),
            "user": ("User: ", "<end_of_utterance>\n"),
            "assistant": ("Assistant: ", "<end_of_utterance>\n"),
        },
        "Assistant:",
        begin="<|im_start|>",
    ),
    "solar-open": TurnFormat(_named("<|begin|>{role}<|content|>", "<|end|>").around, "<|begin|>assistant"),
    "vicuna-orca": _of(("SYSTEM: ", "\n"), ("USER: ", "\n"), ("ASSISTANT: ", "</s>\n"), "ASSISTANT:"),
    "yandex": TurnFormat(
        {"user": (" Пользователь: ", "\n\n"), "assistant": (" Ассистент: ", "\n\n")}, " Ассистент:[SEP]"
    ),
}

OTHER_NAMES: Final = {"chatglm3": "chatglm-3", "chatglm4": "chatglm-4", "llama3": "llama-3"}
