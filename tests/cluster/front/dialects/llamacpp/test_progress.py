"""Tests of `return_progress`: events with a prompt's progress, before those with text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.clusters.served import client, make_app, real_engine

CHAT = {"messages": [{"role": "user", "content": "a word " * 20}], "max_tokens": 3}
PROMPT = {"prompt": "a word " * 20, "max_tokens": 3}
STREAM = {"stream": True, "return_progress": True}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", PROMPT), ("/completion", PROMPT)]
)
async def test_a_stream_says_how_far_its_prompt_is_computed(path: str, body: dict[str, Any]) -> None:
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        firsts = []
        for _ in range(2):
            text = (await http.post(path, json=body | STREAM | {"timings_per_token": True})).text
            lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
            events = [json.loads(line) for line in lines]
            progress = [event for event in events if "prompt_progress" in event]
            shown = [event["prompt_progress"] for event in progress]
            firsts.append(shown[0])
            assert len(shown) > 1 and "prompt_progress" not in events[-1]
            assert shown[0]["processed"] == shown[0]["cache"] and shown[-1]["processed"] == shown[-1]["total"] > 16
            assert [each["processed"] for each in shown] == sorted({each["processed"] for each in shown})
            assert progress[0]["timings"]["prompt_n"] == progress[0]["timings"]["prompt_ms"] == 0
            last = progress[-1]["timings"]
            assert last["prompt_n"] == shown[-1]["total"] - shown[-1]["cache"] and last["prompt_ms"] > 0
        assert firsts[0]["cache"] == 0 < firsts[1]["cache"] and firsts[0]["total"] == firsts[1]["total"]
        without = (await http.post(path, json=body | {"stream": True})).text
        assert "prompt_progress" not in without


async def test_each_prompt_has_progress_before_its_text() -> None:
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        body = {"prompt": ["a word", "another word"], "n_predict": 2, **STREAM}
        text = (await http.post("/completion", json=body)).text
        events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
        for index in range(2):
            of_prompt = ["prompt_progress" in event for event in events if event["index"] == index]
            assert of_prompt[0] and not of_prompt[-1] and of_prompt == sorted(of_prompt, reverse=True)
