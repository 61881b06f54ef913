from __future__ import annotations

import os
import random
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from runner.case import Case, Group, Measures, option
from runner.drafted import CONTEXT, NoDrafters, Served, measured
from runner.models import TYPES, write_weakened
from runner.options import chosen, listed, positive
from shape import SHAPES

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.launchers.in_process import LocalPipeline, LocalSettings, LocalStage
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.model.quant_types import QuantType

_PROMPT = 64


@dataclass(frozen=True)
class DraftModel(Case):
    """Measures the gain of a draft model, with random weights for which the share of right drafts can be chosen.
    The draft model is the first layers of the model. The output of the other layers is multiplied by each of
    --strengths. With 0, these layers change nothing, so all drafts are right. N-gram drafts are off. Drafts must not
    change tokens or logprobs."""

    warm = 1
    shape: str = option("1.1b", "shape of the model", chosen("shape", {name: name for name in SHAPES}))
    type: QuantType = option(QuantType.Q4_K, "type of the weights", chosen("type", TYPES))
    layers: int = option(4, "number of layers of the draft model", positive)
    strengths: tuple[float, ...] = option(
        (0.0, 0.1, 0.3), "factors by which the output of layers after the draft model is multiplied", listed(float)
    )
    tokens: int = option(260, "number of tokens in an answer", positive)
    threads: int = option(os.cpu_count() or 1, "number of threads of the stage", positive)
    hidden: int | None = option(None, "width in channels, for tests (default: the shape's width)", positive)
    seed: int = option(1, "seed of the prompts")

    async def groups(self) -> AsyncIterator[Group]:
        shape = SHAPES[self.shape]
        if self.hidden:
            shape = replace(shape, hidden=self.hidden, ffn=2 * self.hidden, vocabulary=512)
        with tempfile.TemporaryDirectory() as name:
            model, draft = Path(name) / "model.gguf", Path(name) / "draft.gguf"
            for strength in self.strengths:
                write_weakened(model, shape, self.type, self.layers, strength)
                write_weakened(draft, replace(shape, layers=self.layers), self.type, self.layers, strength)
                settings = LocalSettings(context_length=CONTEXT, draft_model=draft)
                stage = LocalStage(model, self.threads, None, settings)
                own = stage.scheduling.speculation
                assert own is not None
                scheduling = replace(stage.scheduling, speculation=replace(own, drafters=NoDrafters()))
                with stage.model:
                    async with Engine(LocalPipeline(stage), scheduling) as engine:
                        served = Served(engine, stage.model)
                        ways = {way: partial(self._measure, served, way == "plain") for way in ("plain", "drafted")}
                        yield Group(f"strength {strength:g}", ways, {"tok/s": ""})
                    stage.close()

    async def _measure(self, model: Served, plain: bool, turn: int) -> Measures:
        draw = random.Random(f"{self.seed} {turn}")
        prompt = tuple(draw.randrange(model.vocabulary) for _ in range(_PROMPT))
        return await measured(model.engine, GenerationRequest(f"draft-{turn}", prompt, self.tokens), plain=plain)
