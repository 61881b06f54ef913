"""`model convert` on a checkpoint of random weights with the shape of a 7B model: speed beside dd, and peak memory.

    python benchmarks/convert.py --folder /tmp/checkpoint --layers 8 --stored bf16 --types f16 bf16 q8_0

The checkpoint is made first (all its matrices repeat the same random numbers) and deleted at the end. Every type is
converted, then `dd` writes as many bytes to the same disk with conv=fsync, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from llamaclust.tools.convert.elements import OUTPUT_TYPES, encoded
from llamaclust.tools.convert.lazy import Storage

HIDDEN, INNER, HEADS, WORDS = 4096, 11008, 32, 32000
CHUNK = 1 << 22
DD_BLOCK = 1 << 24
CODE = "import sys; sys.argv[0] = 'llamaclust'; from llamaclust.cli.main import main; main()"


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Of a LLaMA 7B with so many layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        found |= {f"{place}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        found |= {f"{place}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        found |= {f"{place}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        found[f"{place}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    return found | {"lm_head.weight": (WORDS, HIDDEN)}


def make_checkpoint(folder: Path, layers: int, stored: str) -> int:
    """Writes it; its bytes."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "vocab_size": WORDS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary()))
    header, at = {}, 0
    size = Storage[stored.upper()].dtype.itemsize
    for name, shape in shapes(layers).items():
        end = at + size * int(np.prod(shape))
        header[name] = {"dtype": stored.upper(), "shape": shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(header).encode()
    numbers = np.random.default_rng(1).standard_normal(CHUNK, np.float32) / np.float32(64)
    chunk = bytes(encoded(numbers, Storage.F32, OUTPUT_TYPES[stored], "random"))
    with (folder / "model.safetensors").open("wb") as file:
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


def copied(out: Path, size_bytes: int) -> float:
    """Seconds that dd needs for as many bytes."""
    began = time.monotonic()
    count = -(-size_bytes // DD_BLOCK)
    command = ["dd", "if=/dev/zero", f"of={out}", f"bs={DD_BLOCK}", f"count={count}", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True, help="to be made, and deleted at the end")
    parser.add_argument("--layers", type=int, default=32, help="32 is the whole model, 13 GiB in 16 bits")
    parser.add_argument("--stored", choices=("f32", "f16", "bf16"), default="bf16")
    parser.add_argument("--types", nargs="+", choices=tuple(OUTPUT_TYPES), default=list(OUTPUT_TYPES))
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} is there already")
    out = options.folder / "out.gguf"
    try:
        source_bytes = make_checkpoint(options.folder, options.layers, options.stored)
        print(f"{options.stored} checkpoint of {source_bytes / 2**30:.2f} GiB, {len(os.sched_getaffinity(0))} cores")
        for kind in [kind for kind in options.types for _ in range(options.repeats)]:
            seconds, peak = converted(options.folder, out, kind)
            size = out.stat().st_size
            out.unlink()
            plain = copied(out, size)
            out.unlink()
            rates = f"{size / seconds / 1e9:.2f} GB/s, dd {size / plain / 1e9:.2f}: ratio {plain / seconds:.2f}"
            print(f"{kind:5} {size / 2**30:6.2f} GiB in {seconds:6.1f} s  {rates}, peak {peak:.0f} MiB", flush=True)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
