"""Whom `generate` and `chat` talk to: the running cluster, an address, or a model in this process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from llamaclust.cli.gpu_options import NO_GPUS, Gpus
from llamaclust.cluster.api.settings import first_key
from llamaclust.cluster.client.base import TextClient
from llamaclust.cluster.client.http import Client
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.state.directory import find_running
from llamaclust.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Target:
    """What the command line names; nothing: the cluster that runs on this machine."""

    cluster: str | None = None
    endpoint: str | None = None
    api_key_file: Path | None = None
    model: str | None = None
    threads: int | None = None
    chat_template: str | None = None
    gpus: Gpus = NO_GPUS

    def open(self) -> TextClient:
        """A client of it. UsageError where the options contradict each other or no cluster runs."""
        self._check()
        if self.model is not None:
            from llamaclust.cluster.client.local import LocalSettings
            from llamaclust.tools.hub.catalog import resolve_model

            device, gpu_layers, _ = self.gpus.parsed
            settings = LocalSettings(chat_template=self.chat_template, device=device, gpu_layers=gpu_layers)
            client = Client.local(resolve_model(self.model), self.threads, settings=settings)
            if client.placement:
                print(client.placement, file=sys.stderr)
            return client
        if self.endpoint is not None:
            return connect(self.endpoint, self.api_key_file)
        _, record = find_running(environment().state_dir, self.cluster)
        keys = self.api_key_file or (Path(record.api_keys_file) if record.api_keys_file else None)
        return connect(record.api, keys)

    def _check(self) -> None:
        places = {"--cluster": self.cluster, "--endpoint": self.endpoint, "--model": self.model}
        given = [option for option, value in places.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} name different places: give one of them")
        if self.threads is not None and self.model is None:
            raise UsageError("--threads is for --model: a cluster's workers have theirs in the cluster file")
        if self.gpus != NO_GPUS and self.model is None:
            raise UsageError("--device and --gpu-layers are for --model: a cluster's workers have theirs")
        if self.chat_template is not None and self.model is None:
            raise UsageError("--chat-template is for --model: a cluster's is in its file, or given to `up`")
        if self.api_key_file is not None and self.model is not None:
            raise UsageError("--api-key-file is for a cluster: a model in this process asks for no key")


def connect(endpoint: str, api_key_file: Path | None) -> Client:
    """A client of an address, with the first key of a file. UsageError where there is none in it."""
    return Client(endpoint, None if api_key_file is None else first_key(api_key_file))
