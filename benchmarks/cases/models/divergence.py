from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from runner.case import Case, Group, Measures, argument, option
from runner.options import existing, listed, positive
from runner.padded import PaddedModels, llamaclust

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.loader import Model
from llamaclust.tools.evaluate.logit_scores import measure_divergence
from llamaclust.tools.evaluate.logits_file import LogitsFile
from llamaclust.tools.quantize.mixes import MIXES
from llamaclust.tools.quantize.type_choice import MixChoice, choose_types, needs_importance

_DEADLINE_S = 1800
Float64 = NDArray[np.float64]
_SAME = {"F32", "F16", "BF16"}
"""Types for which both programs write the same values, because a quantizer has no choice."""


@dataclass(frozen=True)
class Divergence(Case):
    """Compares the KL divergence of quantized models with that of llama-quantize's models.
    The divergence is from the unquantized model, which is padded with zeros so that all types fit. It is measured on
    the first --chunks chunks of TEXT. For mixes with `+`, both programs get the importance matrix of TEXT's second
    half. Both files run in llamaclust's kernels and must have tensors of the same types. The ratio's standard error is
    computed over pairs of tokens."""

    rounds = 1
    model: str = argument("catalog name or path of a .gguf", str)
    text: Path = argument("path of a text file", existing)
    llama_quantize: Path | None = option(None, "path of llama.cpp's program llama-quantize", existing)
    hidden: int = option(768, "width in channels after padding", positive)
    chunks: int = option(8, "number of chunks of 512 tokens to predict", positive)
    types: tuple[str, ...] = option((*MIXES,), "quantization mixes", listed(str))

    async def groups(self) -> AsyncIterator[Group]:
        if self.llama_quantize is None:
            raise UsageError("--llama-quantize is missing; give the path of llama.cpp's program llama-quantize")
        with TemporaryDirectory(prefix="llamaclust-") as name:
            made = await asyncio.to_thread(PaddedModels.of, self.model, self.hidden, self.text, self.chunks, Path(name))
            for mix in self.types:
                for weighted in (False, True) if mix not in _SAME else ():
                    if weighted or _goes_without(made.padded, mix):
                        yield self._group(made, mix, weighted, (str(self.llama_quantize),))

    def _group(self, made: PaddedModels, mix: str, weighted: bool, program: tuple[str, ...]) -> Group:
        async def row(turn: int) -> Measures:
            one, other = await asyncio.to_thread(self._pair, made, mix, weighted, program[0])
            value, error = ratio(one, other)
            return {"ours": float(one.mean()), "theirs": float(other.mean()), "ratio": value, "+/-": error}

        return Group("", {mix + "+" * weighted: row})

    @staticmethod
    def _pair(made: PaddedModels, mix: str, weighted: bool, program: str) -> tuple[Float64, Float64]:
        ours, theirs = made.padded.with_name("ours.gguf"), made.padded.with_name("theirs.gguf")
        given = ("--imatrix", str(made.matrix)) if weighted else ()
        llamaclust("model", "quantize", made.padded, ours, mix, *given)
        words = [program, *given, str(made.padded), str(theirs), mix]
        subprocess.run(words, check=True, capture_output=True, timeout=_DEADLINE_S)
        _check_same_types(ours, theirs)
        return divergences(ours, made.logits), divergences(theirs, made.logits)


def divergences(model: Path, logits: Path) -> Float64:
    base = LogitsFile.open(logits)
    with closing(Model.open(model)) as opened:
        tokenizer = opened.tokenizer
    context, chunks = base.shape.context, base.shape.chunks
    settings = LocalSettings(context_length=context, max_sequences=1, prefix_cache=False, kv_blocks=context // 16 + 2)
    with LocalClient(model, None, settings=settings) as client:
        return measure_divergence(client, tokenizer, base, chunks, lambda done, mean: None).scores.kld


def ratio(ours: Float64, theirs: Float64) -> tuple[float, float]:
    value = float(ours.mean() / theirs.mean())
    apart = ours - value * theirs
    return value, float(apart.std() / theirs.mean() / np.sqrt(apart.size))


def _check_same_types(ours: Path, theirs: Path) -> None:
    one, other = (
        {name: tensor.quant_type for name, tensor in open_model(path).tensors.items()} for path in (ours, theirs)
    )
    differ = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    if differ:
        raise LlamaclustError(
            f"{len(differ)} tensors have other types than in llama-quantize's file, such as {min(differ)}"
        )


def _goes_without(model: Path, mix: str) -> bool:
    types = choose_types(open_model(model), MixChoice(MIXES[mix]))
    return not any(needs_importance(name, kind, MIXES[mix]) for name, kind in types.items())
