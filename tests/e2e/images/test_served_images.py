"""Tests of `llamaclust up` with a model and its projector: answers about images have the bits of the same model in one
process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamaclust import Client
from llamaclust.cluster.client.base import TextClient
from llamaclust.cluster.client.http_codec import AnswerOptions
from llamaclust.cluster.launchers.in_process import LocalSettings
from support.clusters.command_line import CommandLine, command_line
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector

CONTEXT = 4096
SEEDED: AnswerOptions = {"max_tokens": 16, "temperature": 0.9, "seed": 7, "ignore_eos": True}
STAGES = ({"worker": "a", "layers": [0, 1]}, {"worker": "b", "layers": [1, 4]})
GROUP = ({"workers": ["a", "b"], "layers": [0, 4], "shares": [1, 1]},)
PLANS = {"idefics3": STAGES, "gemma3": STAGES, "lfm2": STAGES, "gemma3 in a group": GROUP, "pixtral in a group": GROUP}
Answer = tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        yield line


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 44, 3), np.uint8))


def answers(client: TextClient) -> list[Answer]:
    """Returns answers about one image, another image, both images, and the first image with a longer text."""
    first, second = picture(1), picture(2)
    contents = (["What is this?", first], [second], [first, "or", second], ["What is this?", first, "Say more."])
    replies = (client.chat([{"role": "user", "content": content}], **SEEDED) for content in contents)
    return [(reply.token_ids, reply.logprobs, reply.prompt_token_ids) for reply in replies]


def model_of(folder: Path, family: str) -> Path:
    path = folder / "m.gguf"
    folder.mkdir()
    build_tiny_model(path, layers=4, hidden=TEXT_WIDTH, heads=4, ffn=96, context=CONTEXT)
    build_projector(path.with_name("mmproj.gguf"), family)
    return path


@pytest.mark.parametrize("case", PLANS)
def test_answers_about_images_are_those_of_one_process(case: str, line: CommandLine) -> None:
    name = case.replace(" ", "-")
    model = model_of(line.folder / name, case.split()[0])
    with Client.local(model, threads=1, settings=LocalSettings(context_length=CONTEXT, mmproj=None)) as local:
        expected = answers(local)
    assert expected[0] != expected[1]
    workers = [{"name": "a", "threads": 1}, {"name": "b", "threads": 1}]
    with line.cluster(model, name, context_length=CONTEXT, workers=workers, plan=[*PLANS[case]]) as cluster:
        shown = cluster.command.err.read_text()
        assert "MiB encoder" in shown and f"  images: mmproj.gguf ({case.split()[0]}), encoder on worker " in shown
        with Client(cluster.api) as client:
            assert answers(client) == expected
        plan = cluster.http.get("/cluster").json()["plan"]
        (holder,) = (stage for stage in plan["stages"] if stage["encoder_bytes"])
        held = {worker["name"]: worker["memory_bytes"] for worker in line.run("status", "--json").json["workers"]}
        bytes_of = ("weight_bytes", "kv_bytes", "workspace_bytes", "encoder_bytes")
        assert held[holder["worker"]] == pytest.approx(sum(holder[name] for name in bytes_of), abs=1 << 20)
