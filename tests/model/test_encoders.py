"""Compares encoders with an independent computation in float64; tests whole prompts and splits of layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cluster.client.http import Client
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.core.errors import ModelFileError, RequestError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Float32
from llamaclust.kernels.cuda.backend import workspace_bytes
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.writer import WritableValue
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.pooling import Pooling
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import Chain, batch_of
from support.arithmetic.encoders import Float64, hidden_states
from support.models.tiny_encoders import ENCODERS, FFN, HIDDEN, RANK, WINDOW, build_encoder, with_fused_gates
from support.models.tiny_model import matrix

TOKENS = [2, *np.random.default_rng(3).integers(4, 320, 40).tolist(), 3]


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
    wanted = hidden_states(name, _weights(model), TOKENS)
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
    return hidden_states(str(model.file.metadata["general.architecture"]), _weights(model), tokens)


def test_jina_2_files_with_gate_and_up_in_one_tensor(tmp_path: Path) -> None:
    model = Model.open(build_encoder(tmp_path / "split.gguf", "jina-bert-v2"))
    fused = Model.open(with_fused_gates(tmp_path / "fused.gguf", model.file))
    assert fused.file.tensor("blk.0.ffn_up.weight").shape == (2 * FFN, HIDDEN)
    for backend in (ReferenceBackend(), all_threads(2)):
        found, wanted = (encoded(backend, each, TOKENS) for each in (fused, model))
        np.testing.assert_array_equal(found.view("u4"), wanted.view("u4"))


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


@pytest.mark.parametrize("name", ["modern-bert", "gemma-embedding"])
def test_windows_of_encoders_give_up_no_keys(name: str, tmp_path: Path) -> None:
    model = Model.open(build_encoder(tmp_path / "windows.gguf", name))
    assert {step.window for step in model.program(0, model.layer_count).kv_layers} == {WINDOW, None}
    assert model.window is None and model.costs(KvType.F16).window is None


@pytest.mark.parametrize(
    ("name", "keys", "without", "message"),
    [
        ("gemma-embedding", {}, "dense_3.weight", "dense_3.weight"),
        ("gemma-embedding", {}, "dense_2.weight", "dense_2.weight"),
        ("gemma-embedding", {"dense_2_feat_out": 77}, "", "dense_2_feat_out': expected 128, found 77"),
        ("gemma-embedding", {"dense_3_feat_out": 32}, "", "dense_3_feat_out': expected 64, found 32"),
        ("gemma-embedding", {"attention.sliding_window": 0}, "", "sliding_window': missing or 0"),
        ("gemma-embedding", {"attention.sliding_window": -4}, "", "sliding_window"),
        ("modern-bert", {"attention.sliding_window": (1 << 30) + 1}, "", "sliding_window"),
        ("modern-bert", {"hidden_activation": "relu"}, "", "hidden_activation': 'relu' is not supported"),
        ("jina-bert-v3", {"attention.causal": True}, "", "attention.causal': True is not supported"),
        ("qwen3", {"attention.causal": False}, "", "attention.causal': False is not supported"),
        ("bert", {"attention.causal": 0}, "", "attention.causal': expected true or false, found '0'"),
        ("nomic-bert-moe", {}, "blk.1.ffn_up_exps.weight", "blk.1.ffn_up_exps.weight"),
        ("nomic-bert-moe", {"moe_every_n_layers": -1}, "", "moe_every_n_layers"),
        ("nomic-bert-moe", {"expert_count": 0, "expert_used_count": 0}, "", "blk.1.ffn_gate_inp.weight"),
        ("nomic-bert-moe", {"expert_used_count": 6}, "", "expert_used_count"),
        ("modern-bert", {"rope.freq_base_swa": 0.0}, "", "freq_base_swa"),
        ("modern-bert", {}, "blk.1.attn_norm.weight", "blk.1.attn_norm.weight"),
        ("jina-bert-v3", {}, "blk.2.layer_output_norm.bias", "blk.2.layer_output_norm.bias"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    name: str, keys: dict[str, WritableValue], without: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=re.escape(message)) as refused:
        Model.open(build_encoder(tmp_path / "bad.gguf", name, keys=keys, without=(without,)))
    assert "\n" not in str(refused.value)


def test_dense_layers_of_another_width_are_refused(tmp_path: Path) -> None:
    narrow = matrix("dense_3", HIDDEN, HIDDEN)
    path = build_encoder(tmp_path / "narrow.gguf", "gemma-embedding", without=(narrow.name,), added=(narrow,))
    with pytest.raises(ModelFileError, match=r"tensor dense_3\.weight: expected shape \[128, 64\], found \[64, 64\]"):
        Model.open(path)


def test_models_without_dense_layers_embed_the_normed_rows(tmp_path: Path) -> None:
    dense = ("dense_2.weight", "dense_3.weight")
    plain = Model.open(build_encoder(tmp_path / "plain.gguf", "gemma-embedding", without=dense))
    whole = Model.open(build_encoder(tmp_path / "whole.gguf", "gemma-embedding"))
    weights = _weights(whole)
    rows = encoded(all_threads(1), plain, TOKENS).astype(np.float64)
    wanted = rows @ weights[dense[0]].T @ weights[dense[1]].T
    np.testing.assert_allclose(encoded(all_threads(1), whole, TOKENS), wanted, atol=1e-4)


@pytest.mark.parametrize(("name", "pooling", "kind"), [("modern-bert", 1, "encoder"), ("qwen3", RANK, "reranker")])
def test_gpus_compute_neither_encoders_nor_rerankers(name: str, pooling: int, kind: str, tmp_path: Path) -> None:
    model = Model.open(build_encoder(tmp_path / "model.gguf", name, pooling=pooling))
    program = model.program(0, model.layer_count)
    with pytest.raises(ModelFileError, match=f"{kind}s are not supported on GPUs; set 'device: cpu' for the workers"):
        workspace_bytes(program, model.tensors_for(program), StageLimits(32, 32, 2, 256, 16))


def test_an_embedding_model_of_qwen3_has_the_last_token_and_its_end(tmp_path: Path) -> None:
    path = build_encoder(tmp_path / "qwen3.gguf", "qwen3", pooling=3, keys={"tokenizer.ggml.add_eos_token": True})
    model = Model.open(path)
    assert model.pooling is Pooling.LAST and model.generates
    tokens = model.tokenizer.encode("the water")
    assert tokens[-1] == model.tokenizer.eos_id
    with Client.local(path, threads=1, settings=LocalSettings(context_length=256)) as client:
        (found,) = client.embed(["the water"])
    row = encoded(all_threads(1), model, tokens)[-1].astype(np.float64)
    np.testing.assert_allclose(found, row / np.linalg.norm(row), atol=1e-6)


def _weights(model: Model) -> dict[str, Float64]:
    return {
        name: np.frombuffer(tensor.read(), "<f4").reshape(tensor.shape).astype(np.float64)
        for name, tensor in model.file.tensors.items()
    }
