"""Tests that the context length decides on no bit of an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust import Client
from llamaclust.cluster.launchers.in_process import LocalSettings
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model

SHORT, LONG = 512, 8192
"""Lengths below and above the windows of these models and the spans into which attention is cut."""


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt-oss", "lfm2"])
def test_answers_are_the_same_bits_in_every_context(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "m.gguf"
    if architecture == "llama":
        build_tiny_model(path, layers=2, context=LONG)
    else:
        build_architecture(path, architecture)
    answers = []
    for context in (SHORT, None):
        with Client.local(path, 1, settings=LocalSettings(context)) as client:
            reply = client.generate([5 + i % 200 for i in range(200)], max_tokens=40, ignore_eos=True, score_from=0)
            answers.append((reply.token_ids, reply.logprobs, reply.prompt_logprobs))
    assert answers[0] == answers[1]
