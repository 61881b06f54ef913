from __future__ import annotations

from typing import Final

START_BYTES: Final = 512

_CONVERT: Final = "convert it with `llamaclust model convert`"
_AGAIN: Final = "download the .gguf file itself"
_UNPACK: Final = "unpack it, and give the path of the .gguf file in it"

_KINDS: Final = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file", "run `git lfs pull`, or download the file"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint", f"{_UNPACK}; for a checkpoint, {_CONVERT}"),
    (b"\x80\x02", "a PyTorch checkpoint", _CONVERT),
    (b"\x89HDF", "a Keras checkpoint (HDF5)", "get the model as GGUF or safetensors"),
    (b"\x1f\x8b", "compressed by gzip", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK),
    (b"\xfd7zXZ", "compressed by xz", _UNPACK),
    (b"BZh", "compressed by bzip2", _UNPACK),
    (b"7z\xbc\xaf", "a 7-Zip archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    *(
        (magic, "a model in GGML's formats before GGUF", "get the model as GGUF")
        for magic in (b"lmgg", b"fmgg", b"tjgg")
    ),
)
_PAGES: Final = (b"<!doctype", b"<html", b"<?xml", b"<head")


def other_kind(start: bytes) -> tuple[str, str]:
    for magic, what, advice in _KINDS:
        if start.startswith(magic):
            return what, advice
    if not start:
        return "empty", f"the download was not finished: {_AGAIN}"
    if not any(start):
        return "filled with zeros", f"the download was not finished: {_AGAIN}"
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if start[8:10] == b'{"':
        return "a safetensors file", _CONVERT
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_PAGES):
        return "a web page", f"{_AGAIN}, on the Hugging Face hub by /resolve/ in place of /blob/ in its address"
    if text.startswith((b"{", b"[")):
        return "text in JSON", f"it may be the error message of a server: {_AGAIN}"
    return f"it begins with {start[:4]!r}", "give the path of a .gguf file"
