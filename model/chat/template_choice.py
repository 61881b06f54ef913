"""Chooses a chat template: the user's choice (a name or a path), or a built-in template that fits the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import decode_text, open_regular
from llamaclust.model.chat.turn_formats import OTHER_NAMES, TURN_FORMATS
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_FOLDER: Final = Path(__file__).with_name("templates")
_MOST_BYTES: Final = 1 << 20
_NAME_KEYS: Final = ("general.name", "general.basename", "general.finetune")

_MARKS: Final = (
    (("<|im_start|>",), "chatml"),
    (("<|start_header_id|>", "<|eot_id|>"), "llama-3"),
    (("<start_of_turn>", "<end_of_turn>"), "gemma"),
    (("[gMASK]", "<sop>", "<|user|>"), "chatglm-4"),
    (("[gMASK]", "sop", "<|user|>"), "chatglm-3"),
    (("<|user|>", "<|assistant|>", "<|end|>"), "phi3"),
)
"""Rows of control words and a template's name. A template fits a vocabulary that has all control words of its row."""

_NAMES: Final = (
    (("linly",), "linly"),
    (("chatflow",), "linly"),
    (("tencentpretrain",), "linly"),
    (("vicuna",), "vicuna"),
    (("alpaca",), "alpaca"),
    (("zephyr",), "zephyr"),
    (("tinyllama", "chat"), "zephyr"),
    (("baichuan2", "chat"), "baichuan-2"),
    (("baichuan", "chat"), "baichuan"),
    (("chatglm2",), "chatglm-2"),
    (("mistral", "instruct"), "mistral"),
    (("mixtral", "instruct"), "mistral"),
    (("llama2", "chat"), "llama-2"),
)
"""Rows of parts of a chat model's name (lower case, no separators) and the name of the model's template."""


def built_in_names() -> tuple[str, ...]:
    files = (path.stem for path in _FOLDER.glob("*.jinja"))
    return tuple(sorted((*files, *TURN_FORMATS, *OTHER_NAMES)))


def built_in(name: str) -> str:
    if name in TURN_FORMATS:
        return TURN_FORMATS[name].jinja
    return (_FOLDER / f"{OTHER_NAMES.get(name, name)}.jinja").read_text(encoding="utf-8")


def chosen_template(choice: str) -> str:
    """Returns the Jinja text of the built-in template `choice`, or of the file at the path `choice`. Raises UsageError,
    which lists the built-in templates, if neither exists."""
    names = built_in_names()
    if choice in names:
        return built_in(choice)
    try:
        with open_regular(Path(choice).expanduser()) as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise UsageError(f"chat template {choice}: the file exceeds the limit of {_MOST_BYTES} bytes")
        return decode_text(text)
    except (OSError, RuntimeError, ValueError) as error:
        listed = ", ".join(names)
        why = error if isinstance(error, ValueError) else "it is neither a built-in template nor a readable file"
        raise UsageError(f"chat template {choice}: {why}; built-in templates: {listed}") from error


def suggested_template(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> str | None:
    for words, name in _MARKS:
        if all(tokenizer.token_id(word) is not None for word in words):
            return name
    called = " ".join(str(metadata.get(key, "")) for key in _NAME_KEYS).lower()
    called = called.translate({ord(sign): None for sign in "-_. "})
    for parts, name in _NAMES:
        if all(part in called for part in parts):
            return name
    return "chatglm-2" if metadata.get("general.architecture") == "chatglm" else None
