"""Compares the quantizations of a model: size, perplexity, KL divergence from the unquantized one, speed.

    python benchmarks/models/quantized.py smollm2-135m-instruct TEXT [--hidden 768] [--chunks 8] [--types Q4_K_M,Q6_K]

The model is padded with zeros first (`padded.py`), so that all types fit. The importance matrix, which every type gets,
comes from the second half of TEXT; the first chunks are what is predicted. `fall back` is the share of matrices that
get another type than the mix asks for where the model is not padded. Prints a table in Markdown; speeds are of
`llamaclust bench`, in parts of F16's in the same minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padded import write_padded

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.tools.quantize.mixes import MIXES
from llamaclust.tools.quantize.type_choice import Wishes, choose_types, is_kept

_DEADLINE_S = 900


@dataclass(frozen=True, slots=True)
class Row:
    mix: str
    mib: float
    bits: float  # of each weight
    fall_back: float  # share of matrices
    perplexity: float
    kld: float
    same_top: float  # share of tokens
    decode: float | None  # tok/s beside F16's; None: not measured
    prefill: float | None

    def __str__(self) -> str:
        quality = f"{self.perplexity:.2f} | {self.kld:.4f} | {100 * self.same_top:.1f} %"
        speed = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in (self.decode, self.prefill))
        return f"| {self.mix} | {self.mib:.0f} | {self.bits:.2f} | {100 * self.fall_back:.0f} % | {quality} | {speed} |"


def llamaclust(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "llamaclust", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def json_of(*arguments: str | Path) -> Any:
    return json.loads(llamaclust(*arguments, "--json"))


def fall_back(narrow: ModelFile, wide: ModelFile, mix: str) -> float:
    """Matrices whose type depends on how wide the model is."""
    matrices = [name for name, tensor in narrow.tensors.items() if not is_kept(name, tensor.shape)]
    here, there = (choose_types(model, Wishes(MIXES[mix], has_importance=True)) for model in (narrow, wide))
    return sum(here[name] != there[name] for name in matrices) / len(matrices)


def speeds(model: Path, base: Path) -> tuple[float, float]:
    """Decode and prefill, in parts of the other model's."""
    one, other = (json_of("bench", path, "-p", "256", "-n", "48") for path in (model, base))
    decode, prefill = (one[phase]["tok_s"] / other[phase]["tok_s"] for phase in ("decode", "prefill"))
    return decode, prefill


@dataclass(frozen=True, slots=True)
class Bench:
    narrow: ModelFile
    padded: Path
    matrix: Path
    logits: Path
    speed: bool

    def row(self, mix: str, folder: Path) -> Row:
        path = folder / f"{mix}.gguf"
        llamaclust("model", "quantize", self.padded, path, mix, "--imatrix", self.matrix)
        comparing = ("--kl-divergence", "--kl-divergence-base", self.logits)
        found = json_of("model", "perplexity", path, *comparing)
        decode, prefill = speeds(path, self.padded) if self.speed else (None, None)
        model = open_model(path)
        weights = sum(tensor.rows * tensor.shape[-1] for tensor in model.tensors.values())
        row = Row(
            mix=mix,
            mib=path.stat().st_size / (1 << 20),
            bits=8 * sum(tensor.n_bytes for tensor in model.tensors.values()) / weights,
            fall_back=fall_back(self.narrow, open_model(self.padded), mix),
            perplexity=found["perplexity"],
            kld=found["kld"][0],
            same_top=found["same_top"][0],
            decode=decode,
            prefill=prefill,
        )
        path.unlink()
        return row


@dataclass(frozen=True, slots=True)
class PaddedModels:
    """A padded model in F16, what it makes of a text, and which of its weights matter."""

    narrow: Path
    padded: Path
    matrix: Path
    logits: Path
    perplexity: float

    @classmethod
    def of(cls, name: str, hidden: int, text: Path, chunks: int, folder: Path) -> PaddedModels:
        narrow, padded = resolve_model(name), folder / "padded.gguf"
        write_padded(narrow, padded, hidden)
        words = text.read_text()
        half = folder / "half.txt"
        half.write_text(words[len(words) // 2 :])
        matrix, logits = folder / "imatrix.gguf", folder / "logits"
        llamaclust("model", "imatrix", padded, "-f", half, "-o", matrix, "--chunks", "32")
        keeping = ("--chunks", str(chunks), "--kl-divergence-base", logits)
        base = json_of("model", "perplexity", padded, "-f", text, *keeping)
        return cls(narrow, padded, matrix, logits, base["perplexity"])


def measure(given: argparse.Namespace, folder: Path) -> None:
    made = PaddedModels.of(given.model, given.hidden, given.text, given.chunks, folder)
    print(f"F16: {made.padded.stat().st_size / (1 << 20):.0f} MiB, perplexity {made.perplexity:.2f}\n")
    print("| TYPE | MiB | bits | fall back | perplexity | KL divergence | same top | decode | prefill |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    bench = Bench(open_model(made.narrow), made.padded, made.matrix, made.logits, not given.no_speed)
    for mix in given.types.split(","):
        print(bench.row(mix, folder), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="catalog name or path")
    parser.add_argument("text", type=Path)
    parser.add_argument("--hidden", type=int, default=768, help="width after padding; 768 by default")
    parser.add_argument("--chunks", type=int, default=8, help="of 512 tokens that are predicted; 8 by default")
    parser.add_argument("--types", default=",".join(MIXES), help="all mixes by default")
    parser.add_argument("--no-speed", action="store_true", help="leave the last two columns out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder:
        measure(given, Path(folder))


if __name__ == "__main__":
    main()
