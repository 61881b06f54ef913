"""Tests of architectures whose norms subtract the mean: refused files, and generation from file to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.client.http import Client
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.core.errors import LlamaclustError, ModelFileError
from llamaclust.model.loader import Model
from llamaclust.model.program import AddPosition, LayerNorm, MatMul, RmsNorm, Rope
from support.models import tiny_architectures
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import RandomTensor, source_of


def changed(path: Path, name: str, monkeypatch: pytest.MonkeyPatch, **shapes: Any) -> Path:
    """Builds a model with other shapes of tensors; None removes a tensor."""

    def other(tensor: RandomTensor, *rest: Any, **named: Any) -> Any:
        key = tensor.name.replace(".", "__")
        shape = shapes.get(key, tensor.shape)
        if shape is None:
            return source_of(RandomTensor("unused.weight", (1,), 1.0), *rest, **named)
        return source_of(RandomTensor(tensor.name, shape, tensor.deviation, tensor.mean), *rest, **named)

    monkeypatch.setattr(tiny_architectures, "source_of", other)
    return build_architecture(path, name)


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("gpt2", "position_embd__weight", (2047, 64)),
        ("gpt2", "position_embd__weight", None),
        ("gpt2", "blk__1__attn_norm__bias", None),
        ("gpt2", "blk__2__ffn_up__bias", None),
        ("falcon-two-norms", "blk__0__attn_norm_2__bias", (63,)),
        ("starcoder2", "output_norm__bias", None),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tensor: str, shape: Any
) -> None:
    path = changed(tmp_path / "m.gguf", name, monkeypatch, **{tensor: shape})
    with pytest.raises(ModelFileError, match=tensor.replace("__", ".")):
        Model.open(path)


def test_positions_are_as_many_as_were_learned(tmp_path: Path) -> None:
    path = build_architecture(tmp_path / "m.gguf", "gpt2")
    model = Model.open(path)
    assert model.program(0, 1, context_tokens=2048)
    with pytest.raises(ModelFileError, match="fewer than the context of 2049 tokens; set context_length"):
        model.program(0, 1, context_tokens=2049)
    with pytest.raises(LlamaclustError, match="context_length is 4096"):
        Client.local(path, 1, settings=LocalSettings(context_length=4096))


@pytest.mark.parametrize(("name", "norms"), [("falcon", 1), ("falcon-two-norms", 2), ("gpt2", 2)])
def test_the_steps_of_a_layer(tmp_path: Path, name: str, norms: int) -> None:
    model = Model.open(build_architecture(tmp_path / "m.gguf", name))
    steps = model.program(1, 2).steps
    assert sum(isinstance(step, LayerNorm) for step in steps) == norms
    assert not any(isinstance(step, RmsNorm | AddPosition) for step in steps)
    assert any(isinstance(step, Rope) for step in steps) == (name != "gpt2")
    assert sum(isinstance(step, MatMul) for step in steps) == 4
    assert sum(isinstance(step, AddPosition) for step in model.program(0, 1).steps) == (name == "gpt2")


@pytest.mark.parametrize("name", ["falcon", "gpt2", "starcoder2"])
def test_answers_of_a_model_in_this_process(tmp_path: Path, name: str) -> None:
    path = build_architecture(tmp_path / "m.gguf", name)
    with Client.local(path, 1) as one, Client.local(path, 2, "generic") as other:
        replies = [client.generate("Hello", max_tokens=8, seed=1, temperature=0.8) for client in (one, other)]
    assert replies[0].token_ids == replies[1].token_ids and replies[0].logprobs == replies[1].logprobs
