"""Compares embeddings with llama.cpp's, on small models with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.cluster.front.text.embedder import EmbeddingOptions
from llamaclust.cluster.launchers.in_process import LocalSettings, LocalStage
from llamaclust.model.pooling import Pooling
from support.models.record_embeddings import MODELS, POOLINGS, TEXTS, build, recorded_at

COSINE = 0.9999


async def embedded(path: Path, pooling: Pooling) -> NDArray[np.float64]:
    """Returns the embeddings of TEXTS, with norm 1."""
    stage = LocalStage(path, 1, None, LocalSettings(context_length=256))
    prompts = [(text,) for text in TEXTS]
    async with stage.serve() as service, service.embed(prompts, EmbeddingOptions(pooling)) as embeddings:
        rows = np.array([vector for embedding in embeddings for vector in embedding.vectors], np.float64)
    norms: NDArray[np.float64] = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / norms


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", MODELS)
async def test_embeddings_are_those_of_llama_cpp(name: str, pooling: Pooling, tmp_path: Path) -> None:
    found = await embedded(build(tmp_path, name), pooling)
    wanted = np.frombuffer(recorded_at(name, pooling).read_bytes(), "<f4").reshape(found.shape)
    assert (found * wanted).sum(axis=1).min() >= COSINE


@pytest.mark.parametrize("name", MODELS)
async def test_texts_differ(name: str, tmp_path: Path) -> None:
    """Different texts must have a clearly lower cosine than the bound of comparisons."""
    vectors = await embedded(build(tmp_path, name), Pooling.MEAN)
    cosines = vectors @ vectors.T
    assert cosines[~np.eye(len(TEXTS), dtype=bool)].max() < COSINE - 0.005
