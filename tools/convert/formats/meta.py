"""Reads Meta's folders: params.json, tokenizer.model, and files consolidated.NN.pth, each with a part of every matrix.
Also reads TencentPretrain's LLaMA checkpoints (a PyTorch file and a JSON configuration), with Meta's tensor names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.json_file import read_json
from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.formats.torch_files import read_torch
from llamaclust.tools.convert.lazy import Lazy, below, beside
from llamaclust.tools.convert.settings import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, Checkpoint

PARAMS: Final = "params.json"
_PART: Final = re.compile(r"consolidated\.(\d\d)\.pth")
_ROWS: Final = re.compile(r"output|layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])")
_COLUMNS: Final = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)")
_EMBEDDING: Final = "tok_embeddings"

_TENCENT_EMBEDDING: Final = "embedding.word.embedding.weight"
_TENCENT_ENDS: Final = {
    _TENCENT_EMBEDDING: "tok_embeddings.weight",
    "encoder.layer_norm.weight": "norm.weight",
    "target.lm.output_layer.weight": "output.weight",
}
_TENCENT_LAYER: Final = re.compile(r"encoder\.transformer\.(\d+)\.(.*)\.weight")
_TENCENT_PARTS: Final = {
    "self_attn.linear_layers.0": "attention.wq",
    "self_attn.linear_layers.1": "attention.wk",
    "self_attn.linear_layers.2": "attention.wv",
    "self_attn.final_linear": "attention.wo",
    "feed_forward.linear_gate": "feed_forward.w1",
    "feed_forward.linear_1": "feed_forward.w3",
    "feed_forward.linear_2": "feed_forward.w2",
    "layer_norm_1": "attention_norm",
    "layer_norm_2": "ffn_norm",
}
_TENCENT_SETTINGS: Final = {
    "rotary_position_embedding": True,
    "feed_forward": "gated",
    "layernorm": "rms",
    "layernorm_positioning": "pre",
    "hidden_act": "silu",
}


def read_meta(files: SourceFiles, folder: Path, context_length: int | None) -> Checkpoint:
    """Reads a folder in Meta's format. If `context_length` is None, it is read or inferred from params.json."""
    path = folder / PARAMS
    params = Settings(read_json(path), str(path))
    width = params.count("dim")
    tensors = _merged(files, _parts(folder), width)
    values = _settings(params, width, tensors, context_length)
    return Checkpoint(
        family="Meta",
        settings=Settings(values, str(path)),
        tensors=tensors,
        vocabulary=_tokenizer(folder),
        name=folder.resolve().name,
    )


def _parts(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name))
    numbers = [int(path.name.split(".")[1]) for path in found]
    if not found or numbers != list(range(len(found))):
        there = ", ".join(path.name for path in found[:4]) or "none"
        raise ModelFileError(f"{folder}: expected consolidated.00.pth, consolidated.01.pth and so on, found {there}")
    return found


def _merged(files: SourceFiles, parts: list[Path], width: int) -> dict[str, Lazy]:
    shards = [read_torch(files.open(path), files.recent) for path in parts]
    for path, shard in zip(parts, shards, strict=True):
        if shard.keys() != shards[0].keys():
            strange = sorted(shard.keys() ^ shards[0].keys())[0]
            raise ModelFileError(f"{path}: tensor {shown(strange)} is not in every .pth file; copy all of them again")
    return {name: _joined(name, [shard[name] for shard in shards], width) for name in shards[0]}


def _joined(name: str, parts: list[Lazy], width: int) -> Lazy:
    stem = name.removesuffix(".weight")
    first = parts[0]
    if len(parts) == 1 or not (_ROWS.fullmatch(stem) or _COLUMNS.fullmatch(stem) or stem == _EMBEDDING):
        return first  # The tensor is a norm, and every file has all of it.
    strange = next((part for part in parts if part.shape != first.shape or len(part.shape) != 2), None)
    if strange is not None:
        raise ModelFileError(
            f"{strange.origin}: expected shape {list(first.shape)} as in the first file, found {list(strange.shape)}"
        )
    by_columns = first.shape[1] * len(parts) == width if stem == _EMBEDDING else _COLUMNS.fullmatch(stem)
    return beside(parts) if by_columns else below(parts)


def _settings(params: Settings, width: int, tensors: dict[str, Lazy], context_length: int | None) -> dict[str, Any]:
    heads = params.count("n_heads", maximum=MAX_HEADS)
    values: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": params.count("n_layers", maximum=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": params.count("n_kv_heads", default=heads, maximum=heads),
        "rms_norm_eps": params.real("norm_eps", default=1e-5, minimum=1e-12, maximum=0.1),
        "rope_theta": params.real("rope_theta", default=10000.0, minimum=1.0),
        "intermediate_size": _rows(tensors, "layers.0.feed_forward.w1.weight", params),
        "vocab_size": _rows(tensors, f"{_EMBEDDING}.weight", params),
    }
    if params.flag("use_scaled_rope"):
        factor = params.real("rope_scaling_factor", default=8.0, minimum=1.0)
        values["rope_scaling"] = {"rope_type": "llama3", "factor": factor}
    values["max_position_embeddings"] = context_length or _context(params, values)
    return values


def _rows(tensors: dict[str, Lazy], name: str, params: Settings) -> int:
    if name not in tensors:
        raise ModelFileError(f"{Path(params.origin).parent}: tensor {shown(name)} is missing")
    return tensors[name].shape[0]


def _context(params: Settings, values: dict[str, Any]) -> int:
    """Returns the context length, which is inferred from other settings if params.json lacks it."""
    if params.has("max_seq_len"):
        return params.count("max_seq_len", maximum=MAX_CONTEXT)
    if "rope_scaling" in values:
        return 131072
    by_base = {500000.0: 8192, 1000000.0: 16384}
    return by_base.get(values["rope_theta"], 4096 if values["rms_norm_eps"] > 5e-6 else 2048)


def _tokenizer(folder: Path) -> Path:
    """Returns the path of tokenizer.model in the folder, or in its parent, where Meta's download script puts it."""
    above = folder.resolve().parent / "tokenizer.model"
    return above if not (folder / "tokenizer.model").is_file() and above.is_file() else folder / "tokenizer.model"


def is_tencent_pretrain(tensors: Mapping[str, Lazy]) -> bool:
    return _TENCENT_EMBEDDING in tensors and any(_TENCENT_LAYER.fullmatch(name) for name in tensors)


def read_tencent_pretrain(
    files: SourceFiles, path: Path, tensors: Mapping[str, Lazy], config: Path | None, context_length: int | None
) -> Checkpoint:
    """Reads a TencentPretrain checkpoint. `config` is its configuration, such as models/llama/7b_config.json."""
    place = config or path.with_suffix(".json")
    if not place.is_file():
        raise ModelFileError(
            f"{path}: the file does not state the number of heads; name the model's configuration with --config"
        )
    stated = Settings(read_json(place), str(place))
    for name, wanted in _TENCENT_SETTINGS.items():
        if stated.values.get(name, wanted) != wanted:
            raise stated.error(name, f"{stated.shown(name)} is not supported; LLaMA has {wanted!r}")
    renamed = {_meta_name(name, path): tensor for name, tensor in tensors.items()}
    values = _tencent_settings(stated, renamed, path, context_length)
    return Checkpoint("Meta", Settings(values, str(place)), renamed, path.with_name("tokenizer.model"), path.stem)


def _meta_name(name: str, path: Path) -> str:
    if name in _TENCENT_ENDS:
        return _TENCENT_ENDS[name]
    found = _TENCENT_LAYER.fullmatch(name)
    if found is None or found[2] not in _TENCENT_PARTS:
        raise ModelFileError(f"{path}: tensor {shown(name)}: TencentPretrain's LLaMA has no such tensor")
    return f"layers.{int(found[1])}.{_TENCENT_PARTS[found[2]]}.weight"


def _tencent_settings(
    stated: Settings, tensors: Mapping[str, Lazy], path: Path, context_length: int | None
) -> dict[str, Any]:
    width, heads = stated.count("hidden_size", "emb_size"), stated.count("heads_num", maximum=MAX_HEADS)
    key = tensors.get("layers.0.attention.wk.weight")
    if key is None:
        raise ModelFileError(f"{path}: the first layer's matrix of keys is missing")
    head = max(1, width // heads)
    return {
        "hidden_size": width,
        "intermediate_size": stated.count("feedforward_size"),
        "num_hidden_layers": stated.count("layers_num", maximum=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": key.shape[0] // head,
        "vocab_size": tensors["tok_embeddings.weight"].shape[0],
        "max_position_embeddings": context_length or stated.count("max_seq_length", default=2048, maximum=MAX_CONTEXT),
        "rms_norm_eps": stated.real("layernorm_eps", "rms_norm_eps", default=1e-6, minimum=1e-12, maximum=0.1),
        "rope_theta": stated.real("rope_theta", default=10000.0, minimum=1.0),
    }
