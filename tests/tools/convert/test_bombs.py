"""Checks small checkpoints that would take much time or memory."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import LlamaclustError, ModelFileError
from llamaclust.tools.convert.conversion import convert
from llamaclust.tools.convert.formats.hugging_face import read_folder
from llamaclust.tools.convert.formats.opening import Hints
from llamaclust.tools.convert.formats.safe_pickle import read_pickle
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.vocabularies.ranks import read_ranks
from support.models.checkpoint_files import Arrays, write_hugging_face
from support.models.random_checkpoints import checkpoint
from support.models.tiny_tokenizers import tokenizer_json


def test_lists_of_a_pickle_are_not_copied_again_and_again() -> None:
    many, few = b"K\x01" * 100_000, b"X\x01\0\0\0aK\x01\x86" * 50_000
    calls = b"0(" + b"h\x00h\x01\x85R" * 20_000 + b"t."
    with pytest.raises(ModelFileError, match="not a tuple"):
        read_pickle(b"\x80\x02ctorch\nSize\nq\x00]q\x01(" + many + b"e" + calls, "x.bin")
    made = read_pickle(b"\x80\x02ccollections\nOrderedDict\nq\x00]q\x01(" + few + b"e" + calls, "x.bin")
    assert made[0] == {"a": 1} and not any(made[1:])


def test_very_many_long_words_are_refused_before_their_merges_are_looked_for() -> None:
    words = [bytes([byte]) for byte in range(256)] + [b"%04d" % number * 250 for number in range(100)]
    lines = [base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)]
    with pytest.raises(ModelFileError, match="words are too long to compute their merges"):
        read_ranks(Path("x.tiktoken"), b"".join(lines))


def folder(path: Path) -> Path:
    config, tensors = checkpoint("LlamaForCausalLM")
    write_hugging_face(path, config, tensors)
    (path / "tokenizer.json").write_text(tokenizer_json())
    return path


def converted(source: Path, out: Path) -> None:
    convert(source, out, "f32", Hints(), lambda done, total: None, None)


@pytest.mark.parametrize("file", ["tokenizer.json", "added_tokens.json"])
def test_ids_far_beyond_any_vocabulary_make_no_words(file: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "m") / file
    said = json.loads(path.read_text()) if path.exists() else {}
    (said["model"]["vocab"] if path.exists() else said)["far"] = (1 << 24) - 1
    path.write_text(json.dumps(said))
    with pytest.raises(LlamaclustError, match=r"below 1048576|has id 16777215"):
        converted(path.parent, tmp_path / "out.gguf")


def test_a_scale_for_more_columns_than_there_are(tmp_path: Path) -> None:
    """Checks scales of huge blocks, which would take terabytes if they were repeated for every column."""
    rows = 1 << 16
    said = {"quant_method": "fp8", "weight_block_size": [1, 1 << 20]}
    tensors: Arrays = {
        "m.weight": np.full((rows, 2), 0x38, np.uint8),
        "m.weight_scale_inv": np.full((rows, 1), 2, np.float32),
    }
    write_hugging_face(tmp_path / "m", {"architectures": ["X"], "quantization_config": said}, tensors)
    with SourceFiles() as files:
        assert (read_folder(files, tmp_path / "m").tensors["m.weight"].all() == 2).all()
