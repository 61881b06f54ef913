"""Messages about what workers measure, as protobuf objects and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from llamaclust.core.errors import ProtocolError
from llamaclust.core.profile import GpuProfile, StageProfile
from llamaclust.proto import measuring_pb2 as proto
from llamaclust.wire.bounds import bounded, finite, line, path, worker_name
from llamaclust.wire.control.messages import LinkProfile, LinkProfiles, ProfileLinks, ProfileWorker, WorkerProfile

_MIN_RATE = 1.0
_MAX_RATE = 1e18
_MAX_GPUS = 16
_MAX_TRIALS = 16
_MAX_TRIAL_ROWS = 1 << 16
_MAX_TRIAL_S = 3600.0
_MAX_ROUND_TRIP_S = 86400.0


def measure_out(message: ProfileWorker) -> proto.Measure:
    return proto.Measure(model_path=message.model_path, model_id=message.model_id, number=message.number)


def measure_in(message: proto.Measure) -> ProfileWorker:
    where = path("model_path", message.model_path) if message.model_path else ""
    return ProfileWorker(where, line("model_id", message.model_id, 128), message.number)


def measured_out(message: WorkerProfile) -> proto.Measured:
    measured = proto.Measured(read_bytes_s=message.read_bytes_s, int8_macs_s=message.int8_macs_s, number=message.number)
    measured.trials.extend(_trials_out(message.trials))
    for gpu in message.gpus:
        trials = _trials_out(gpu.trials)
        measured.gpus.add(read_bytes_s=gpu.read_bytes_s, int8_macs_s=gpu.int8_macs_s, trials=trials)
    return measured


def measured_in(message: proto.Measured) -> WorkerProfile:
    read = finite("read_bytes_s", message.read_bytes_s, _MIN_RATE, _MAX_RATE)
    macs = finite("int8_macs_s", message.int8_macs_s, _MIN_RATE, _MAX_RATE)
    bounded("gpus", len(message.gpus), 0, _MAX_GPUS)
    return WorkerProfile(read, macs, _trials_in(message.trials), message.number, tuple(map(_gpu_in, message.gpus)))


def _gpu_in(gpu: proto.GpuSpeed) -> GpuProfile:
    return GpuProfile(
        finite("read_bytes_s", gpu.read_bytes_s, _MIN_RATE, _MAX_RATE),
        finite("int8_macs_s", gpu.int8_macs_s, _MIN_RATE, _MAX_RATE),
        _trials_in(gpu.trials),
    )


def _trials_out(trials: Iterable[StageProfile]) -> list[proto.StageTrial]:
    return [
        proto.StageTrial(rows=one.rows, stage_s=one.stage_s, layers_byte_s=one.layers_byte_s, head_s=one.head_s)
        for one in trials
    ]


def _trials_in(trials: Sequence[proto.StageTrial]) -> tuple[StageProfile, ...]:
    bounded("trials", len(trials), 0, _MAX_TRIALS)
    found = tuple(map(_trial_in, trials))
    if any(one.rows >= two.rows for one, two in pairwise(found)):
        raise ProtocolError("trials: their rows must ascend")
    return found


def _trial_in(trial: proto.StageTrial) -> StageProfile:
    return StageProfile(
        rows=bounded("rows", trial.rows, 1, _MAX_TRIAL_ROWS),
        stage_s=finite("stage_s", trial.stage_s, 0.0, _MAX_TRIAL_S),
        layers_byte_s=finite("layers_byte_s", trial.layers_byte_s, 0.0, _MAX_TRIAL_S),
        head_s=finite("head_s", trial.head_s, 0.0, _MAX_TRIAL_S),
    )


def ends_out(message: ProfileLinks) -> proto.MeasureLinks:
    ends = [proto.LinkEnd(worker=worker, address=address) for worker, address in message.ends]
    return proto.MeasureLinks(ends=ends, number=message.number)


def ends_in(message: proto.MeasureLinks) -> ProfileLinks:
    ends = tuple((worker_name(end.worker), line("address", end.address, 512)) for end in message.ends)
    return ProfileLinks(ends, message.number)


def links_out(message: LinkProfiles) -> proto.LinksMeasured:
    speeds = [proto.LinkSpeed(round_trip_s=link.round_trip_s, bytes_s=link.bytes_s) for link in message.links]
    return proto.LinksMeasured(links=speeds, number=message.number)


def links_in(message: proto.LinksMeasured) -> LinkProfiles:
    return LinkProfiles(tuple(map(_link_in, message.links)), message.number)


def _link_in(message: proto.LinkSpeed) -> LinkProfile:
    return LinkProfile(
        finite("round_trip_s", message.round_trip_s, 0.0, _MAX_ROUND_TRIP_S),
        finite("bytes_s", message.bytes_s, 1e-3, _MAX_RATE),
    )
