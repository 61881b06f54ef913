"""Encoders: hidden states by an independent computation in float64; whole prompts; cuts that change no bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.cluster.client.http import Client
from llamaclust.cluster.client.local import LocalSettings
from llamaclust.core.errors import RequestError
from llamaclust.kernels.backend import Backend, Float32
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.model.pooling import Pooling
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import Chain, batch_of
from support.models.tiny_encoders import ENCODERS, HEADS, LAYERS, build_encoder

Float64 = NDArray[np.float64]
TOKENS = [2, *np.random.default_rng(3).integers(4, 320, 40).tolist(), 3]
_SLOPES = np.array([2.0 ** (-8 * (head + 1) / HEADS) for head in range(HEADS)])


@pytest.fixture(scope="module", params=ENCODERS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoder") / f"{name}.gguf", name)


def encoded(backend: Backend, model: Model, tokens: list[int], cuts: tuple[int, ...] = ()) -> Float32:
    chain = Chain(backend, model, cuts)
    chain.run(batch_of([(tokens, range(len(tokens)), range(-(-len(tokens) // 16)))], outputs=()))
    rows = chain.stages[-1].normed(np.arange(len(tokens), dtype=np.int32))
    chain.close()
    return rows


@pytest.mark.parametrize("backend", [ReferenceBackend, lambda: all_threads(2)], ids=["reference", "cpu"])
def test_hidden_states(backend: Callable[[], Backend], name: str, path: Path) -> None:
    model = Model.open(path)
    wanted = _independent(name, _weights(model), TOKENS)
    np.testing.assert_allclose(encoded(backend(), model, TOKENS), wanted, atol=0.02)


def test_cuts_threads_and_company_change_no_bit(path: Path) -> None:
    model = Model.open(path)
    whole = encoded(all_threads(1), model, TOKENS)
    for threads, cuts in ((2, ()), (1, (1,)), (2, (1, 2))):
        np.testing.assert_array_equal(encoded(all_threads(threads), model, TOKENS, cuts).view("u4"), whole.view("u4"))
    chain = Chain(all_threads(2), model)
    other = [2, 9, 8, 3]
    chain.run(batch_of([(other, range(4), [9]), (TOKENS, range(len(TOKENS)), range(3))], outputs=()))
    rows = chain.stages[-1].normed(np.arange(4, 4 + len(TOKENS), dtype=np.int32))
    np.testing.assert_array_equal(rows.view("u4"), whole.view("u4"))


def test_prompts_longer_than_a_span(path: Path) -> None:
    model = Model.open(path)
    tokens = np.random.default_rng(4).integers(4, 320, 590).tolist()
    limits = LocalSettings(context_length=600, prefill_chunk=600, max_sequences=4)
    with Client.local(path, threads=2, settings=limits) as client:
        found = client.embed([tokens], pooling="cls")[0]
    wanted = encoded_reference(model, tokens)[0]
    assert float(found @ (wanted / np.linalg.norm(wanted))) > 0.9999


def encoded_reference(model: Model, tokens: list[int]) -> Float64:
    return _independent(str(model.file.metadata["general.architecture"]), _weights(model), tokens)


def test_embeddings_in_company_are_those_alone(path: Path) -> None:
    with Client.local(path, threads=1, settings=LocalSettings(context_length=256)) as client:
        prompts = [TOKENS, TOKENS[:7], [2, 3], TOKENS[::-1]]
        together = client.embed(prompts)
        for prompt, vector in zip(prompts, together, strict=True):
            np.testing.assert_array_equal(client.embed([prompt])[0].view("u4"), vector.view("u4"))
        mean = encoded(all_threads(1), Model.open(path), TOKENS).astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(together[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_an_encoder_generates_nothing_and_takes_whole_prompts_only(path: Path) -> None:
    with Client.local(path, threads=1, settings=LocalSettings(context_length=256)) as client:
        with pytest.raises(RequestError, match="is an encoder"):
            client.generate("the man", max_tokens=2)
        with pytest.raises(RequestError, match="context length is 256 tokens"):
            client.embed([[5] * 257])


@pytest.mark.parametrize(
    ("number", "pooling"), [(0, Pooling.NONE), (1, Pooling.MEAN), (2, Pooling.CLS), (3, Pooling.LAST)]
)
def test_the_file_names_the_pooling(number: int, pooling: Pooling, tmp_path: Path) -> None:
    assert Model.open(build_encoder(tmp_path / "bert.gguf", "bert", pooling=number)).pooling is pooling


def _weights(model: Model) -> dict[str, Float64]:
    return {
        name: np.frombuffer(tensor.read(), "<f4").reshape(tensor.shape).astype(np.float64)
        for name, tensor in model.file.tensors.items()
    }


def _independent(name: str, w: Mapping[str, Float64], tokens: list[int]) -> Float64:
    """As the papers have it, all rows at once."""
    count = len(tokens)
    x = w["token_embd.weight"][tokens] + w["token_types.weight"][0]
    if name == "bert":
        x = x + w["position_embd.weight"][:count]
    x = _norm(w, "token_embd_norm", x)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        x = _norm(w, f"{prefix}.attn_output_norm", x + _attention(name, w, prefix, x))
        x = _norm(w, f"{prefix}.layer_output_norm", x + _inner(name, w, prefix, x))
    return x


def _attention(name: str, w: Mapping[str, Float64], prefix: str, x: Float64) -> Float64:
    if name == "nomic-bert":
        q, k, v = np.split(_product(w, f"{prefix}.attn_qkv", x), 3, axis=1)
    else:
        q, k, v = (_product(w, f"{prefix}.attn_{part}", x) for part in "qkv")
    q, k, v = (part.reshape(len(x), HEADS, -1).transpose(1, 0, 2) for part in (q, k, v))
    if name == "nomic-bert":
        q, k = _rotated(q), _rotated(k)
    scores = q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5
    if name == "jina-bert-v2":
        places = np.arange(len(x))
        scores = scores - _SLOPES[:, None, None] * np.abs(places[:, None] - places)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return _product(w, f"{prefix}.attn_output", (shares @ v).transpose(1, 0, 2).reshape(len(x), -1))


def _rotated(x: Float64) -> Float64:
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 1000.0 ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _inner(name: str, w: Mapping[str, Float64], prefix: str, x: Float64) -> Float64:
    up = _product(w, f"{prefix}.ffn_up", x)
    if name == "bert":
        return _product(w, f"{prefix}.ffn_down", _gelu(up))
    gate = _product(w, f"{prefix}.ffn_gate", x)
    activated = gate / (1 + np.exp(-gate)) if name == "nomic-bert" else _gelu(gate)
    return _product(w, f"{prefix}.ffn_down", activated * up)


def _gelu(x: Float64) -> Float64:
    return np.asarray(x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


def _product(w: Mapping[str, Float64], name: str, x: Float64) -> Float64:
    return np.asarray(x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0))


def _norm(w: Mapping[str, Float64], name: str, x: Float64) -> Float64:
    centred: Float64 = x - x.mean(axis=1, keepdims=True)
    scale: Float64 = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-12)
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]
