"""Control messages about ways between workers as bytes and back: which one is cut, and whether it is still."""

from __future__ import annotations

from llamaclust.proto import measuring_pb2 as proto
from llamaclust.wire.bounds import line, one_line, worker_name
from llamaclust.wire.control.messages import PeerUnreachable, ProbePeer, ProbeResult


def lost_out(message: PeerUnreachable) -> proto.PeerLost:
    return proto.PeerLost(epoch=message.epoch, worker=message.worker, reason=one_line(message.reason))


def lost_in(message: proto.PeerLost) -> PeerUnreachable:
    return PeerUnreachable(message.epoch, worker_name(message.worker), line("reason", message.reason))


def try_out(message: ProbePeer) -> proto.TryPeer:
    return proto.TryPeer(worker=message.worker, address=message.address, number=message.number)


def try_in(message: proto.TryPeer) -> ProbePeer:
    return ProbePeer(worker_name(message.worker), line("address", message.address, 512), message.number)


def tried_out(message: ProbeResult) -> proto.PeerTried:
    return proto.PeerTried(worker=message.worker, reason=one_line(message.reason), number=message.number)


def tried_in(message: proto.PeerTried) -> ProbeResult:
    return ProbeResult(worker_name(message.worker), line("reason", message.reason), message.number)
