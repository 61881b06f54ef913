"""`model convert` on a checkpoint of random weights with the shape of a real model: speed beside dd, and peak memory.

    python benchmarks/models/convert.py --folder /tmp/checkpoint --shape 7b --layers 8 --stored bf16 --types f16 q8_0

The checkpoint is made first (all its matrices repeat the same random numbers) and deleted at the end. Every type is
converted, then `dd` writes as many bytes to the same disk with conv=fsync, then two dd at once read the checkpoint and
write as many bytes; in turns. With --cold the checkpoint is not in memory before each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llamaclust.model.checkpoints.storage import Storage
from llamaclust.tools.convert.stream import OUTPUT_TYPES, encoded

HEADS, WORDS = 32, 32000
WEIGHTS = "model.safetensors"
CHUNK = 1 << 22
DD_BLOCK = 1 << 24
CODE = "import sys; sys.argv[0] = 'llamaclust'; from llamaclust.cli.main import main; main()"


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a LLaMA."""

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
    """Writes it; its bytes."""
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
    """Words that are bytes, spelled as SentencePiece's, and fillers."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"w{number}" for number in range(WORDS - len(words))]
    ids = {word: number for number, word in enumerate(words)}
    return {"model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": ids, "merges": []}}


def converted(folder: Path, out: Path, kind: str) -> tuple[float, float]:
    """Seconds, and the highest resident memory in MiB, of the command."""
    began = time.monotonic()
    command = [sys.executable, "-c", CODE, "model", "convert", str(folder), "-o", str(out), "--type", kind]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return time.monotonic() - began, usage.ru_maxrss / 1024


def moved(out: Path, size_bytes: int, source: Path | None) -> float:
    """Seconds that dd needs to write as many bytes, while another one reads `source`."""
    count = -(-size_bytes // DD_BLOCK)
    commands = [[f"of={out}", "if=/dev/zero", f"count={count}", "conv=fsync"]]
    if source is not None:
        commands.append(["of=/dev/null", f"if={source}"])
    began = time.monotonic()
    running = [subprocess.Popen(["dd", f"bs={DD_BLOCK}", "status=none", *words]) for words in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("dd failed")
    return time.monotonic() - began


def forget(path: Path) -> None:
    """Takes a file that is on the disk out of memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True, help="to be made, and deleted at the end")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the model has; a whole 7b has 13 GiB in 16 bits")
    parser.add_argument("--stored", choices=("f32", "f16", "bf16"), default="bf16")
    parser.add_argument("--types", nargs="+", choices=tuple(OUTPUT_TYPES), default=list(OUTPUT_TYPES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="the checkpoint is read from the disk")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} is there already")
    shape = SHAPES[options.shape]
    shape = replace(shape, layers=options.layers or shape.layers)
    out, weights = options.folder / "out.gguf", options.folder / WEIGHTS
    try:
        source_bytes = make_checkpoint(options.folder, shape, options.stored)
        print(f"{options.stored} checkpoint of {source_bytes / 2**30:.2f} GiB, {len(os.sched_getaffinity(0))} cores")
        for kind in [kind for kind in options.types for _ in range(options.repeats)]:
            if options.cold:
                forget(weights)
            seconds, peak = converted(options.folder, out, kind)
            size = out.stat().st_size
            out.unlink()
            plain = moved(out, size, None)
            out.unlink()
            if options.cold:
                forget(weights)
            both = moved(out, size, weights)
            out.unlink()
            rates = f"{size / seconds / 1e9:.2f} GB/s, dd {size / plain / 1e9:.2f}: ratio {plain / seconds:.2f}"
            rates += f"; dd that also reads {size / both / 1e9:.2f}: ratio {both / seconds:.2f}"
            print(f"{kind:5} {size / 2**30:6.2f} GiB in {seconds:6.2f} s  {rates}, peak {peak:.0f} MiB", flush=True)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
