"""Control messages about a worker's machine, as protobuf objects and back: what it is, and how it is."""

from __future__ import annotations

from llamaclust.proto import control_pb2 as proto
from llamaclust.wire.bounds import bounded, finite, line, memory, worker_name
from llamaclust.wire.control.codec_gpus import free_in, gpus_in, gpus_out
from llamaclust.wire.control.messages import Heartbeat, Register


def register_out(message: Register) -> proto.Register:
    return proto.Register(
        name=message.name,
        pid=message.pid,
        host=message.host,
        address=message.address,
        protocol_major=message.protocol[0],
        protocol_minor=message.protocol[1],
        numerics_version=message.numerics_version,
        device=message.device,
        threads=message.threads,
        feature_level=message.feature_level,
        total_memory_bytes=message.total_memory_bytes,
        free_memory_bytes=message.free_memory_bytes,
        fingerprint=message.fingerprint,
        machine_free_bytes=message.machine_free_bytes,
        log=message.log,
        gpus=gpus_out(message.gpus),
        gpu_layers=message.gpu_layers,
    )


def register_in(message: proto.Register) -> Register:
    return Register(
        name=worker_name(message.name),
        pid=message.pid,
        host=line("host", message.host, 255),
        address=line("address", message.address, 512),
        device=line("device", message.device, 255),
        threads=bounded("threads", message.threads, 1, 1 << 16),
        feature_level=line("feature_level", message.feature_level, 64),
        total_memory_bytes=memory("total_memory_bytes", message.total_memory_bytes),
        free_memory_bytes=memory("free_memory_bytes", message.free_memory_bytes),
        fingerprint=line("fingerprint", message.fingerprint, 512),
        machine_free_bytes=memory("machine_free_bytes", message.machine_free_bytes),
        log=line("log", message.log),
        gpus=gpus_in(message.gpus),
        gpu_layers=message.gpu_layers if message.HasField("gpu_layers") else None,
        protocol=(message.protocol_major, message.protocol_minor),
        numerics_version=message.numerics_version,
    )


def heartbeat_out(message: Heartbeat) -> proto.Heartbeat:
    return proto.Heartbeat(
        busy=message.busy,
        microbatches=message.microbatches,
        tokens=message.tokens,
        resident_bytes=message.resident_bytes,
        free_memory_bytes=message.free_memory_bytes,
        received_bytes=message.received_bytes,
        sent_bytes=message.sent_bytes,
        weight_bytes_sent=message.weight_bytes_sent,
        weight_bytes_received=message.weight_bytes_received,
        last_words=message.last_words,
        gpu_free_bytes=message.gpu_free_bytes,
    )


def heartbeat_in(message: proto.Heartbeat) -> Heartbeat:
    return Heartbeat(
        busy=finite("busy", message.busy, 0.0, 1.0),
        microbatches=message.microbatches,
        tokens=message.tokens,
        resident_bytes=memory("resident_bytes", message.resident_bytes),
        free_memory_bytes=memory("free_memory_bytes", message.free_memory_bytes),
        received_bytes=message.received_bytes,
        sent_bytes=message.sent_bytes,
        weight_bytes_sent=message.weight_bytes_sent,
        weight_bytes_received=message.weight_bytes_received,
        last_words=line("last words", message.last_words),
        gpu_free_bytes=free_in(message.gpu_free_bytes),
    )
