"""Opens the parts that a cluster needs to start: model files, launcher, registry, and the measurement of links."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.sections import ModelEntry
from llamaclust.cluster.control.limits import check_distinct, check_plan
from llamaclust.cluster.control.resources.link_profiling import MeasureLinks, measure_links, needs_links
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.models.projectors import open_with_projector
from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.cluster.launchers.worker_settings import worker_settings
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.errors import InsufficientMemoryError, ModelFileError, UsageError
from llamaclust.core.profile import Profile
from llamaclust.model.loader import Model
from llamaclust.model.weights.cache import WeightCache
from llamaclust.wire.control.messages import Deadlines
from llamaclust.worker.weights.giver import WeightGiver

_HEARTBEAT_S = 1.0
_HEARTBEATS = 5


async def open_models(
    stack: AsyncExitStack,
    config: ClusterConfig,
    paths: Sequence[Path],
    launcher: Launcher,
    report: Report,
    *,
    needs_all: bool = False,
) -> tuple[ClusterConfig, list[tuple[ClusterConfig, Model]]]:
    """Opens each model with its own configuration, and reports unused projectors. Of several models, those whose files
    are refused are reported and left out of the returned configuration, except the first, which answers requests that
    name no model, and all if `needs_all`. Raises ModelFileError if a needed file is refused, and UsageError if a model
    cannot run with its configuration on any workers."""
    models, entries = list[tuple[ClusterConfig, Model]](), list[ModelEntry]()
    for own, path, entry in zip_longest(config.of_each_model(), paths, config.models):
        adapters = [adapter.path for adapter in own.adapters]
        try:
            model, unused = await asyncio.to_thread(open_with_projector, path, own.mmproj, own.chat_template, adapters)
        except ModelFileError as error:
            if needs_all or not models:
                raise
            report(Notice(f"{own.model_name} is not served: {error}"))
            continue
        entries += [] if entry is None else [entry]
        stack.callback(model.close)
        if unused is not None:
            report(Notice(f"{own.model_name}: {unused}"))
        models.append((own, model))
    for own, model in models:
        with named_errors(own):
            check_plan(own, model)
            launcher.check(worker_settings(config), model)
    check_distinct((own.model_name, model.model_id) for own, model in models)
    return config.model_copy(update={"models": tuple(entries)}), models


@contextmanager
def named_errors(config: ClusterConfig) -> Iterator[None]:
    try:
        yield
    except (UsageError, InsufficientMemoryError) as error:
        if config.models:
            error.args = (f"models: {config.model_name!r}: {error}",)
        raise


@contextmanager
def launching(config: ClusterConfig, folder: ClusterDir, report: Report) -> Iterator[Launcher]:
    """Yields the launcher that the cluster file names. The caller must hold the lock of `folder`."""
    match config.launcher:
        case "local":
            with run_directory(folder.path) as run:
                yield LocalLauncher(run, folder.logs)
        case "static":
            from llamaclust.cluster.launchers.static import StaticLauncher

            yield StaticLauncher(config, folder, report)
        case "ray":
            from llamaclust.cluster.launchers.ray import RayLauncher

            yield RayLauncher(config, folder, report)
        case "mpi":
            from llamaclust.cluster.launchers.mpi import MpiLauncher

            yield MpiLauncher(config, folder, report)


def registry_of(config: ClusterConfig, launcher: Launcher, record: ControlRecord) -> Registry:
    timeout_s = config.timeouts.worker
    heartbeat_s = min(_HEARTBEAT_S, timeout_s / _HEARTBEATS)
    settings = JoinSettings(
        heartbeat_timeout_s=timeout_s,
        deadlines=Deadlines(heartbeat_s=heartbeat_s, coordinator_s=launcher.coordinator_s, peer_s=timeout_s),
        cluster=config.name,
        refusal=launcher.refusal,
        certify=launcher.certify,
        record=record,
    )
    giver = WeightGiver(weight_cache())
    return Registry(launcher.listen, launcher.credentials, launcher.last_error, settings, giver)


def link_meter(
    config: ClusterConfig,
    measured: Mapping[str, Profile],
    launcher: Launcher,
    folder: ClusterDir,
    report: Report,
    *,
    anew: bool = False,
) -> MeasureLinks | None:
    """Returns a function that measures links, or None if plans use default link speeds. If `anew` is true, links with
    stored measurements are measured again."""
    if config.launcher_facts.is_local and not needs_links(measured):
        return None
    return partial(
        measure_links, credentials=launcher.credentials, state_dir=folder.path.parent, report=report, anew=anew
    )


def weight_cache() -> WeightCache | None:
    variables = environment()
    return WeightCache(variables.weights_dir, variables.weights_bytes) if variables.weights_bytes else None
