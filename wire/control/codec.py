"""Control messages as bytes and back. A kind of message that a newer minor version added decodes to None."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import KV_TYPES, MAX_CONTEXT_TOKENS, MAX_KV_BLOCKS, MAX_SEQUENCES, MAX_TOKENS, StageLimits
from llamaclust.proto import control_pb2 as proto
from llamaclust.wire.bounds import UINT64, bounded, finite, line, one_line, parse, path, worker_name
from llamaclust.wire.control.codec_gpus import layers_in, layers_out
from llamaclust.wire.control.codec_logs import tell_in, tell_out, told_in, told_out
from llamaclust.wire.control.codec_machines import heartbeat_in, heartbeat_out, register_in, register_out
from llamaclust.wire.control.codec_peers import lost_in, lost_out, tried_in, tried_out, try_in, try_out
from llamaclust.wire.control.codec_profiles import (
    ends_in,
    ends_out,
    links_in,
    links_out,
    measure_in,
    measure_out,
    measured_in,
    measured_out,
)
from llamaclust.wire.control.codec_weights import (
    locate_in,
    locate_out,
    located_in,
    located_out,
    new_source_in,
    new_source_out,
    progress_in,
    progress_out,
    sources_in,
    sources_out,
)
from llamaclust.wire.control.messages import (
    AddWeightSource,
    Admitted,
    CertificateRenewed,
    CoordinatorMessage,
    Deadlines,
    Failure,
    FindWeights,
    FindWeightsFailed,
    FindWeightsProgress,
    GetLog,
    Heartbeat,
    LinkProfiles,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    LogTail,
    PeerUnreachable,
    ProbePeer,
    ProbeResult,
    ProfileLinks,
    ProfileLinksFailed,
    ProfileWorker,
    Register,
    Rejected,
    RenewalFailed,
    RenewCertificate,
    Shutdown,
    Unload,
    Unloaded,
    WeightsFound,
    WorkerMessage,
    WorkerProfile,
)

MAX_CONTROL_BYTES = 1 << 18

_MAX_LAYERS = 1 << 16
_MAX_DEADLINE_S = 86400.0
_MAX_WAIT_S = 30 * 86400.0


def encode_worker_message(message: WorkerMessage) -> bytes:
    match message:
        case Register():
            out = proto.WorkerMessage(register=register_out(message))
        case WorkerProfile():
            out = proto.WorkerMessage(measured=measured_out(message))
        case Failure():
            out = proto.WorkerMessage(measure_failed=_failure_out(message))
        case Heartbeat():
            out = proto.WorkerMessage(heartbeat=heartbeat_out(message))
        case RenewCertificate(request):
            out = proto.WorkerMessage(renew=proto.Renew(certificate_request=request))
        case LinkProfiles():
            out = proto.WorkerMessage(links_measured=links_out(message))
        case ProfileLinksFailed(failure):
            out = proto.WorkerMessage(measure_links_failed=_failure_out(failure))
        case WeightsFound():
            out = proto.WorkerMessage(located=located_out(message))
        case FindWeightsFailed(failure):
            out = proto.WorkerMessage(locate_failed=_failure_out(failure))
        case FindWeightsProgress():
            out = proto.WorkerMessage(locate_progress=progress_out(message))
        case PeerUnreachable():
            out = proto.WorkerMessage(peer_lost=lost_out(message))
        case ProbeResult():
            out = proto.WorkerMessage(peer_tried=tried_out(message))
        case LogTail():
            out = proto.WorkerMessage(log_told=told_out(message))
        case _:
            out = _about_load(message)
    return out.SerializeToString()


def _about_load(message: LoadProgress | Loaded | LoadFailed | Unloaded) -> proto.WorkerMessage:
    epoch = message.epoch
    match message:
        case LoadProgress(_, done, total):
            return proto.WorkerMessage(
                load_progress=proto.LoadProgress(epoch=epoch, done_bytes=done, total_bytes=total)
            )
        case Loaded(_, weights, kv, workspace, fetched):
            sizes = {"weight_bytes": weights, "kv_bytes": kv, "workspace_bytes": workspace, "fetched_bytes": fetched}
            return proto.WorkerMessage(loaded=proto.Loaded(epoch=epoch, **sizes))
        case LoadFailed(_, failure):
            return proto.WorkerMessage(load_failed=proto.LoadFailed(epoch=epoch, failure=_failure_out(failure)))
        case Unloaded():
            return proto.WorkerMessage(unloaded=proto.Unloaded(epoch=epoch))


def _failure_out(failure: Failure) -> proto.Failure:
    return proto.Failure(kind=failure.kind, message=one_line(failure.message), number=failure.number)


def decode_worker_message(data: bytes) -> WorkerMessage | None:
    """None for a kind that is not known; ProtocolError for bytes that are no message or break a bound."""
    message = parse(proto.WorkerMessage, data, MAX_CONTROL_BYTES)
    match message.WhichOneof("kind"):
        case "register":
            return register_in(message.register)
        case "measured":
            return measured_in(message.measured)
        case "measure_failed":
            return _failure_in(message.measure_failed)
        case "load_progress":
            progress = message.load_progress
            done = bounded("done_bytes", progress.done_bytes, 0, progress.total_bytes)
            return LoadProgress(progress.epoch, done, progress.total_bytes)
        case "loaded":
            loaded = message.loaded
            held = loaded.weight_bytes, loaded.kv_bytes, loaded.workspace_bytes
            return Loaded(loaded.epoch, *held, loaded.fetched_bytes)
        case "load_failed":
            return LoadFailed(message.load_failed.epoch, _failure_in(message.load_failed.failure))
        case "unloaded":
            return Unloaded(message.unloaded.epoch)
        case "heartbeat":
            return heartbeat_in(message.heartbeat)
        case "renew":
            return RenewCertificate(message.renew.certificate_request)
        case "links_measured":
            return links_in(message.links_measured)
        case "measure_links_failed":
            return ProfileLinksFailed(_failure_in(message.measure_links_failed))
        case "located":
            return located_in(message.located)
        case "locate_failed":
            return FindWeightsFailed(_failure_in(message.locate_failed))
        case "locate_progress":
            return progress_in(message.locate_progress)
        case "peer_lost":
            return lost_in(message.peer_lost)
        case "peer_tried":
            return tried_in(message.peer_tried)
        case "log_told":
            return told_in(message.log_told)
    return None


def _failure_in(message: proto.Failure) -> Failure:
    return Failure(line("kind", message.kind, 64), line("message", message.message), message.number)


def encode_coordinator_message(message: CoordinatorMessage) -> bytes:
    match message:
        case Admitted():
            out = proto.CoordinatorMessage(welcome=_welcome_out(message))
        case Rejected():
            out = proto.CoordinatorMessage(refused=proto.Refused(reason=one_line(message.reason)))
        case ProfileWorker():
            out = proto.CoordinatorMessage(measure=measure_out(message))
        case Load():
            out = proto.CoordinatorMessage(load=_load_out(message))
        case Unload():
            out = proto.CoordinatorMessage(unload=proto.Unload(epoch=message.epoch))
        case Shutdown():
            out = proto.CoordinatorMessage(shutdown=proto.Shutdown(reason=one_line(message.reason)))
        case CertificateRenewed(certificate):
            out = proto.CoordinatorMessage(renewed=proto.Renewed(certificate=certificate))
        case ProfileLinks():
            out = proto.CoordinatorMessage(measure_links=ends_out(message))
        case RenewalFailed(failure):
            out = proto.CoordinatorMessage(renew_failed=_failure_out(failure))
        case FindWeights():
            out = proto.CoordinatorMessage(locate=locate_out(message))
        case ProbePeer():
            out = proto.CoordinatorMessage(try_peer=try_out(message))
        case GetLog():
            out = proto.CoordinatorMessage(tell_log=tell_out(message))
        case AddWeightSource():
            out = proto.CoordinatorMessage(new_source=new_source_out(message))
    return out.SerializeToString()


def _welcome_out(message: Admitted) -> proto.Welcome:
    return proto.Welcome(
        protocol_major=message.protocol[0],
        protocol_minor=message.protocol[1],
        heartbeat_s=message.deadlines.heartbeat_s,
        sampling_inputs_s=message.deadlines.sampling_inputs_s,
        forward_s=message.deadlines.forward_s,
        coordinator_s=message.deadlines.coordinator_s,
        cluster=message.cluster,
        peer_s=message.deadlines.peer_s,
    )


def _load_out(message: Load) -> proto.Load:
    limits = message.limits
    return proto.Load(
        epoch=message.epoch,
        model_path=message.model_path,
        model_id=message.model_id,
        start=message.start,
        end=message.end,
        limits=proto.StageLimits(
            max_tokens=limits.max_tokens,
            max_outputs=limits.max_outputs,
            max_sequences=limits.max_sequences,
            max_context_tokens=limits.max_context_tokens,
            kv_blocks=limits.kv_blocks,
            kv_type=limits.kv_type,
            window_blocks=limits.window_blocks,
        ),
        next_address=message.next_address or "",
        first_address=message.first_address or "",
        next_worker=message.next_worker or "",
        first_worker=message.first_worker or "",
        previous_worker=message.previous_worker or "",
        last_worker=message.last_worker or "",
        alone=message.alone,
        weights=None if message.weights is None else sources_out(message.weights),
        devices=layers_out(message.devices),
    )


def decode_coordinator_message(data: bytes) -> CoordinatorMessage | None:
    """None for a kind that is not known; ProtocolError for bytes that are no message or break a bound."""
    message = parse(proto.CoordinatorMessage, data, MAX_CONTROL_BYTES)
    match message.WhichOneof("kind"):
        case "welcome":
            return _welcome_in(message.welcome)
        case "refused":
            return Rejected(line("reason", message.refused.reason))
        case "measure":
            return measure_in(message.measure)
        case "load":
            return _load_in(message.load)
        case "unload":
            return Unload(message.unload.epoch)
        case "shutdown":
            return Shutdown(line("reason", message.shutdown.reason))
        case "renewed":
            return CertificateRenewed(message.renewed.certificate)
        case "measure_links":
            return ends_in(message.measure_links)
        case "renew_failed":
            return RenewalFailed(_failure_in(message.renew_failed))
        case "locate":
            return locate_in(message.locate)
        case "try_peer":
            return try_in(message.try_peer)
        case "tell_log":
            return tell_in(message.tell_log)
        case "new_source":
            return new_source_in(message.new_source)
    return None


def _welcome_in(message: proto.Welcome) -> Admitted:
    values = (message.heartbeat_s, message.sampling_inputs_s, message.forward_s)
    checked = (finite("deadline", value, 0.01, _MAX_DEADLINE_S) for value in values)
    wait_s = finite("coordinator_s", message.coordinator_s, 0.0, _MAX_WAIT_S)
    peer_s = finite("peer_s", message.peer_s, 0.0, _MAX_DEADLINE_S) or Deadlines().peer_s
    deadlines = replace(Deadlines(*checked), coordinator_s=wait_s, peer_s=peer_s)
    cluster = line("cluster", message.cluster, 255)
    return Admitted(deadlines, (message.protocol_major, message.protocol_minor), cluster)


def _load_in(message: proto.Load) -> Load:
    end = bounded("end", message.end, 1, _MAX_LAYERS)
    start = bounded("start", message.start, 0, end - 1)
    return Load(
        epoch=bounded("epoch", message.epoch, 0, UINT64 - 1),
        model_path=path("model_path", message.model_path),
        model_id=line("model_id", message.model_id, 128),
        start=start,
        end=end,
        limits=_limits_in(message.limits),
        next_address=line("next_address", message.next_address, 512) or None,
        first_address=line("first_address", message.first_address, 512) or None,
        next_worker=worker_name(message.next_worker) if message.next_worker else None,
        first_worker=worker_name(message.first_worker) if message.first_worker else None,
        previous_worker=worker_name(message.previous_worker) if message.previous_worker else None,
        last_worker=worker_name(message.last_worker) if message.last_worker else None,
        alone=message.alone,
        weights=sources_in(message.weights) if message.HasField("weights") else None,
        devices=layers_in(message.devices, start, end),
    )


def _limits_in(message: proto.StageLimits) -> StageLimits:
    if message.kv_type not in KV_TYPES:
        raise ProtocolError(f"kv_type {line('kv_type', message.kv_type, 16)!r} is not one of {', '.join(KV_TYPES)}")
    return StageLimits(
        bounded("max_tokens", message.max_tokens, 1, MAX_TOKENS),
        bounded("max_outputs", message.max_outputs, 1, MAX_TOKENS),
        bounded("max_sequences", message.max_sequences, 1, MAX_SEQUENCES),
        bounded("max_context_tokens", message.max_context_tokens, 1, MAX_CONTEXT_TOKENS),
        bounded("kv_blocks", message.kv_blocks, 1, MAX_KV_BLOCKS),
        message.kv_type,
        bounded("window_blocks", message.window_blocks, 0, MAX_KV_BLOCKS),
    )
