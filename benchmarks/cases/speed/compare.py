from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from runner.case import Case, Group, Measures, argument, option
from runner.llama import check_program, json_of, their_answers, their_speed
from runner.models import model_of, types_of
from runner.options import chosen, existing, natural, positive
from shape import SHAPES

from llamaclust.core.errors import UsageError
from llamaclust.kernels import _native
from llamaclust.model.quant_types import QuantType

_LEAST_PROMPT = 16


@dataclass(frozen=True)
class Compare(Case):
    """Compares the speed of `llamaclust bench` with llama.cpp's `llama-bench`, in turns.
    A ratio above 1 means that llamaclust is faster. `benchmarks/runner/llama.py` says how to build llama-bench. For
    each of --types, a temporary file of random weights is made."""

    models: list[Path] = argument("paths of .gguf files", existing, nargs="*")
    llama_bench: Path | None = option(None, "path of llama.cpp's program llama-bench", Path)
    types: tuple[QuantType, ...] = option((), "types of weights, or all, instead of models", types_of)
    shape: str = option("1.1b", "shape of the models of --types", chosen("shape", {name: name for name in SHAPES}))
    folder: Path | None = option(None, "folder that already holds files such as Q4_K.gguf", Path)
    threads: int = option(2, "number of threads of each program", positive)
    prompt: int = option(512, "number of tokens in a prefill", positive)
    generate: int = option(128, "number of tokens to decode", positive)
    depth: int = option(0, "number of tokens in KV memory before decode; if not 0, only decode is compared", natural)
    runs: int = option(2, "number of runs of each program per turn", positive)

    async def groups(self) -> AsyncIterator[Group]:
        if self.llama_bench is None or not (self.models or self.types):
            raise UsageError("--llama-bench PATH is needed, and models or --types")
        program = check_program(self.llama_bench)
        for model in self.models:
            yield self._group(model.stem, model, program)
        for quant_type in self.types:
            with model_of(quant_type, self.shape, self.folder) as model:
                yield self._group(f"{quant_type.name}, {facts(quant_type)}", model, program)

    def _group(self, name: str, model: Path, program: Path) -> Group:
        async def theirs(turn: int) -> Measures:
            options = self._options(0 if self.depth else self.prompt)
            speed = await asyncio.to_thread(lambda: their_speed(program, their_answers(program, model, options)))
            return ({} if self.depth else {"prefill": speed.prefill or 0.0}) | {"decode": speed.decode}

        async def ours(turn: int) -> Measures:
            words = [str(Path(sys.executable).parent / "llamaclust"), "bench", str(model), "--json"]
            options = self._options(_LEAST_PROMPT if self.depth else self.prompt)
            found = await asyncio.to_thread(json_of, [*words, *options])
            parts = ("decode",) if self.depth else ("prefill", "decode")
            shares = {f"{part} of limit": float(found[f"{part}_roofline"]) for part in parts}
            return {part: float(found[part]["tok_s"]) for part in parts} | shares

        return Group(name, {"llama.cpp": theirs, "llamaclust": ours})

    def _options(self, prompt: int) -> list[str]:
        values = {"-t": self.threads, "-p": prompt, "-n": self.generate, "-r": self.runs}
        if self.depth:  # Omitted if 0, because ik_llama.cpp's program does not know the option.
            values["-d"] = self.depth
        return [str(word) for option in values.items() for word in option]


def facts(quant_type: QuantType) -> str:
    """Describes a type: bits per weight in the file, and the ratio of bytes in memory to bytes in the file."""
    info, rows, cols = quant_type.info, 16, 2048
    tiles = _native.PackedMatrix(quant_type, rows, cols).bytes / (rows * info.row_bytes(cols))
    return f"{8 * info.block_bytes / info.block_size:.4g} bits, tiles of {tiles:.2f} of its bytes"
