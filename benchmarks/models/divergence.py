"""Effect of quantizing on a model's predictions, beside llama-quantize: KL divergence from the unquantized model of
the files that both make, token by token over the same text.

    python benchmarks/models/divergence.py smollm2-135m-instruct TEXT --llama-quantize PROGRAM [--types Q4_0]

The model is padded with zeros first (`padded.py`), so that all types fit. `+`: both get the same importance matrix,
from the second half of TEXT; the first chunks are what is predicted. Both files run in our kernels. The ratio's
standard error is that of pairs of tokens; that the files have tensors of the same types is checked.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from quantized import PaddedModels, llamaclust

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.loader import Model
from llamaclust.tools.evaluate.logit_scores import measure_divergence
from llamaclust.tools.evaluate.logits_file import LogitsFile
from llamaclust.tools.quantize.mixes import MIXES
from llamaclust.tools.quantize.type_choice import Wishes, choose_types, needs_importance

Float64 = NDArray[np.float64]

_SAME = {"F32", "F16", "BF16"}
"""Written alike by both: nothing is chosen."""
_DEADLINE_S = 1800


def divergences(model: Path, logits: Path) -> Float64:
    """Of every scored token from the model whose logits are in the file."""
    base = LogitsFile.open(logits)
    with closing(Model.open(model)) as opened:
        tokenizer = opened.tokenizer
    context, chunks = base.shape.context, base.shape.chunks
    settings = LocalSettings(context_length=context, max_sequences=1, prefix_cache=False, kv_blocks=context // 16 + 2)
    with LocalClient(model, None, settings=settings) as client:
        return measure_divergence(client, tokenizer, base, chunks, lambda done, mean: None).scores.kld


def ratio(ours: Float64, theirs: Float64) -> tuple[float, float]:
    """Of the two means, and its standard error: both read the same tokens."""
    value = float(ours.mean() / theirs.mean())
    apart = ours - value * theirs
    return value, float(apart.std() / theirs.mean() / np.sqrt(apart.size))


@dataclass(frozen=True, slots=True)
class Comparison:
    made: PaddedModels
    program: Path  # llama-quantize
    folder: Path

    def row(self, mix: str, weighted: bool) -> str:
        ours, theirs = self.folder / "ours.gguf", self.folder / "theirs.gguf"
        given = ("--imatrix", str(self.made.matrix)) if weighted else ()
        llamaclust("model", "quantize", self.made.padded, ours, mix, *given)
        command = [str(self.program), *given, str(self.made.padded), str(theirs), mix]
        subprocess.run(command, check=True, capture_output=True, timeout=_DEADLINE_S)
        _check_same_types(ours, theirs)
        one, other = (divergences(path, self.made.logits) for path in (ours, theirs))
        value, error = ratio(one, other)
        name = mix + "+" * weighted
        return f"{name:10}{one.mean():10.4f}{other.mean():10.4f}{value:8.3f} +/- {error:.3f}"


def _check_same_types(ours: Path, theirs: Path) -> None:
    one, other = (
        {name: tensor.quant_type for name, tensor in open_model(path).tensors.items()} for path in (ours, theirs)
    )
    differ = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    if differ:
        sys.exit(f"{len(differ)} tensors have other types than llama-quantize's, the first {min(differ)}")


def wanted(model: Path, mixes: list[str]) -> list[tuple[str, bool]]:
    """Each mix without an importance matrix, where the model goes without one, and with one."""
    changing = [mix for mix in mixes if mix not in _SAME]
    return [(mix, weighted) for mix in changing for weighted in (False, True) if weighted or _goes_without(model, mix)]


def _goes_without(model: Path, mix: str) -> bool:
    types = choose_types(open_model(model), Wishes(MIXES[mix]))
    return not any(needs_importance(name, kind, MIXES[mix]) for name, kind in types.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="catalog name or path")
    parser.add_argument("text", type=Path)
    parser.add_argument("--llama-quantize", type=Path, metavar="PROGRAM", required=True)
    parser.add_argument("--hidden", type=int, default=768, help="width after padding; 768 by default")
    parser.add_argument("--chunks", type=int, default=8, help="of 512 tokens that are predicted; 8 by default")
    parser.add_argument("--types", default=",".join(MIXES), help="all mixes by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder:
        made = PaddedModels.of(given.model, given.hidden, given.text, given.chunks, Path(folder))
        print(f"KL divergence over {given.chunks} chunks\nTYPE            ours    theirs   ratio")
        comparison = Comparison(made, given.llama_quantize, Path(folder))
        for mix, weighted in wanted(made.padded, given.types.split(",")):
            print(comparison.row(mix, weighted), flush=True)


if __name__ == "__main__":
    main()
