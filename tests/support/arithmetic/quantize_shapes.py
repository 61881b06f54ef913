"""Small models of several architectures for the choice of quant types. Recorder of llama-quantize's choices:

python tests/support/arithmetic/quantize_shapes.py LLAMA_QUANTIZE > tests/data/quantize/choices.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.quantize.mixes import MIXES


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's matrices, with `width` columns and few rows: quant types depend on names, widths and counts."""

    layers: int
    heads: int
    kv_heads: int
    width: int = 256
    experts: int = 0
    tied: bool = False
    architecture: str = "llama"
    fused: bool = False  # Q, K and V in one matrix, and no gate


SHAPES = {
    "plain": Shape(16, 4, 4),
    "shared values": Shape(16, 8, 2),
    "tied": Shape(17, 4, 2, tied=True),
    "narrow": Shape(8, 4, 4, width=288),
    "eight experts": Shape(16, 8, 2, experts=8),
    "four experts": Shape(8, 4, 4, experts=4),
    "70b": Shape(80, 8, 1),
    "qwen2": Shape(9, 6, 2, architecture="qwen2", tied=True),
    "falcon": Shape(32, 8, 1, architecture="falcon", fused=True),
    "falcon tied": Shape(19, 4, 2, architecture="falcon", fused=True, tied=True),
    "falcon narrow": Shape(16, 4, 4, width=288, architecture="falcon", fused=True),
}


def write_shape(path: Path, shape: Shape) -> Path:
    """Writes a model of F16 zeros."""
    key = shape.architecture
    metadata: dict[str, WritableValue] = {
        "general.architecture": key,
        f"{key}.context_length": 64,
        f"{key}.embedding_length": shape.width,
        f"{key}.block_count": shape.layers,
        f"{key}.feed_forward_length": shape.width,
        f"{key}.attention.head_count": shape.heads,
        f"{key}.attention.head_count_kv": shape.kv_heads,
        f"{key}.attention.layer_norm_{'' if shape.fused else 'rms_'}epsilon": 1e-5,
        f"{key}.rope.dimension_count": shape.width // shape.heads,
    }
    if shape.experts:
        metadata |= {f"{key}.expert_count": shape.experts, f"{key}.expert_used_count": 2}
    write_gguf(path, metadata, [_zeros(name, size) for name, size in _tensors(shape)])
    return path


def _zeros(name: str, size: tuple[int, ...]) -> TensorSource:
    kind = QuantType.F32 if len(size) == 1 else QuantType.F16
    return TensorSource(name, kind, size, lambda: bytes(int(np.prod(size)) * kind.info.block_bytes))


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = shape.width
    yield "token_embd.weight", (4, width)
    yield "output_norm.weight", (width,)
    if not shape.tied:
        yield "output.weight", (4, width)
    for layer in range(shape.layers):
        for part in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{part}.weight", (width,)
        for part in (("attn_qkv",) if shape.fused else ("attn_q", "attn_k", "attn_v")) + ("attn_output",):
            yield f"blk.{layer}.{part}.weight", (2, width)
        if shape.experts:
            yield f"blk.{layer}.ffn_gate_inp.weight", (shape.experts, width)
        for part in ("ffn_up", "ffn_down") if shape.fused else ("ffn_gate", "ffn_up", "ffn_down"):
            name = f"blk.{layer}.{part}"
            if shape.experts:
                yield f"{name}_exps.weight", (shape.experts, 2, width)
            else:
                yield f"{name}.weight", (2, width)


def grouped(types: dict[str, str]) -> dict[str, str]:
    """Groups types by part: `attn_v` -> `Q6_K*2 Q4_K*3`, in layer order; other tensors keep their names."""
    parts: dict[str, list[list[str]]] = {}
    for name, kind in sorted(types.items(), key=lambda item: _order(item[0])):
        runs = parts.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", name), [])
        if runs and runs[-1][0] == kind:
            runs[-1].append(kind)
        else:
            runs.append([kind])
    return {part: " ".join(f"{run[0]}*{len(run)}" for run in runs) for part, runs in parts.items()}


def _order(name: str) -> tuple[int, str]:
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)


def _record(program: str) -> dict[str, dict[str, dict[str, str]]]:
    """Returns shape -> mix (with `+` if an importance matrix changes the types) -> types of matrices by part."""
    from llamaclust.model.imatrix import Importance, ImportanceMatrix, write_imatrix

    recorded: dict[str, dict[str, dict[str, str]]] = {}
    with TemporaryDirectory() as folder:
        for title, shape in SHAPES.items():
            model = write_shape(Path(folder, "model.gguf"), shape)
            matrix = Path(folder, "matrix.gguf")
            ones = {
                name: Importance(
                    np.ones((size[0] if len(size) == 3 else 1, size[-1]), np.float32),
                    np.ones(size[0] if len(size) == 3 else 1, np.float32),
                )
                for name, size in _tensors(shape)
                if len(size) > 1
            }
            write_imatrix(matrix, ImportanceMatrix(ones, 1, 64, ("none",)))
            for mix in MIXES:
                for mark, more in (("", []), ("+", ["--imatrix", str(matrix)])):
                    said = subprocess.run(
                        [program, "--dry-run", *more, str(model), mix], capture_output=True, text=True, check=True
                    )
                    lines = re.findall(r"\] +(\S+) +- \[.*?\], type = +(\w+), size = .*", said.stdout + said.stderr)
                    full = re.findall(r"\] +(\S+) +- .*?\((\w+)\)$", said.stdout + said.stderr, re.MULTILINE)
                    types = {name: kind.upper() for name, kind in lines} | {n: k.upper() for n, k in full}
                    chosen = grouped({name: kind for name, kind in types.items() if "_norm" not in name})
                    if chosen != recorded.setdefault(title, {}).get(mix):
                        recorded[title][mix + mark] = chosen
    return recorded


if __name__ == "__main__":
    print(json.dumps(_record(sys.argv[1]), indent=0, sort_keys=True))
