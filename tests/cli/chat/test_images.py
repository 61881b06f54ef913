"""Tests of images in `chat`: files in messages, and completion of file names."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path

import pytest

from llamaclust.cli.chat.file_completion import completed_file
from llamaclust.cli.chat.inserted_files import with_files
from llamaclust.cluster.client.message_images import image_part
from support.chat.vision import TinyVision
from support.clusters import served
from support.clusters.scripted_command import command, scripted

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def test_an_image_is_a_part_of_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(PNG)
    Path("notes").write_text("BMW and others\n")  # begins like a BMP file
    found = with_files("Compare @a.png with @notes and @a.png!")
    image = image_part(PNG)
    text = {"type": "text", "text": " with BMW and others and "}
    assert found == [{"type": "text", "text": "Compare "}, image, text, image, {"type": "text", "text": "!"}]


async def test_images_reach_a_model_that_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CONTEXT", 1 << 14)
    file, vision = tmp_path / "a.png", TinyVision()
    file.write_bytes(PNG)
    lines = f"What is @{file} ?\n/again\n/history\n".encode()
    async with scripted("Red", vision=vision) as (url, engine):
        ended = await command("chat", "--commands", "--endpoint", url, piped=lines)
    assert (ended.code, ended.out) == (0, "Red\nRed\nuser: What is [image] ?\nassistant: Red\n"), ended.err
    assert [source.data for source in vision.images] == [PNG] * 2 and len(engine.submitted) == 2
    for given in (("chat", "--commands"), ("generate", "What is this?", "--image", str(file))):
        async with scripted("Red") as (url, engine):
            ended = await command(*given, "--endpoint", url, piped=lines)
        assert ended.code == 2 and "the model reads text only" in ended.err and not engine.submitted


async def test_dropped_images_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CONTEXT", 1 << 14)
    file, vision = tmp_path / "a.png", TinyVision()
    file.write_bytes(PNG)
    lines = "".join(f"What is {f'@{file} ' * images}?\n" for images in (40, 40, 1)).encode()
    async with scripted("Red", vision=vision) as (url, _):
        ended = await command("chat", "--commands", "--endpoint", url, piped=lines)
    assert ended.code == 0 and ended.err.count("its oldest images are no longer sent") == 1, ended.err
    assert len(vision.images) == 40 + 64 + 64


def test_names_of_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("photos/a.png", "photos/b c.png", "photos/.hidden", "phone", "other"):
        Path(name).touch()

    def completions(word: str) -> list[str | None]:
        return [*takewhile(lambda found: found is not None, (completed_file(word, number) for number in count()))]

    assert completions("@ph") == ["@phone", "@photos/"] and completions("@photos/") == ["@photos/a.png"]
    assert completions("@photos/.") == ["@photos/.hidden"] and completions("ph") == completions("@x/") == []
    assert completions(f"@{tmp_path}/ot") == [f"@{tmp_path}/other"]
