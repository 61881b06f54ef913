"""Projectors that the user did not choose. If the encoder of images fits on no worker, a start goes on without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.model.loader import Model


def is_optional(config: ClusterConfig, model: Model) -> bool:
    """Returns True if the model has a projector although the cluster file names none."""
    return config.mmproj is None and model.projector is not None


def encoder_shortfall(
    config: ClusterConfig, model: Model, resources: ClusterResources, row_bytes: int = 0
) -> str | None:
    """Returns the reason why an optional projector cannot be used: its encoder fits on no worker, but the model does.
    `row_bytes` of this machine's memory are reserved for rows of images. None: it can be used, or nothing fits."""
    try:
        plan_cluster(config, model, resources)
    except InsufficientMemoryError as error:
        free_bytes = None if resources.free_bytes is None else resources.free_bytes + row_bytes
        with _as_text(model):
            try:
                plan_cluster(config, model, replace(resources, free_bytes=free_bytes))
            except InsufficientMemoryError:
                return None
        return f"images are not read: {error}"
    return None


@contextmanager
def _as_text(model: Model) -> Iterator[None]:
    projector, model.projector = model.projector, None
    try:
        yield
    finally:
        model.projector = projector
