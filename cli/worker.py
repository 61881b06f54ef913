"""The commands `worker` and `token rotate`: join a static cluster, and replace the secret for joining."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from typer import Option

from llamaclust.cli.interrupts import ends_at_once
from llamaclust.cli.options import Devices, GpuLayers, Gpus, option_value
from llamaclust.cli.terminal import print_error
from llamaclust.core.addresses import JOIN_PORT, split_address
from llamaclust.core.errors import UsageError

if TYPE_CHECKING:
    from llamaclust.cluster.config.environment import Environment
    from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
    from llamaclust.worker.settings import WorkerSettings

_TOKEN = "join-token"
_JOIN_S = 15.0


def worker(
    join: Annotated[
        list[str],
        Option(
            "--join",
            metavar="HOST[:PORT]",
            help="Address where the coordinator admits workers (`join.listen`). Repeat --join for each standby.",
        ),
    ] = [],  # noqa: B006  typer reads the default
    discover: Annotated[
        bool, Option("--discover", help="Find the coordinator by multicast DNS. The join token identifies the cluster.")
    ] = False,
    token_file: Annotated[
        Path | None,
        Option(
            "--token-file",
            metavar="FILE",
            help="File with the join token, mode 0600. Default: join-token in the state folder.",
        ),
    ] = None,
    name: Annotated[str | None, Option(metavar="NAME", help="Name of the worker. Default: the host name.")] = None,
    listen: Annotated[
        str,
        Option(
            metavar="HOST:PORT",
            help="Address where other members connect. Default: a free port at the local address that reaches --join.",
        ),
    ] = "",
    advertise: Annotated[
        str,
        Option(metavar="HOST[:PORT]", help="Address to announce in place of --listen, for machines behind NAT."),
    ] = "",
    link_port: Annotated[
        int | None,
        Option(
            "--link-port",
            min=1,
            max=65535,
            metavar="N",
            help="Port for links within worker groups. Default: port of --listen + 1000 if possible, or any port.",
        ),
    ] = None,
    device: Devices = [],  # noqa: B006  typer reads the default
    gpu_layers: GpuLayers = "auto",
    gpu_memory: Annotated[
        str | None,
        Option("--gpu-memory", metavar="SIZE", help="Memory limit of each GPU. Default: the GPU's free memory."),
    ] = None,
    threads: Annotated[
        int | None, Option(min=1, max=1024, metavar="N", help="Number of threads. Default: one per physical core.")
    ] = None,
    numa_node: Annotated[
        int | None,
        Option("--numa-node", min=0, max=1023, metavar="N", help="Use only the cores and memory of this NUMA node."),
    ] = None,
    memory: Annotated[
        str | None, Option(metavar="SIZE", help="RAM limit of the process, e.g. 8GiB. Default: free memory.")
    ] = None,
    mlock: Annotated[bool, Option("--mlock", help="Lock weights in RAM, so that they are never swapped out.")] = False,
    kv_disk: Annotated[
        str | None,
        Option(
            "--kv-disk",
            metavar="SIZE",
            help="Limit for KV memory kept on disk, e.g. 4GiB. Set it for all workers or none. Default: none.",
        ),
    ] = None,
    model_dir: Annotated[
        Path | None,
        Option(
            "--model-dir", metavar="DIR", help="Folder to search if the model file is not at the coordinator's path."
        ),
    ] = None,
    stay: Annotated[bool, Option("--stay", help="Wait for the next cluster after a cluster ends.")] = False,
    ready_file: Annotated[
        Path | None,
        Option(
            "--ready-file",
            metavar="FILE",
            help="File for readiness probes. It exists while the worker is idle or has loaded its layers.",
        ),
    ] = None,
    insecure: Annotated[
        bool, Option("--insecure", help="Use no encryption and no authentication, for a cluster with `insecure: true`.")
    ] = False,
) -> None:
    """Join a static cluster with one worker on this machine, until the cluster ends."""
    with ends_at_once():
        from llamaclust.wire.rpc.grpc_options import tune_grpc

        tune_grpc()
    from llamaclust.cluster.config.environment import environment
    from llamaclust.cluster.config.values import expand_home, parse_name, parse_size
    from llamaclust.cluster.launchers.worker_settings import with_caches
    from llamaclust.worker.settings import WorkerSettings

    if insecure and token_file is not None:
        raise UsageError("--insecure and --token-file: choose one; an insecure cluster has no token")
    if insecure and discover:
        raise UsageError("--insecure and --discover: choose one; discovery finds the cluster by its token")
    variables = environment()
    addresses = _addresses(join, variables, discover=discover)
    device_name, layers, gpu_bytes = Gpus(device, gpu_layers, gpu_memory).parsed
    settings = WorkerSettings(
        name=option_value("--name", parse_name, name or socket.gethostname().split(".")[0]),
        join=next(iter(addresses), ""),
        standbys=addresses[1:],
        discover=discover,
        listen=option_value("--listen", _address, listen) if listen else "",
        advertise=option_value("--advertise", _advertised, advertise) if advertise else "",
        link_port=link_port,
        device=device_name,
        gpu_layers=layers,
        gpu_memory_bytes=gpu_bytes,
        threads=threads,
        numa_node=numa_node,
        mlock=mlock,
        memory_bytes=None if memory is None else option_value("--memory", parse_size, memory),
        kv_disk_bytes=None if kv_disk is None else option_value("--kv-disk", parse_size, kv_disk),
        feature_level=variables.feature_level or "",
        join_s=_JOIN_S,
        static=True,
        stays=stay,
        log_format=variables.log_format,
        model_dir=None if model_dir is None else Path(option_value("--model-dir", expand_home, str(model_dir))),
        ready_file=ready_file,
        token_file=None if insecure else _token_file(token_file, variables.state_dir),
    )
    _run(with_caches(settings))


def _run(settings: WorkerSettings) -> NoReturn:
    from llamaclust.worker.main import end_process, run_worker

    try:
        end_process(run_worker(settings))
    except UsageError as error:
        print_error(error)
        end_process(error.exit_code)


def _addresses(given: list[str], variables: Environment, *, discover: bool) -> tuple[str, ...]:
    """Returns the addresses of the coordinator and its standbys. Raises UsageError if an address is needed but
    missing."""
    name, values = ("--join", given) if given else ("LLAMACLUST_JOIN", list(variables.join))
    if not values and not discover:
        what = "the address that `llamaclust up` prints, or set LLAMACLUST_JOIN"
        raise UsageError(f"--join: give {what}; if the cluster runs with `up --discover`, give --discover instead")
    return tuple(dict.fromkeys(option_value(name, _address, _with_port(value)) for value in values))


def _with_port(value: str) -> str:
    if value.count(":") > 1 and not value.startswith("["):
        value = f"[{value}]"
    return value if ":" in value.rpartition("]")[2] or not value else f"{value}:{JOIN_PORT}"


def _address(value: str) -> str:
    split_address(value, "192.168.1.10:7100 or HOST:7100")
    return value


def _advertised(value: str) -> str:
    _address(value if ":" in value.rpartition("]")[2] else f"{value}:0")
    return value


def _token_file(given: Path | None, state_dir: Path) -> Path:
    path = given or state_dir / _TOKEN
    if given is None and not path.exists():
        raise UsageError(
            f"--token-file: give the token's file, since there is no {path}; `llamaclust up` prints where the token is"
        )
    return path


def rotate(
    cluster: Annotated[
        str | None, Option(metavar="NAME", help="Name of the cluster, from its file. Default: the running cluster.")
    ] = None,
    trust_dir: Annotated[
        Path | None,
        Option(metavar="DIR", help="Folder of the join token. Needed if the cluster file sets `join.trust_dir`."),
    ] = None,
) -> None:
    """Replace the join token, and print the path of its file. Clusters of Ray and MPI must be stopped first.

    The old token no longer admits workers. Connected workers stay, but need the new token to rejoin."""
    from llamaclust.cluster.config.environment import environment
    from llamaclust.cluster.membership.authority import Authority

    folder = trust_dir or _trust_folder(cluster, environment().state_dir)
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; give the cluster's name with --cluster, or the folder with --trust-dir"
        )
    _check_workers_rejoin(folder, environment().state_dir)
    authority = Authority.open(folder)
    authority.rotate_token()
    print(authority.token_file)
    print(
        "copy this file over the old token on every worker's machine: connected workers stay, but need the new token"
        " to rejoin, and all workers need it once the coordinator was restarted",
        file=sys.stderr,
    )


def _check_workers_rejoin(folder: Path, state_dir: Path) -> None:
    """Raises UsageError if a running cluster uses this trust folder and has workers that could not get a new token."""
    from llamaclust.cluster.config.launcher_facts import LAUNCHERS
    from llamaclust.cluster.state.clusters import running_clusters

    for directory, record in running_clusters(state_dir).values():
        facts = LAUNCHERS[record.launcher]
        needs_token = facts.starts_workers and not facts.is_local
        if needs_token and _trust_of(directory, record).resolve() == folder.resolve():
            what = f"workers that {record.launcher} has started need the present token to rejoin"
            raise UsageError(f"{what}: stop the cluster first with `llamaclust down --cluster {record.name}`")


def _trust_folder(cluster: str | None, state_dir: Path) -> Path:
    """Returns a cluster's trust folder. None means the running cluster, or the cluster `default` if none runs."""
    from llamaclust.cluster.config.values import parse_name
    from llamaclust.cluster.membership.authority import trust_folder
    from llamaclust.cluster.state.clusters import find_running, running_clusters

    name, running = option_value("--cluster", parse_name, cluster or "default"), running_clusters(state_dir)
    if cluster is None and running:
        return _trust_of(*find_running(state_dir, None))
    return _trust_of(*running[name]) if name in running else trust_folder(state_dir / name)


def _trust_of(directory: ClusterDir, record: ClusterRecord) -> Path:
    from llamaclust.cluster.membership.authority import trust_folder

    return trust_folder(directory.path) if record.trust_dir is None else Path(record.trust_dir)
