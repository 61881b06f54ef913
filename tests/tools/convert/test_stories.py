"""Checks that a trained model in the formats of five programs becomes the same GGUF file, which generates its story."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamaclust import Client
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.tools.convert.conversion import convert
from llamaclust.tools.convert.formats.opening import Hints
from support.models.stories15m import (
    Weights,
    as_hugging_face,
    as_meta,
    as_tencent_pretrain,
    read_weights,
    sentence_piece_bytes,
    stories15m,
    version_one_bytes,
)

STORY = (
    ", there was a little girl named Lily. She loved to play outside in the sunshine. One day, she saw a big, red ball"
)


@pytest.fixture(scope="module")
def story_file() -> Path:
    return stories15m()


@pytest.fixture(scope="module")
def original(story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """Returns the GGUF converted from llama2.c's file."""
    path = tmp_path_factory.mktemp("stories") / "stories.gguf"
    return converted(story_file, path)


@pytest.fixture(scope="module")
def weights(story_file: Path) -> tuple[dict[str, int], Weights]:
    return read_weights(story_file)


def converted(source: Path, path: Path, tokenizer: Path | None = None, type_name: str = "f32") -> ModelFile:
    done = convert(source, path, type_name, Hints(tokenizer=tokenizer), lambda done, total: None, None)
    assert done.path == path and not list(path.parent.glob(".*"))
    return open_model(path)


def assert_same(found: ModelFile, wanted: ModelFile, *, besides: frozenset[str] = frozenset()) -> None:
    assert found.tensors.keys() - besides == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert found.tensors[name].read() == tensor.read(), name
    for key in ("tokens", "token_type", "scores"):
        np.testing.assert_array_equal(found.metadata[f"tokenizer.ggml.{key}"], wanted.metadata[f"tokenizer.ggml.{key}"])
    numbers = {key: value for key, value in wanted.metadata.items() if key.startswith("llama.")}
    assert {key: found.metadata[key] for key in numbers} == numbers


def test_the_story_is_told(original: ModelFile, weights: tuple[dict[str, int], Weights]) -> None:
    embedding = original.tensors["token_embd.weight"].read()
    assert embedding == weights[1]["tok_embeddings.weight"].tobytes()
    with Client.local(original.path) as client:
        reply = client.generate("Once upon a time", max_tokens=32, temperature=0.0)
    assert reply.text.startswith(STORY)
    tokenizer = load_tokenizer(original.metadata)
    assert tokenizer.encode("Once upon a time") == [1, 9038, 2501, 263, 931]  # the ids of LLaMA's tokenizer


def test_hugging_face_s_form_gives_the_same_file(
    original: ModelFile, weights: tuple[dict[str, int], Weights], story_file: Path, tmp_path: Path
) -> None:
    words = story_file.with_name("tokenizer.bin")
    whole = as_hugging_face(tmp_path / "whole", *weights, shards=3)
    assert_same(converted(whole, tmp_path / "a.gguf", words), original)
    as_hugging_face(tmp_path / "torch", *weights, torch=True)
    (tmp_path / "torch/tokenizer.model").write_bytes(sentence_piece_bytes(words))
    assert_same(converted(tmp_path / "torch", tmp_path / "b.gguf"), original)


def test_meta_s_form_in_two_parts_gives_the_same_file(
    original: ModelFile, weights: tuple[dict[str, int], Weights], story_file: Path, tmp_path: Path
) -> None:
    folder = as_meta(tmp_path / "meta", *weights)
    (tmp_path / "tokenizer.model").write_bytes(sentence_piece_bytes(story_file.with_name("tokenizer.bin")))
    path = tmp_path / "c.gguf"
    done = convert(folder, path, "f32", Hints(context_length=weights[0]["context"]), lambda done, total: None, None)
    found = open_model(done.path)
    assert_same(found, original, besides=frozenset({"output.weight"}))
    assert found.tensors["output.weight"].read() == original.tensors["token_embd.weight"].read()


def test_other_forms_give_the_same_file(
    original: ModelFile, weights: tuple[dict[str, int], Weights], story_file: Path, tmp_path: Path
) -> None:
    words = story_file.with_name("tokenizer.bin")
    tencent = as_tencent_pretrain(tmp_path / "tencent.bin", *weights)
    assert_same(converted(tencent, tmp_path / "d.gguf", words), original, besides=frozenset({"output.weight"}))
    (tmp_path / "one.bin").write_bytes(version_one_bytes(*weights))
    assert_same(converted(tmp_path / "one.bin", tmp_path / "e.gguf", words), original)
