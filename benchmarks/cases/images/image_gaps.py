"""The case `image_gaps`."""

from __future__ import annotations

import asyncio
import io
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image
from runner.beside import Others, others
from runner.case import Case, Group, Measures, option
from runner.clusters import Bench, Layout, running
from runner.models import TYPES
from runner.options import chosen, natural, positive
from runner.streams import event, requested
from runner.vision_shapes import VISION_SHAPES, write_vision_shape
from shape import Shape, write_shape

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.model.quant_types import QuantType

_SIZE = (1024, 768)
_CONTEXT_TOKENS = 8192
_QUIET_S, _SETTLE_S = 10.0, 1.0
_TEXTS = {
    "smolvlm-500m": Shape(960, 32, 2560, 15, 5, context=_CONTEXT_TOKENS),
    "gemma-3-4b": Shape(2560, 34, 10240, 8, 4, context=_CONTEXT_TOKENS),
    "qwen3-vl-4b": Shape(2560, 36, 9728, 20, 5, context=_CONTEXT_TOKENS),
}
_NAMES = {name: name for name in _TEXTS}
_BESIDE = 1000  # the number of the first image beside streams


@dataclass(frozen=True)
class ImageGaps(Case):
    """Cost of an image of 1024 x 768 pixels to streams of text meanwhile, and of another question to the same image.

    Both models have random weights in the shapes of a public model. `first s` is the time to the first token of an
    answer about the image. `gap ms` is the longest time between two tokens of a stream (goal: 150)."""

    rounds = 3
    shape: str = option("smolvlm-500m", "of both models", chosen("shape", _NAMES))
    type: QuantType = option(QuantType.Q8_0, "of all matrices", chosen("type", TYPES))
    layers: int = option(0, "of the encoder; 0: all", natural)
    text_layers: int = option(0, "of the text model; 0: all", natural)
    streams: int = option(1, "of text beside the image", positive)
    threads: int = option(2, "of the worker", positive)
    quiet: float = option(_QUIET_S, "seconds of streams without an image")

    async def groups(self) -> AsyncIterator[Group]:
        workers = [{"name": "a", "threads": self.threads}]
        keys = {"workers": workers, "context_length": _CONTEXT_TOKENS, "chat_template": "chatml"}
        with self._models() as model:
            async with running(model, Layout(workers=1, keys=keys)) as (bench, _):
                questions = {"a new image": partial(self._measured, bench, "What is this?")}
                questions["asked again"] = partial(self._measured, bench, "Describe it.")
                yield Group("question", questions, {"first s": "0.1"}, in_order=True)
                async with AsyncClient(bench.api) as client, others(client, bench, self.streams) as seen:
                    works: dict[str, Callable[[int], Awaitable[float]]] = {"text alone": self._nothing}
                    works["beside an image"] = partial(_first_s, bench, "What is this?")
                    variants = {name: partial(_watched, seen, work) for name, work in works.items()}
                    yield Group("streams", variants, in_order=True)

    @contextmanager
    def _models(self) -> Iterator[Path]:
        """Yields a text model with its projector beside it."""
        shape, text = VISION_SHAPES[self.shape], _TEXTS[self.shape]
        text = replace(text, layers=min(self.text_layers or text.layers, text.layers))
        with TemporaryDirectory(prefix="llamaclust-") as folder:
            path = Path(folder) / "text.gguf"
            write_shape(path, self.shape, text, self.type, alike=True)
            layers = min(self.layers or shape.layers, shape.layers)
            write_vision_shape(path.with_name("mmproj.gguf"), shape, self.type, layers)
            yield path

    async def _measured(self, bench: Bench, question: str, turn: int) -> Measures:
        return {"first s": await _first_s(bench, question, turn)}

    async def _nothing(self, number: int) -> float:
        await asyncio.sleep(self.quiet)
        return 0.0


async def _watched(seen: Others, work: Callable[[int], Awaitable[float]], turn: int) -> Measures:
    await asyncio.sleep(_SETTLE_S)
    seen.clear()
    first_s = await work(_BESIDE + turn)
    return {**seen.measures, "first s": first_s}


async def _first_s(bench: Bench, question: str, number: int) -> float:
    """Returns the seconds to the first token of an answer about the image of this number."""
    content = [_image(number), {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "return_token_ids": True}
    begun_s = perf_counter()
    reader, writer = await requested(bench.api, body, "/v1/chat/completions")
    try:
        while not any(choice.get("token_ids") for choice in json.loads(await event(reader))["choices"]):
            pass
        return perf_counter() - begun_s
    finally:
        writer.close()


def _image(number: int) -> dict[str, Any]:
    width, height = _SIZE
    colours = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours).save(out, "PNG")
    url = f"data:image/png;base64,{b64encode(out.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
