"""What tests of launchers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.clusters.launched import Answers, model_in, of_one_worker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> Answers:
    return of_one_worker(model)
