"""Checks that images are decoded in child processes, which hostile bytes may end."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from llamaclust.core.errors import DeadlineError, RequestError
from llamaclust.model.images import preparation as module
from llamaclust.model.images.preparation import ImageLimits, ImagePreparation
from llamaclust.model.images.settings import ImageSettings
from support.clusters.command_line import paused
from support.clusters.served import until
from support.hostile_pictures import jpeg_with_scans, samples
from support.pictures import SETTINGS, Pixels, picture, shown

SIDE = 28
SAME = ImageSettings("gemma3", 14, 1, image_size=SIDE)
"""Settings that keep an image of SIDE x SIDE pixels unchanged."""
QUICK = ImageLimits(wait_s=250.0, wall_s=120.0, start_s=120.0)


@pytest.fixture(scope="module")
def preparation() -> Iterator[ImagePreparation]:
    made = ImagePreparation(QUICK)
    yield made
    made.close()


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


BLACK = encoded(Image.new("RGB", (SIDE, SIDE)), "PNG")


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def drawn(channels: int, seed: int = 1) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, channels), dtype=np.uint8)


async def one_tile(preparation: ImagePreparation, data: bytes) -> Pixels:
    (tile,) = (await preparation.prepare(data, SAME)).tiles
    assert tile.shape == (SIDE, SIDE, 3) and tile.dtype == np.uint8
    return tile


def over_white(rgba: Pixels) -> NDArray[np.float64]:
    alpha = rgba[..., 3:].astype(float) / 255
    blended: NDArray[np.float64] = rgba[..., :3] * alpha + 255 * (1 - alpha)
    return blended


@pytest.mark.parametrize(("name", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
async def test_a_lossless_picture_keeps_its_pixels(
    preparation: ImagePreparation, name: str, options: dict[str, Any]
) -> None:
    pixels = drawn(3)
    assert np.array_equal(await one_tile(preparation, encoded(Image.fromarray(pixels), name, **options)), pixels)
    image = await preparation.prepare(encoded(Image.fromarray(pixels), name), SAME)
    assert shown(image.prompt) == "<start_of_image>[4]<end_of_image>"


@pytest.mark.parametrize("name", ["PNG", "WEBP"])
async def test_transparent_parts_are_over_white(preparation: ImagePreparation, name: str) -> None:
    rgba = drawn(4)
    tile = await one_tile(
        preparation,
        encoded(Image.fromarray(rgba), name, **({"lossless": True, "exact": True} if name == "WEBP" else {})),
    )
    assert np.abs(tile - over_white(rgba)).max() <= 1


async def test_palettes_gray_and_16_bits(preparation: ImagePreparation) -> None:
    gray = drawn(1)[..., 0]
    three = np.repeat(gray[..., None], 3, axis=2)
    assert np.array_equal(await one_tile(preparation, encoded(Image.fromarray(gray), "PNG")), three)
    deep = gray.astype(np.uint16) << 8 | np.arange(SIDE, dtype=np.uint16)
    assert np.array_equal(await one_tile(preparation, encoded(Image.fromarray(deep), "PNG")), three)
    bits = gray > 127
    assert np.array_equal(
        await one_tile(preparation, encoded(Image.fromarray(bits), "PNG")), np.where(bits[..., None], 255, 0 * three)
    )
    palette = Image.fromarray(gray).convert("P")
    palette.putpalette(drawn(3, 2).reshape(-1)[:768].tobytes())
    colours = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    assert np.array_equal(await one_tile(preparation, encoded(palette, "PNG")), colours)
    assert np.array_equal(await one_tile(preparation, encoded(palette, "GIF")), colours)
    clear = int(gray[3, 4])
    tile = await one_tile(preparation, encoded(palette, "PNG", transparency=clear))
    assert np.array_equal(tile, np.where((np.asarray(palette) == clear)[..., None], 255, colours))
    both = Image.merge("LA", (Image.fromarray(gray), Image.fromarray(drawn(1, 5)[..., 0])))
    rgba = np.asarray(both.convert("RGBA"))
    assert np.abs(await one_tile(preparation, encoded(both, "PNG")) - over_white(rgba)).max() <= 1


async def test_a_jpeg_of_four_colours(preparation: ImagePreparation) -> None:
    cmyk = Image.fromarray(drawn(4) // 2, "CMYK").resize((SIDE, SIDE))
    ink = np.asarray(Image.open(io.BytesIO(encoded(cmyk, "JPEG", quality=100, subsampling=0)))).astype(float)
    tile = await one_tile(preparation, encoded(cmyk, "JPEG", quality=100, subsampling=0))
    assert np.abs(tile - (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255).max() <= 1


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
async def test_pictures_are_turned_upright(preparation: ImagePreparation, name: str) -> None:
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:14, :14], pixels[:14, 14:], pixels[14:, :14], pixels[14:, 14:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), 9
    stored = {  # by EXIF orientation: the pixels that a camera stores for the upright image
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels),
        7: np.rot90(pixels, 2).swapaxes(0, 1),
        8: np.rot90(pixels, -1),
    }
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(np.ascontiguousarray(array)), name, exif=exif, quality=100)
        tile = await one_tile(preparation, data)
        assert np.abs(tile.astype(int) - pixels)[[3, 3, 24, 24], [3, 24, 3, 24]].max() <= 8, orientation


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
async def test_an_animation_is_its_first_frame(preparation: ImagePreparation, name: str) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], name, save_all=True, append_images=frames[1:])
    assert np.abs((await one_tile(preparation, data)).astype(int) - (255, 0, 0)).max() <= 2


async def test_the_bytes_decide_the_format_and_what_follows_a_picture_is_ignored(preparation: ImagePreparation) -> None:
    pixels = drawn(3)
    data = encoded(Image.fromarray(pixels), "PNG")
    for more in (b"<script>alert(1)</script>", b"PK\x03\x04" + bytes(100), encoded(Image.new("RGB", (5, 5)), "GIF")):
        assert np.array_equal(await one_tile(preparation, data + more), pixels)


async def test_a_whole_way_through_a_child_is_that_of_the_tiling(preparation: ImagePreparation) -> None:
    made = await preparation.prepare(encoded(Image.fromarray(picture(9)), "PNG"), SETTINGS["lfm2"])
    assert [tile.shape for tile in made.tiles] == [(512, 512, 3)] * (len(made.tiles) - 1) + [made.tiles[-1].shape]
    assert shown(made.prompt).startswith("<|image_start|><|img_row_1_col_1|>[256]")


async def test_a_picture_of_too_many_bytes_or_pixels_is_refused_with_the_numbers() -> None:
    limits = ImageLimits(max_bytes=10_000, max_pixels=10_000, wait_s=250.0, start_s=120.0)
    async with ImagePreparation(limits) as preparation:
        with pytest.raises(RequestError, match=r"has 10001 bytes; the limit is 10000: send"):
            await preparation.prepare(bytes(10_001), SAME)
        assert preparation._preparers[0].child.pid is None
        for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
            small = encoded(Image.new("1" if name == "BMP" else "RGB", (101, 100)), name)
            with pytest.raises(
                RequestError, match=r"refused: the image has 101 x 100 = 10100 pixels; the limit is 10000: send"
            ):
                await preparation.prepare(small, SAME)


async def test_memory_is_bounded_and_the_message_names_the_bound() -> None:
    limits = ImageLimits(memory_bytes=24 << 20, wait_s=250.0, start_s=120.0)
    async with ImagePreparation(limits) as preparation:
        with pytest.raises(RequestError, match="24 MiB"):
            await preparation.prepare(encoded(Image.new("RGB", (4000, 3000)), "PNG"), SAME)
        assert not (await one_tile(preparation, BLACK)).any()


async def test_a_picture_that_takes_long_is_ended_holds_up_no_other_and_its_child_is_replaced() -> None:
    bomb = jpeg_with_scans(3000)
    limits = ImageLimits(cpu_seconds=1, wait_s=250.0, wall_s=120.0, start_s=120.0)
    async with ImagePreparation(limits) as preparation:
        late = asyncio.create_task(preparation.prepare(bomb, SAME))
        await until(lambda: preparation._preparers[0].child.load == 1)
        await until(lambda: late.done() or preparation._preparers[0].child.pid is not None)
        pid = preparation._preparers[0].child.pid
        assert pid is not None, "the machine was too slow to pause the child"
        with paused(pid):
            assert not (await one_tile(preparation, BLACK)).any()
            assert not late.done()
        with pytest.raises(RequestError, match=r"process exceeded its CPU time limit; the limit is 1 s"):
            await late
        assert [preparer.child.pid is None for preparer in preparation._preparers] == [True, False, True]
        assert not (await one_tile(preparation, BLACK)).any()


async def test_the_deadline_is_the_parents() -> None:
    limits = ImageLimits(wall_s=0.3, wait_s=250.0, start_s=120.0)
    async with ImagePreparation(limits) as preparation:
        with pytest.raises(DeadlineError, match=r"did not reply within 0\.3 s; try again"):
            await preparation.prepare(jpeg_with_scans(3000), SAME)
        assert preparation._preparers[0].child.pid is None


async def test_a_close_ends_the_work(preparation: ImagePreparation) -> None:
    async with ImagePreparation(QUICK) as closed:
        running = asyncio.create_task(closed.prepare(jpeg_with_scans(3000), SAME))
        await until(lambda: closed._preparers[0].child.pid is not None)
        pid = closed._preparers[0].child.pid
    with pytest.raises(DeadlineError):
        await asyncio.wait_for(running, 30)
    assert pid is not None and not is_running(pid)


async def test_many_pictures_at_once(preparation: ImagePreparation) -> None:
    pictures = [drawn(3, seed) for seed in range(20)]
    made = await asyncio.gather(*(preparation.prepare(encoded(Image.fromarray(p), "PNG"), SAME) for p in pictures))
    assert all(np.array_equal(each.tiles[0], pixels) for each, pixels in zip(made, pictures, strict=True))


async def test_all_settings_share_the_processes() -> None:
    async with ImagePreparation(QUICK) as preparation:
        for settings in (SAME, replace(SAME, image_size=2 * SIDE), SETTINGS["lfm2"]):
            assert (await preparation.prepare(BLACK, settings)).tiles
        assert [preparer.child.pid is None for preparer in preparation._preparers] == [False, True, True]


async def test_processes_end_when_they_are_idle_and_start_again() -> None:
    async with ImagePreparation(replace(QUICK, idle_s=0.05)) as preparation:
        for _ in range(2):
            await preparation.prepare(BLACK, SAME)
            async with asyncio.timeout(60):
                await until(lambda: all(preparer.child._process is None for preparer in preparation._preparers))


HOSTILE = """
import os, sys
from llamaclust.model.child_frames import end_with_parent, read_frame, read_frame_and_payload, write_frame
end_with_parent()
read_frame()
write_frame({"unconfined": None})
while True:
    _, reply = read_frame_and_payload()
    sys.stdout.buffer.write(reply)
    if not reply.endswith(b"\\n"):
        while True:
            sys.stdout.buffer.write(reply[-1:] * 65536)
    sys.stdout.buffer.flush()
"""
WHOLE = b'"columns": 0, "rows": 0'


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"[", "reply has more than 65536 bytes"),
        (b"[" * 60000 + b"\n", "reply cannot be decoded"),
        (b'[{"sizes": [[28, 28]], %s}, 100000000]\n0' % WHOLE, "reply has more than 4704 bytes"),
        (b'[{"sizes": [[28, 28]], %s}, 3]\nabc\n' % WHOLE, "an invalid reply"),
        (b'{"sizes": [[Infinity, 28]], %s}\n' % WHOLE, "an invalid reply"),
        (b'{"error": "%s"}\n' % (b"a" * 60000), "a{300}$"),
    ],
)
async def test_a_child_that_an_image_took_over_costs_little_memory(
    reply: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_child.py").write_text(HOSTILE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    monkeypatch.setattr(module, "_CHILD", "hostile_child")
    tracemalloc.start()
    try:
        async with ImagePreparation(replace(QUICK, max_bytes=1 << 20)) as preparation:
            with pytest.raises(RequestError, match=message):
                await preparation.prepare(reply, SAME)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


PLUGINS = """
import sys
import llamaclust.model.images.child
from llamaclust.model.images.decoding import decode

for picture in SAMPLES:
    decode(picture, 1 << 20)
plugins = [name[4:-11] for name in sys.modules if name.startswith("PIL.") and name.endswith("ImagePlugin")]
print(*sorted(plugins), "numpy" in sys.modules)
"""


def test_no_other_plugin_is_loaded() -> None:
    code = PLUGINS.replace("SAMPLES", repr(samples()))
    run = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, check=True)
    assert run.stdout == "Bmp Gif Jpeg Png WebP False\n"
