from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from runner.case import Case, Group, Measures, argument, option
from runner.options import chosen, listed, positive

from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.model.checkpoints.storage import Storage
from llamaclust.tools.convert.stream import OUTPUT_TYPES, encoded

HEADS, WORDS = 32, 32000
WEIGHTS = "model.safetensors"
CHUNK = 1 << 22
DD_BLOCK = 1 << 24
CODE = "import sys; sys.argv[0] = 'llamaclust'; from llamaclust.cli.main import main; main()"


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    hidden: int
    inner: int


SHAPES = {"7b": Shape(32, 4096, 11008), "1.1b": Shape(24, 2048, 5632)}


def tensors_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden, shape.inner
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, hidden), "model.norm.weight": (hidden,)}
    for layer in range(shape.layers):
        place = f"model.layers.{layer}"
        found |= {f"{place}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        found |= {f"{place}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        found |= {f"{place}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        found[f"{place}.mlp.down_proj.weight"] = (hidden, inner)
    return found | {"lm_head.weight": (WORDS, hidden)}


def make_checkpoint(folder: Path, shape: Shape, stored: str) -> int:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": HEADS,
        "vocab_size": WORDS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary()))
    header, at = {}, 0
    size = Storage[stored.upper()].dtype.itemsize
    for name, sizes in tensors_of(shape).items():
        end = at + size * int(np.prod(sizes))
        header[name] = {"dtype": stored.upper(), "shape": sizes, "data_offsets": (at, end)}
        at = end
    text = json.dumps(header).encode()
    numbers = np.random.default_rng(1).standard_normal(CHUNK, np.float32) / np.float32(64)
    chunk = bytes(encoded(numbers, Storage.F32, OUTPUT_TYPES[stored], "random"))
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, at, len(chunk)):
            file.write(chunk[: at - start])
        os.fsync(file.fileno())
    return at


def vocabulary() -> dict[str, object]:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"w{number}" for number in range(WORDS - len(words))]
    ids = {word: number for number, word in enumerate(words)}
    return {"model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": ids, "merges": []}}


def converted(folder: Path, out: Path, kind: str) -> tuple[float, float]:
    """Runs `model convert`. Returns the command's time in seconds and its peak resident memory in MiB."""
    began = time.monotonic()
    command = [sys.executable, "-c", CODE, "model", "convert", str(folder), "-o", str(out), "--type", kind]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise LlamaclustError(f"{' '.join(command)} ended with exit status {child.returncode}")
    return time.monotonic() - began, usage.ru_maxrss / 1024


def moved(out: Path, size_bytes: int, source: Path | None) -> float:
    """Returns the seconds that dd takes to write `size_bytes` bytes, while another dd reads `source` if it is given."""
    count = -(-size_bytes // DD_BLOCK)
    commands = [[f"of={out}", "if=/dev/zero", f"count={count}", "conv=fsync"]]
    if source is not None:
        commands.append(["of=/dev/null", f"if={source}"])
    began = time.monotonic()
    running = [subprocess.Popen(["dd", f"bs={DD_BLOCK}", "status=none", *words]) for words in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise LlamaclustError(f"dd ended with exit statuses {codes}")
    return time.monotonic() - began


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


_KINDS = {name: name for name in OUTPUT_TYPES}


@dataclass(frozen=True)
class Convert(Case):
    """Compares the speed of `model convert` with dd, and measures its peak memory, on random weights.
    The checkpoint has the shape of a real model. It is made first and deleted at the end. dd writes as many bytes to
    the same disk with conv=fsync, alone and while another dd reads the checkpoint. With --cold, the checkpoint is
    removed from the page cache first."""

    rounds = 1
    folder: Path = argument("new folder for the files, which is deleted at the end")
    shape: str = option("7b", "shape of the checkpoint", chosen("shape", {name: name for name in SHAPES}))
    layers: int | None = option(None, "number of layers (default: all; a whole 7b has 13 GiB in 16 bits)", positive)
    stored: str = option(
        "bf16", "type of the checkpoint's matrices", chosen("type", {name: name for name in ("f32", "f16", "bf16")})
    )
    types: tuple[str, ...] = option((*_KINDS,), "types to convert to", listed(chosen("type", _KINDS)))
    cold: bool = option(False, "read the checkpoint from disk, not from memory")

    async def groups(self) -> AsyncIterator[Group]:
        if self.folder.exists():
            raise UsageError(f"{self.folder} already exists; choose a new folder")
        shape = SHAPES[self.shape]
        shape = replace(shape, layers=self.layers or shape.layers)
        try:
            source_bytes = make_checkpoint(self.folder, shape, self.stored)
            print(f"{self.stored} checkpoint of {source_bytes / 2**30:.2f} GiB", flush=True)
            for kind in self.types:
                ways = {way: partial(self._measure, way, kind) for way in ("convert", "dd", "dd that reads")}
                yield Group(kind, ways, {"GB/s": ""}, in_order=True)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _measure(self, way: str, kind: str, turn: int) -> Measures:
        return await asyncio.to_thread(self._run, way, kind)

    def _run(self, way: str, kind: str) -> Measures:
        converts, out, weights = self.folder / f"{kind}.gguf", self.folder / "out", self.folder / WEIGHTS
        if self.cold and way != "dd":
            forget(weights)
        if way == "convert":
            seconds, peak_mib = converted(self.folder, converts, kind)
            return {"s": seconds, "GB/s": converts.stat().st_size / seconds / 1e9, "peak MiB": peak_mib}
        size = converts.stat().st_size
        seconds = moved(out, size, None if way == "dd" else weights)
        out.unlink()
        if way == "dd that reads":
            converts.unlink()
        return {"s": seconds, "GB/s": size / seconds / 1e9}
