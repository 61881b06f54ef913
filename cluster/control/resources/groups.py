"""Finds settings and model features that groups of workers do not support yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.core.errors import UsageError
from llamaclust.core.limits import MAX_GROUP_MEMBERS
from llamaclust.model.loader import Model


def check_groups(config: ClusterConfig, model: Model, gpus: Mapping[str, Sequence[str]]) -> None:
    for entry in config.plan or ():
        if not entry.workers:
            continue
        group = f"plan: the group of {', '.join(entry.workers)}"
        for problem, remedy in group_problems(config, model):
            first = f"{remedy}, or " if remedy else ""
            raise UsageError(f"{group}: {problem}; {first}give each worker layers of its own")
        with_gpu = next((name for name in entry.workers if gpus.get(name)), None)
        if with_gpu is not None and model.hyperparameters.expert_count:
            what = f"a group divides experts on CPUs only, but {with_gpu} has {', '.join(gpus[with_gpu])}"
            raise UsageError(f"{group}: {what}; set the device of {with_gpu} to cpu, or give it layers of its own")


def largest_group(config: ClusterConfig, model: Model) -> int:
    """Returns the maximum number of workers in a group of an automatic plan. 1 means that groups are impossible."""
    if config.plan is not None or any(group_problems(config, model)):
        return 1
    return MAX_GROUP_MEMBERS if config.groups is None else config.groups


def no_groups(config: ClusterConfig, model: Model) -> str:
    """Returns the reason why an automatic plan cannot have groups, or "" if it can."""
    if config.groups == 1:
        return "`groups` is off"
    return next((problem for problem, _ in group_problems(config, model)), "")


def group_problems(config: ClusterConfig, model: Model) -> Iterator[tuple[str, str | None]]:
    """Yields each reason against groups, and its remedy (a change of the cluster file) or None."""
    if model.has_states:
        yield "layers of this model have recurrent states, which groups do not divide yet", None
    if any(worker.kv_disk is not None for worker in config.workers):
        yield "kv_disk is set, but groups do not keep KV memory on disk yet", "remove kv_disk"
    if config.speculative is not None and config.speculative.mtp:
        yield "speculative.mtp is set, but the MTP head is not divided yet", "remove speculative.mtp"
    if any(place % 1 for entry in config.plan or () for place in entry.layers):
        yield "the plan divides the experts of a layer, but groups need whole layers", None
