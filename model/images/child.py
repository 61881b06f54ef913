"""The child process that decodes and prepares images. It is confined, with little memory and little CPU time."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from llamaclust.model.child_frames import end_with_parent, read_frame, read_frame_and_payload, write_frame
from llamaclust.model.confinement import confine, limit_cpu, limit_resources
from llamaclust.model.images.decoding import decode
from llamaclust.model.images.settings import ImageError, ImageSettings, check_tiles
from llamaclust.model.images.tiling import tiling_of


def _reply_to(image: bytes, settings: ImageSettings, first: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Returns the reply (the tiles' sizes, or an error), and the pixels [height, width, 3] of all tiles in order."""
    try:
        tiling = tiling_of(decode(image, first["max_pixels"]), settings)
        sizes = [tile.size for tile in tiling.tiles]
        check_tiles(sizes, settings)
        reply = {"sizes": sizes, "columns": tiling.columns, "rows": tiling.rows}
        return reply, b"".join(tile.tobytes() for tile in tiling.tiles)
    except ImageError as error:
        return {"error": str(error)}, b""
    except MemoryError:
        what = f"decoding needs more than {first['memory_bytes'] >> 20} MiB; send a smaller image"
        return {"error": what}, b""


def _memory_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    end_with_parent()
    warnings.simplefilter("ignore")
    Image._initialized = 2  # Keeps Pillow from importing all plugins during a later call.
    had = _memory_bytes()
    unconfined = confine()
    first = read_frame()
    limit_resources(had + first["memory_bytes"])
    write_frame({"unconfined": unconfined})
    while True:
        frame, image = read_frame_and_payload()
        limit_cpu(first["cpu_seconds"])
        write_frame(*_reply_to(image, ImageSettings(**frame), first))


if __name__ == "__main__":
    main()
