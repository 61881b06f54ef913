"""Tests of built-in chat templates: their output, the one that a model gets, and the choice of a user."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llamaclust import Client
from llamaclust.cli.main import main
from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.core.errors import RequestError, UsageError
from llamaclust.model.chat.template import ChatTemplate, load_chat_template
from llamaclust.model.chat.template_choice import built_in, built_in_names, chosen_template, suggested_template
from llamaclust.model.chat.turn_formats import OTHER_NAMES, TURN_FORMATS
from llamaclust.model.loader import Model
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.models.tiny_model import build_tiny_model
from support.models.tiny_tokenizers import byte_level, sentencepiece

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "How?"},
]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
WRITTEN = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nHow?\n\n### Response:\n"
    ),
    "baichuan": "Be brief.<reserved_102>Hi<reserved_103>Hello</s><reserved_102>How?<reserved_103>",
    "baichuan-2": "Be brief.<reserved_106>Hi<reserved_107>Hello<reserved_106>How?<reserved_107>",
    "chatglm-2": "[gMASK]sopBe brief.\n\n[Round 1]\n\n问：Hi\n\n答：Hello\n\n[Round 2]\n\n问：How?\n\n答：",
    "chatglm-3": "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>\n Hello<|user|>\n How?<|assistant|>",
    "chatglm-4": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\nHello<|user|>\nHow?<|assistant|>",
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nHow?<end_of_turn>\n<start_of_turn>model\n"
    ),
    "linly": "Be brief.\n### Instruction:Hi  ### Response:Hello</s>### Instruction:How?  ### Response:",
    "llama-2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] How? [/INST]",
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] How? [/INST]",
    "phi3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
        "<|user|>\nHow?<|end|>\n<|assistant|>\n"
    ),
    "vicuna": "Be brief. USER: Hi ASSISTANT: Hello</s>USER: How? ASSISTANT:",
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nHow?</s>\n<|assistant|>\n"
    ),
}


_LLAMACPP = """
bailing bailing-think bailing2 chatglm3 chatglm4 chatml command-r deepseek deepseek-ocr deepseek2 deepseek3 exaone-moe
exaone3 exaone4 falcon3 gemma gigachat glmedge gpt-oss granite granite-4.0 granite-4.1 grok-2 hunyuan-dense hunyuan-moe
hunyuan-vl kimi-k2 llama2 llama2-sys llama2-sys-bos llama2-sys-strip llama3 llama4 megrez minicpm mistral-v1 mistral-v3
mistral-v3-tekken mistral-v7 mistral-v7-tekken monarch openchat orion pangu-embedded phi3 phi4 rwkv-world seed_oss
smolvlm solar-open vicuna vicuna-orca yandex zephyr
"""
TURNS = {
    "command-r": (
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>How?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "deepseek3": "Be brief.\n\n<｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜><｜User｜>How?<｜Assistant｜>",
    "gpt-oss": (
        "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|message|>Hello<|return|><|start|>user<|message|>How?<|end|><|start|>assistant"
    ),
    "llama2-sys": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]Hello</s>[INST] How? [/INST]",
    "mistral-v3-tekken": "[INST]Be brief.\n\nHi[/INST]Hello</s>[INST]How?[/INST]",
    "orion": "Human: Be brief.\n\nHi\n\nAssistant: </s>Hello</s>Human: How?\n\nAssistant: </s>",
    "smolvlm": (
        "<|im_start|>Be brief.\n\nUser: Hi<end_of_utterance>\nAssistant: Hello<end_of_utterance>\n"
        "User: How?<end_of_utterance>\nAssistant:"
    ),
}


def test_every_template_has_its_text() -> None:
    assert {*WRITTEN} == {*built_in_names()} - {*TURN_FORMATS, *OTHER_NAMES}
    assert {*_LLAMACPP.split()} <= {*built_in_names()}


def test_formats_of_turns_are_written_out() -> None:
    """Checks that each name makes a template that renders a chat; some are compared with their training formats."""
    for name in (*TURN_FORMATS, *OTHER_NAMES):
        talk = TALK[1:] if name == "yandex" else TALK
        with ChatTemplate(built_in(name), "<s>", "</s>") as template:
            text = template.render(talk)
            assert TURNS.get(name, text) == text
            assert all(text.count(message["content"]) == 1 for message in talk), name
            if name in TURN_FORMATS:
                with pytest.raises(RequestError, match="not function"):
                    template.render([*TALK[1:], {"role": "function", "content": "42"}])


def test_a_system_message_replaces_the_default() -> None:
    with ChatTemplate(built_in("bailing2"), "<s>", "</s>") as template:
        assert template.render(TALK[1:2]).startswith("<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN")
        assert "thinking" not in template.render(TALK)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_conversation_is_written_out(name: str) -> None:
    with ChatTemplate(built_in(name), "<s>", "</s>") as template:
        assert template.render(TALK) == WRITTEN[name]
        alone = template.render(TALK[1:2])
        assert "Be brief" not in alone and "Hi" in alone and WRITTEN[name].endswith(alone[alone.index("Hi") + 2 :])
        answered = template.render(TALK[:3], add_generation_prompt=False)
        assert WRITTEN[name].startswith(answered.rstrip("\n")), "what is asked later only adds to it"
        if name in ("alpaca", "vicuna"):
            assert alone.startswith({"alpaca": ALPACA, "vicuna": VICUNA}[name])


@pytest.mark.parametrize("name", ["alpaca", "baichuan", "chatglm-2", "gemma", "linly", "llama-2", "mistral", "vicuna"])
def test_roles_without_a_place_are_refused(name: str) -> None:
    with ChatTemplate(built_in(name), "<s>", "</s>") as template, pytest.raises(RequestError, match="not tool"):
        template.render([*TALK, {"role": "tool", "content": "42"}])


def metadata(words: tuple[str, ...] = (), **fields: str) -> dict[str, Any]:
    made: dict[str, Any] = sentencepiece(320)
    made["tokenizer.ggml.tokens"] = [*made["tokenizer.ggml.tokens"][: 320 - len(words)], *words]
    del made["tokenizer.chat_template"]
    return made | {f"general.{key}": value for key, value in fields.items()}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (metadata(), None),
        (metadata(name="LLaMA v2"), None),
        (metadata(name="Mistral-7B-v0.1"), None),
        (metadata(name="Llama-2-7B-Chat"), "llama-2"),
        (metadata(name="Linly-Chinese-LLaMA-2-7B chat"), "linly"),
        (metadata(basename="ChatFlow"), "linly"),
        (metadata(name="Mistral 7B", finetune="Instruct-v0.2"), "mistral"),
        (metadata(name="Mixtral-8x7B-Instruct"), "mistral"),
        (metadata(name="vicuna 7b v1.5"), "vicuna"),
        (metadata(name="Baichuan2-7B-Chat", architecture="baichuan"), "baichuan-2"),
        (metadata(name="Baichuan-7B", architecture="baichuan"), None),
        (metadata(architecture="chatglm"), "chatglm-2"),
        (metadata(("[gMASK]", "sop", "<|user|>"), architecture="chatglm"), "chatglm-3"),
        (metadata(("[gMASK]", "<sop>", "<|user|>")), "chatglm-4"),
        (metadata(("<|user|>", "<|assistant|>", "<|end|>")), "phi3"),
        (metadata(("<start_of_turn>", "<end_of_turn>")), "gemma"),
        (metadata(("<|start_header_id|>", "<|eot_id|>"), name="vicuna"), "llama-3"),
        (byte_level(320), "chatml"),
    ],
)
def test_what_a_model_without_a_template_gets(given: dict[str, Any], name: str | None) -> None:
    given = {key: value for key, value in given.items() if key != "tokenizer.chat_template"}
    tokenizer = load_tokenizer(given)
    assert suggested_template(given, tokenizer) == name
    with load_chat_template(given, tokenizer) as template:
        assert template.source == (None if name is None else built_in(name))
        if name is None:
            with pytest.raises(RequestError, match="choose one with chat_template or --chat-template"):
                template.render(TALK)


def test_a_user_chooses_by_name_or_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}!")
    model = build_tiny_model(tmp_path / "tiny.gguf", layers=1, hidden=64, heads=4, ffn=96)
    with Model.open(model, str(tmp_path / "mine.jinja")) as opened:
        assert opened.chat_template.render(TALK[1:2]) == "Hi!"
    with Client.local(model, 1, settings=LocalSettings(chat_template="linly")) as client:
        prompt = client.chat(TALK[1:2], max_tokens=1).prompt_token_ids
        assert client.detokenize(prompt[1:]) == "### Instruction:Hi  ### Response:"
    with pytest.raises(
        UsageError, match=r"chat template linli: it is neither .*; built-in templates: alpaca, .*, zephyr"
    ):
        Model.open(model, "linli")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="nor a readable file"):
        chosen_template(str(tmp_path / "pipe"))
    (tmp_path / "large").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="exceeds the limit of 1048576 bytes"):
        chosen_template(str(tmp_path / "large"))


def test_the_cluster_file_names_one(tmp_path: Path) -> None:
    def read(choice: str) -> str | None:
        (tmp_path / "c.yaml").write_text(f"model: m.gguf\nworkers: [{{name: a}}]\nchat_template: {choice}\n")
        return load_config(tmp_path / "c.yaml", []).chat_template

    assert (read("llama-2"), read("null"), read("mine.jinja")) == ("llama-2", None, str(tmp_path / "mine.jinja"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("up", "--chat-template", "nonsense"), "built-in templates: alpaca, baichuan"),
        (("chat", "--chat-template", "alpaca"), "--chat-template is for --model"),
    ],
)
def test_mistakes_get_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["llamaclust", *words])
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
