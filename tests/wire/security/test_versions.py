"""Tests of version rules with messages of a later version: they can be decoded far enough to refuse the version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

from llamaclust.core.errors import ProtocolError
from llamaclust.proto import control_pb2
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.control.codec import (
    decode_coordinator_message,
    decode_worker_message,
    encode_worker_message,
)
from support.wire.control_messages import REGISTER
from support.wire.version_cases import CASES

NEW_FIELD = 1000
NEW_KIND = 1001


def newer(stubs: Any) -> dict[str, type[Message]]:
    """Returns the messages of a .proto file and its imports by name, as a later version would have them: each message
    has another field, and each oneof another kind."""
    pool = descriptor_pool.DescriptorPool()
    names = [name for file in (*stubs.DESCRIPTOR.dependencies, stubs.DESCRIPTOR) for name in _add_newer(pool, file)]
    return {
        name.rpartition(".")[2]: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names
    }


def _add_newer(pool: descriptor_pool.DescriptorPool, descriptor: Any) -> list[str]:
    file = descriptor_pb2.FileDescriptorProto()
    descriptor.CopyToProto(file)
    for message in file.message_type:
        message.field.add(name="from_the_future", number=NEW_FIELD, type=9, label=1)
        if any(choice.name in ("kind", "task") for choice in message.oneof_decl):
            assert len(message.oneof_decl) == 1
            message.field.add(name="kind_of_the_future", number=NEW_KIND, type=12, label=1, oneof_index=0)
    pool.Add(file)
    return [f"{file.package}.{message.name}" for message in file.message_type]


def with_new_fields(message: Any) -> bytes:
    """Sets the new field in the message and its parts. Returns the encoded message."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if hasattr(value, "append") or hasattr(value, "add") else (value,):
                with_new_fields(part)
    message.from_the_future = "x" * 40
    return bytes(message.SerializeToString())


HOT = ("Microbatch", "SamplingInputs")
"""Messages that are exchanged only between members of the same version."""


@pytest.mark.parametrize(
    ("name", "message", "encode", "decode", "stubs"), CASES, ids=lambda value: type(value).__name__
)
def test_fields_of_a_newer_version_are_ignored_everywhere(
    name: str, message: Any, encode: Callable[[Any], bytes], decode: Callable[[bytes], Any], stubs: Any
) -> None:
    sent = newer(stubs)[name].FromString(encode(message))
    data = with_new_fields(sent)
    assert len(data) > len(encode(message)) + 40
    if name in HOT:
        with pytest.raises(ProtocolError, match=f"{name}: damaged"):
            decode(data)
    else:
        assert decode(data) == message


@pytest.mark.parametrize(
    ("name", "decode"),
    [("WorkerMessage", decode_worker_message), ("CoordinatorMessage", decode_coordinator_message)],
)
def test_kinds_of_another_version_are_refused(name: str, decode: Callable[[bytes], Any]) -> None:
    message: Any = newer(control_pb2)[name]()
    message.kind_of_the_future = b"news"
    with pytest.raises(ProtocolError, match="of a kind that this version does not know"):
        decode(message.SerializeToString())


def test_another_version_arrives_as_it_was_sent() -> None:
    register = replace(REGISTER, protocol_version=PROTOCOL_VERSION + 98)
    assert decode_worker_message(encode_worker_message(register)) == register
