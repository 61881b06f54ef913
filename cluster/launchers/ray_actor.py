"""The Ray actor that runs a worker process. The actor ends when it is no longer needed."""

from __future__ import annotations

import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from llamaclust.cluster.launchers.child import Child
from llamaclust.cluster.launchers.worker_process import describe_exit
from llamaclust.cluster.membership.log_tail import recent_error
from llamaclust.core.errors import UsageError
from llamaclust.worker.settings import WorkerSettings

PLACEMENT = "llamaclust"
CONCURRENCY = 8
_LOG = Path("/proc/self/fd/2")
_LOOK_S = 2.0
_CALL_S = 5.0
_WAIT_S = 30.0
"""Seconds from a worker's end until its actor ends or clears up. Usually, the coordinator restarts it earlier."""


@dataclass(frozen=True, slots=True)
class ActorArguments:
    """Arguments of an actor. `settings` include enrolment address and token. `cluster` is the cluster's id."""

    settings: WorkerSettings
    cluster: str


class WorkerActor:
    """Runs a worker. If the actor's process or node is lost, Ray restarts the actor, and the worker joins again."""

    def __init__(self, given: ActorArguments) -> None:
        self._given = given
        self._over = threading.Event()
        self._how = ("", "")
        self._incarnation = secrets.token_hex(8)
        self._is_again = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._start()

    def given(self) -> ActorArguments:
        return self._given

    def incarnation(self) -> str:
        return self._incarnation

    def is_over(self) -> bool:
        return self._over.is_set()

    def ended(self) -> tuple[str, str] | None:
        return self._how if self._over.wait(_WAIT_S) else None

    def _start(self) -> None:
        Child(self._given.settings, self._worker_ended)

    def _worker_ended(self, code: int) -> None:
        # The coordinator refused the worker, because the lost worker of this name still counts as a member.
        if code == UsageError.exit_code and self._is_again:
            time.sleep(_LOOK_S)
            self._start()
            return
        self._how = (describe_exit(code), recent_error(_LOG) if code else "")
        self._over.set()
        time.sleep(_WAIT_S)
        if code < 0:
            os._exit(1)
        self._clear_up()

    def _clear_up(self) -> None:
        while not all(_is_over(name) for name in ray.util.list_named_actors()):
            time.sleep(_LOOK_S)
        ray.util.remove_placement_group(ray.util.get_placement_group(PLACEMENT))


def _is_over(name: str) -> bool:
    try:
        actor: Any = ray.get_actor(name)
        return bool(ray.get(actor.is_over.remote(), timeout=_CALL_S))
    except (ActorDiedError, ValueError):
        return True
    except RayError:  # The actor is being started, or cannot be reached.
        return False
