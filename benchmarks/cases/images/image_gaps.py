from __future__ import annotations

import asyncio
import io
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import httpx
import numpy as np
from PIL import Image
from runner.beside import Others
from runner.case import Case, Group, Measures, Variant, option
from runner.clusters import Bench, Layout, running
from runner.models import TYPES
from runner.options import chosen, natural, positive
from runner.streams import event, requested
from runner.vision_shapes import VISION_SHAPES, write_vision_shape
from shape import Shape, write_shape

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.chaos.load import meanwhile

_SIZE = (1024, 768)
_CONTEXT_TOKENS = 8192
_QUIET_S, _SETTLE_S = 10.0, 1.0
_TEXTS = {
    "smolvlm-500m": Shape(960, 32, 2560, 15, 5, context=_CONTEXT_TOKENS),
    "gemma-3-4b": Shape(2560, 34, 10240, 8, 4, context=_CONTEXT_TOKENS),
    "qwen3-vl-4b": Shape(2560, 36, 9728, 20, 5, context=_CONTEXT_TOKENS),
}
_NAMES = {name: name for name in _TEXTS}
_BESIDE = 1000  # Images that are processed while streams run have numbers from 1000.


@dataclass(frozen=True)
class ImageGaps(Case):
    """Measures how an image affects text streams, and how fast a second question about an image is answered.
    `first s` is the time to the first token of an answer about an image of 1024 x 768 pixels. `gap ms` and `mid ms` are
    the maximum and the median time between two tokens of a text stream, without an image and during its encoding (goal
    for `gap ms`: 150). `prompt ms` is the maximum during the prefill of the prompt with the image. Weights are random,
    and nothing is drafted."""

    rounds = 3
    shape: str = option("smolvlm-500m", "shape of the image encoder and the text model", chosen("shape", _NAMES))
    type: QuantType = option(QuantType.Q8_0, "type of all matrices", chosen("type", TYPES))
    layers: int = option(0, "number of layers of the encoder (0: all)", natural)
    text_layers: int = option(0, "number of layers of the text model (0: all)", natural)
    streams: int = option(1, "number of text streams while the image is processed", positive)
    threads: int = option(2, "number of threads of the worker", positive)
    quiet: float = option(_QUIET_S, "seconds to measure streams without an image")

    async def groups(self) -> AsyncIterator[Group]:
        workers = [{"name": "a", "threads": self.threads}]
        keys = {"workers": workers, "context_length": _CONTEXT_TOKENS, "chat_template": "chatml", "speculative": "off"}
        with self._models() as model:
            async with running(model, Layout(workers=1, keys=keys)) as (bench, _):
                questions = {"a new image": partial(self._measured, bench, "What is this?")}
                questions["asked again"] = partial(self._measured, bench, "Describe it.")
                yield Group("question", questions, {"first s": "0.1"}, in_order=True)
                async with AsyncClient(bench.api) as client:
                    seen = Others(client, bench)
                    variants: dict[str, Variant] = {"text alone": partial(self._alone, seen)}
                    variants["beside an image"] = partial(_beside, bench, seen)
                    async with meanwhile([seen.stream(number) for number in range(self.streams)]):
                        yield Group("streams", variants, in_order=True)

    @contextmanager
    def _models(self) -> Iterator[Path]:
        shape, text = VISION_SHAPES[self.shape], _TEXTS[self.shape]
        text = replace(text, layers=min(self.text_layers or text.layers, text.layers))
        with TemporaryDirectory(prefix="llamaclust-") as folder:
            path = Path(folder) / "text.gguf"
            write_shape(path, self.shape, text, self.type, alike=True)
            layers = min(self.layers or shape.layers, shape.layers)
            write_vision_shape(path.with_name("mmproj.gguf"), shape, self.type, layers)
            yield path

    async def _measured(self, bench: Bench, question: str, turn: int) -> Measures:
        return {"first s": (await _answered(bench, question, _image(turn))).first_s}

    async def _alone(self, seen: Others, turn: int) -> Measures:
        await asyncio.sleep(_SETTLE_S)
        begun_s = monotonic()
        await asyncio.sleep(self.quiet)
        return _gap_measures(_gaps_s(seen, begun_s, monotonic()))


@dataclass(frozen=True, slots=True)
class _Answered:
    """Monotonic times when a request with an image was sent, its images were encoded, and its first token arrived."""

    begun_s: float
    encoded_s: float
    answered_s: float

    @property
    def first_s(self) -> float:
        return self.answered_s - self.begun_s


async def _beside(bench: Bench, seen: Others, turn: int) -> Measures:
    image = _image(_BESIDE + turn)  # Made before the wait, because this process also reads the streams.
    await asyncio.sleep(_SETTLE_S)
    found = await _answered(bench, "What is this?", image)
    await asyncio.sleep(_SETTLE_S)
    prompt_s = max(_gaps_s(seen, found.encoded_s, found.answered_s))
    own = {"prompt ms": 1e3 * prompt_s, "encode s": found.encoded_s - found.begun_s, "first s": found.first_s}
    return {**_gap_measures(_gaps_s(seen, found.begun_s, found.encoded_s)), **own}


def _gaps_s(seen: Others, from_s: float, to_s: float) -> list[float]:
    return [end_s - begun_s for begun_s, end_s in seen.gaps if begun_s < to_s and end_s > from_s] or [0.0]


def _gap_measures(gaps_s: Sequence[float]) -> Measures:
    return {"gap ms": 1e3 * max(gaps_s), "mid ms": 1e3 * median(gaps_s)}


async def _answered(bench: Bench, question: str, image: dict[str, Any]) -> _Answered:
    content = [image, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "return_token_ids": True}
    begun_s = monotonic()
    reader, writer = await requested(bench.api, body, "/v1/chat/completions")
    try:
        chunk = json.loads(await event(reader))
        while not any(choice.get("token_ids") for choice in chunk["choices"]):
            chunk = json.loads(await event(reader))
        answered_s = monotonic()
        encoded_s = begun_s + await _preparation_s(bench, chunk["id"])
        return _Answered(begun_s, encoded_s, answered_s)
    finally:
        writer.close()


async def _preparation_s(bench: Bench, request: str) -> float:
    async with httpx.AsyncClient(base_url=bench.api, trust_env=False) as client:
        (found,) = (await client.get(f"/cluster/requests/{request}")).raise_for_status().json()["requests"]
    return sum(float(phase["seconds"]) for phase in found["phases"] if phase["phase"] == "preparation")


def _image(number: int) -> dict[str, Any]:
    width, height = _SIZE
    colours = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours).save(out, "PNG")
    url = f"data:image/png;base64,{b64encode(out.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
