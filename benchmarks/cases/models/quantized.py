from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from runner.case import Case, Group, Measures, argument, option
from runner.options import existing, listed, positive
from runner.padded import PaddedModels, llamaclust, told

from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.tools.quantize.mixes import MIXES
from llamaclust.tools.quantize.type_choice import MixChoice, choose_types, is_kept


@dataclass(frozen=True)
class Quantized(Case):
    """Compares the quantizations of a model: size, perplexity, KL divergence from the unquantized model, and speed.
    The model is padded with zeros, so that all types fit. Perplexity and divergence are measured on the first --chunks
    chunks of TEXT. All types use the importance matrix of TEXT's second half. `fall back` is the share of matrices that
    get another type without padding. Speeds come from `llamaclust bench` and are relative to F16 in the same minute."""

    rounds = 1
    model: str = argument("catalog name or path of a .gguf", str)
    text: Path = argument("path of a text file", existing)
    hidden: int = option(768, "width in channels after padding", positive)
    chunks: int = option(8, "number of chunks of 512 tokens to predict", positive)
    types: tuple[str, ...] = option((*MIXES,), "quantization mixes", listed(str))
    no_speed: bool = option(False, "omit the two columns of speeds")

    async def groups(self) -> AsyncIterator[Group]:
        with TemporaryDirectory(prefix="llamaclust-") as name:
            made = await asyncio.to_thread(PaddedModels.of, self.model, self.hidden, self.text, self.chunks, Path(name))
            print(
                f"F16: {made.padded.stat().st_size / (1 << 20):.0f} MiB, perplexity {made.perplexity:.2f}", flush=True
            )
            for mix in self.types:
                yield Group("", {mix: partial(self._measure, made, mix)})

    async def _measure(self, made: PaddedModels, mix: str, turn: int) -> Measures:
        return await asyncio.to_thread(self._row, made, mix)

    def _row(self, made: PaddedModels, mix: str) -> Measures:
        path = made.padded.with_name(f"{mix}.gguf")
        llamaclust("model", "quantize", made.padded, path, mix, "--imatrix", made.matrix)
        found = told("model", "perplexity", path, "--kl-divergence", "--kl-divergence-base", made.logits)
        tensors = open_model(path).tensors.values()
        weights, n_bytes = sum(each.rows * each.shape[-1] for each in tensors), sum(each.n_bytes for each in tensors)
        sizes = {"MiB": path.stat().st_size / (1 << 20), "bits": 8 * n_bytes / weights}
        sizes["fall back"] = fall_back(open_model(made.narrow), open_model(made.padded), mix)
        quality = {"perplexity": found["perplexity"], "KL": found["kld"][0], "same top": found["same_top"][0]}
        speed = {} if self.no_speed else speeds(path, made.padded)
        path.unlink()
        return {**sizes, **quality, **speed}


def fall_back(narrow: ModelFile, wide: ModelFile, mix: str) -> float:
    matrices = [name for name, tensor in narrow.tensors.items() if not is_kept(name, tensor.shape)]
    here, there = (choose_types(model, MixChoice(MIXES[mix], has_importance=True)) for model in (narrow, wide))
    return sum(here[name] != there[name] for name in matrices) / len(matrices)


def speeds(model: Path, base: Path) -> dict[str, float]:
    one, other = (told("bench", path, "-p", "256", "-n", "48") for path in (model, base))
    return {phase: one[phase]["tok_s"] / other[phase]["tok_s"] for phase in ("decode", "prefill")}
