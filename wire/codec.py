"""Encodes dataclasses as protobuf messages with the same field names, and decodes them. Decoding checks the bounds in
`Annotated` types (core/bounds.py), and then calls the dataclass's `check` method."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from google.protobuf.message import DecodeError, Message

from llamaclust.core.bounds import LOCAL, Bound
from llamaclust.core.errors import ProtocolError

PROTOCOL_VERSION = 6  # The handshake refuses a peer with another version.

_Message = TypeVar("_Message", bound=Message)
_Value = TypeVar("_Value")


def parse(kind: type[_Message], data: bytes, most_bytes: int) -> _Message:
    """Parses a message of type `kind`. Raises ProtocolError if `data` is damaged or longer than `most_bytes`."""
    if len(data) > most_bytes:
        raise ProtocolError(f"{kind.__name__}: the message has {len(data)} bytes; the limit is {most_bytes}")
    message = None
    # The traceback of a DecodeError would keep `data` in memory, so the error is raised below.
    with suppress(DecodeError):
        message = kind.FromString(data)
    if message is None:
        raise ProtocolError(f"{kind.__name__}: the message is damaged and cannot be decoded")
    message.DiscardUnknownFields()  # Fields of a newer version have not been checked, so they are dropped.
    return message


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    label: str  # Names the message and the field in errors.
    nested: type | None
    is_repeated: bool
    is_optional: bool
    bounds: tuple[Bound, ...]  # Bounds of each value.
    sizes: tuple[Bound, ...]  # Bounds on the length of a repeated field.

    def write(self, value: Any, record: Any) -> None:
        if self.nested is None:
            if self.is_repeated:
                getattr(record, self.name).extend(map(self._fit, value))
            else:
                setattr(record, self.name, self._fit(value))
        elif self.is_repeated:
            for item in value:
                write(item, getattr(record, self.name).add())
        else:
            write(value, getattr(record, self.name))

    def _fit(self, value: Any) -> Any:
        for bound in self.bounds:
            value = bound.fit(value)
        return value

    def read(self, record: Any) -> Any:
        if self.is_optional and not record.HasField(self.name):
            return None
        value = getattr(record, self.name)
        if not self.is_repeated:
            return self._read_item(value)
        for size in self.sizes:
            size.check(self.label, value)
        return tuple(map(self._read_item, value))

    def _read_item(self, value: Any) -> Any:
        if self.nested is not None:
            return read(self.nested, value)
        for bound in self.bounds:
            value = bound.check(self.label, value)
        return value


_known: dict[type, tuple[_Field, ...]] = {}


def _fields(kind: Any) -> tuple[_Field, ...]:
    if kind not in _known:
        hints = get_type_hints(kind, include_extras=True)
        sent = (field.name for field in fields(kind) if field.metadata != LOCAL)
        _known[kind] = tuple(_compiled(kind, name, hints[name]) for name in sent)
    return _known[kind]


def _compiled(kind: type, name: str, hint: Any) -> _Field:
    is_optional = get_origin(hint) in (Union, UnionType)
    if is_optional:
        (hint,) = (choice for choice in get_args(hint) if choice is not NoneType)
    hint, bounds = _without_bounds(hint)
    is_repeated, sizes = get_origin(hint) is tuple, bounds
    if is_repeated:
        hint, bounds = _without_bounds(get_args(hint)[0])
    label = f"{kind.__name__}.{name}"
    nested: Any = hint if is_dataclass(hint) else None
    if not bounds and (hint in (str, float) or (is_repeated and not sizes)):
        raise TypeError(f"{label}: the type hint has no bound; add one from core/bounds.py")
    return _Field(name, label, nested, is_repeated, is_optional, bounds, sizes if is_repeated else ())


def _without_bounds(hint: Any) -> tuple[Any, tuple[Bound, ...]]:
    if get_origin(hint) is not Annotated:
        return hint, ()
    inner, *bounds = get_args(hint)
    return inner, tuple(bounds)


def write(message: Any, record: Any) -> None:
    record.SetInParent()
    for field in _fields(type(message)):
        value = getattr(message, field.name)
        if value is not None:
            field.write(value, record)


def read(kind: type[_Value], record: Any) -> _Value:
    message = kind(**{field.name: field.read(record) for field in _fields(kind)})
    check: Callable[[], None] | None = getattr(message, "check", None)
    if check is not None:
        check()
    return message


class Envelope(Generic[_Value]):
    """A codec of messages with a `oneof kind`. The field of PeerUnreachable, for example, is `peer_unreachable`."""

    def __init__(self, record: type[Message], union: Any, most_bytes: int) -> None:
        self._record = record
        self._most_bytes = most_bytes
        kinds: tuple[type, ...] = get_args(union)
        self._names = {kind: re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower() for kind in kinds}
        self._kinds = {name: kind for kind, name in self._names.items()}
        known = {field.name for field in record.DESCRIPTOR.oneofs_by_name["kind"].fields}
        assert known == self._kinds.keys(), known ^ self._kinds.keys()

    def encode(self, message: _Value) -> bytes:
        record = self._record()
        write(message, getattr(record, self._names[type(message)]))
        return record.SerializeToString()

    def decode(self, data: bytes) -> _Value:
        """Decodes a message. Raises ProtocolError if it is damaged, of unknown kind, or has a field out of bounds."""
        record: Any = parse(self._record, data, self._most_bytes)
        name = record.WhichOneof("kind")
        if name is None:
            raise ProtocolError(f"{self._record.__name__}: the message is of a kind that this version does not know")
        message: _Value = read(self._kinds[name], getattr(record, name))
        return message
