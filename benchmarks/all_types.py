"""Speed of one shape in every weight type beside llama.cpp, in turns: a file at a time, gone when it was measured.

    python benchmarks/all_types.py --llama-bench PATH --json types.jsonl [--types Q4_K,Q8_0] [--models DIR]
    python benchmarks/all_types.py --table types.jsonl

The first adds a JSON line a pair to the file; the second prints the table of docs/kernels.md from such a file. Files in
`--models`, named like Q4_K.gguf, are used where they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from compare import Pair, Speed, Task, as_line, check_program, show
from measuring.options import chosen, listed, positive
from shape import LAYOUTS, SHAPES, write_shape

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.errors import UsageError
from llamaclust.kernels import _native
from llamaclust.model.quant_types import ActivationFormat, QuantType
from llamaclust.tools.bench.limits import Spread

_SEGMENTS = {ActivationFormat.F32: "-", ActivationFormat.Q8_32: "32", ActivationFormat.Q8_256: "256"}


_PROMPT, _GENERATE = 256, 32


@contextmanager
def model_of(quant_type: QuantType, shape: str, models: Path | None) -> Iterator[Path]:
    """A file of that type, made for the time it is needed where there is none."""
    if models is not None and (models / f"{quant_type.name}.gguf").exists():
        yield models / f"{quant_type.name}.gguf"
        return
    with TemporaryDirectory(prefix="llamaclust-") as folder:
        path = Path(folder) / f"{quant_type.name}.gguf"
        write_shape(path, shape, SHAPES[shape], quant_type)
        yield path


def measure(given: argparse.Namespace) -> None:
    task = Task(check_program(given.llama_bench), given.threads, _PROMPT, _GENERATE)
    for quant_type in given.types:
        name = quant_type.name
        with model_of(quant_type, given.shape, given.models) as path, given.json.open("a") as file:
            pairs = []
            for _ in range(given.repeats):
                pairs.append(task.pair(path))
                print(as_line(name, task, pairs[-1]), file=file, flush=True)
        show(name, pairs)


def table(path: Path) -> Iterator[str]:
    """The lines of a table in Markdown."""
    by_type = _read(path)
    facts = "type | bits | segment | tile bytes"
    speeds = "tok/s | of limit | llama.cpp | ratio"
    yield f"| {facts} | prefill {speeds} | decode {speeds} |"
    yield "|---" + "|--:" * 11 + "|"
    for name in sorted(by_type, key=[quant_type.name for quant_type in LAYOUTS].index):
        pairs = by_type[name]
        cells = [name, *_facts(QuantType[name]), *_speeds(pairs, "prefill"), *_speeds(pairs, "decode")]
        yield f"| {' | '.join(cells)} |"


def _read(path: Path) -> dict[str, list[Pair]]:
    """Pairs by type. UsageError for a file that `--json` did not write."""
    by_type: dict[str, list[Pair]] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--table {path}: cannot be read: {getattr(error, 'strerror', 'no text')}") from error
    for number, line in enumerate(lines, 1):
        try:
            pair = json.loads(line)
            name = QuantType[pair["model"]].name
            by_type.setdefault(name, []).append(Pair(Speed(**pair["ours"]), Speed(**pair["llama.cpp"])))
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"--table {path}: line {number} is not one that --json writes") from None
    return by_type


def _facts(quant_type: QuantType) -> list[str]:
    """Bits a weight in the file, weights of a segment, resident bytes beside the file's."""
    info, rows, cols = quant_type.info, 16, 2048
    resident = _native.PackedMatrix(quant_type, rows, cols).bytes / (rows * info.row_bytes(cols))
    assert info.activation is not None
    return [f"{8 * info.block_bytes / info.block_size:.4g}", _SEGMENTS[info.activation], f"{resident:.2f}"]


def _speeds(pairs: list[Pair], name: str) -> list[str]:
    ours, theirs = (
        Spread.of(getattr(getattr(pair, program), name) for pair in pairs) for program in ("ours", "theirs")
    )
    share = Spread.of(getattr(pair.ours, f"{name}_share") for pair in pairs)
    ratio = Spread.of(getattr(pair, name) for pair in pairs)
    return [f"{ours.median:.0f}", f"{share.median:.2f}", f"{theirs.median:.0f}", f"{ratio.median:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file")
    parser.add_argument("--llama-bench", type=Path, help="the program of that name")
    parser.add_argument("--json", type=Path, help="add a JSON line a pair to this file")
    types = {quant_type.name: quant_type for quant_type in LAYOUTS}
    parser.add_argument(
        "--types",
        type=listed(chosen("type", types)),
        default=list(LAYOUTS),
        help=f"separated by commas: {', '.join(types)}; all by default, about two minutes each",
    )
    parser.add_argument("--shape", default="1.1b", choices=SHAPES, help="%(default)s by default")
    parser.add_argument("--models", type=Path, help="a folder that holds files of some types already")
    parser.add_argument("--threads", type=positive, default=2, help="%(default)s by default")
    parser.add_argument("--repeats", type=positive, default=2, help="pairs; %(default)s by default")
    given = parser.parse_args()
    if given.table is not None:
        print("\n".join(table(given.table)))
    elif given.llama_bench is None or given.json is None:
        parser.error("to measure, --llama-bench and --json are needed")
    else:
        measure(given)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
