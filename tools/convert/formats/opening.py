"""Detects a checkpoint's format by its contents, and reads the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llamaclust.core.errors import ModelFileError, UsageError
from llamaclust.tools.convert.formats import hugging_face, meta
from llamaclust.tools.convert.formats.llama2c import is_llama2c, read_llama2c
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.settings import Checkpoint

_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Hints:
    """The user's options for data that a checkpoint may lack: tokenizer, configuration and context length."""

    tokenizer: Path | None = None
    config: Path | None = None
    context_length: int | None = None

    def check(self, kind: str, *, config: bool = False, context_length: bool = False) -> None:
        if self.config is not None and not config:
            raise UsageError(f"--config {self.config} is only for TencentPretrain's files, but the source is {kind}")
        if self.context_length is not None and not context_length:
            raise UsageError(
                f"--context-length {self.context_length} is not for {kind}, which states its own context length"
            )


def open_checkpoint(files: SourceFiles, path: Path, hints: Hints) -> Checkpoint:
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder; check the path")
    if not path.is_dir():
        return _file(files, path, hints)
    if (path / hugging_face.CONFIG).is_file():
        hints.check("a folder in Hugging Face's format")
        return hugging_face.read_folder(files, path)
    if (path / meta.PARAMS).is_file():
        hints.check("a folder in Meta's format", context_length=True)
        return meta.read_meta(files, path, hints.context_length)
    what = f"neither {hugging_face.CONFIG} (Hugging Face's format) nor {meta.PARAMS} (Meta's format)"
    raise ModelFileError(f"{path} is not a checkpoint: the folder has {what}")


def _file(files: SourceFiles, path: Path, hints: Hints) -> Checkpoint:
    file = files.open(path)
    if file.size_bytes >= 4 and file.read(0, 4) == _ZIP:
        tensors = hugging_face.read_weight_file(files, path)
        if meta.is_tencent_pretrain(tensors):
            return meta.read_tencent_pretrain(files, path, tensors, hints.config, hints.context_length)
        raise file.error("PyTorch weights without their folder: give the folder that has config.json or params.json")
    if path.suffix == ".safetensors":
        raise file.error("weights without their folder: give the folder that has config.json")
    if is_llama2c(file):
        hints.check("a llama2.c file")
        return read_llama2c(files, path)
    if file.size_bytes >= 4 and file.read(0, 4) == b"GGUF":
        raise file.error(
            "is already a GGUF file: run it without conversion, or make it smaller with `llamaclust model quantize`"
        )
    raise file.error("not a checkpoint of a known kind: neither a PyTorch file nor a llama2.c file")
