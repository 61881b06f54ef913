"""A restricted interpreter for the pickle of a PyTorch state dict. The interpreter builds numbers, text, lists, dicts
and references to tensors. It refuses everything else, and runs no code from the pickle."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.storage import MAX_DIMENSIONS, Storage
from llamaclust.model.gguf.values import shown

_MAX_STEPS: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class StorageRef:
    storage: Storage
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor as a view of a storage. Offset and strides are in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Named:
    name: str
    call: Callable[[tuple[Any, ...]], Any]


class _Refused(Exception):
    """The pickle contains something that is not allowed."""


class _Mark:
    """Marks the start of a list of arguments on the stack."""


_MARK: Final = _Mark()
_STORAGES: Final = {
    "DoubleStorage": Storage.F64,
    "FloatStorage": Storage.F32,
    "HalfStorage": Storage.F16,
    "BFloat16Storage": Storage.BF16,
    "LongStorage": Storage.I64,
    "IntStorage": Storage.I32,
    "ShortStorage": Storage.I16,
    "CharStorage": Storage.I8,
    "ByteStorage": Storage.U8,
    "BoolStorage": Storage.BOOL,
}


def read_pickle(data: bytes, origin: str) -> Any:
    machine = _Machine()
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step > _MAX_STEPS:
                raise _Refused(f"the pickle has more than {_MAX_STEPS} steps")
            if opcode.name == "STOP":
                return machine.pop()
            machine.run(opcode.name, argument)
    except _Refused as refused:
        raise ModelFileError(f"{origin}: {refused}; no code was run; use a safetensors checkpoint") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        what = " ".join(str(error).split())[:100]
        raise ModelFileError(f"{origin}: the pickle is damaged or was cut short ({what})") from None
    raise ModelFileError(f"{origin}: the pickle has no end: it was cut short")


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name == "POP":
            self.pop()
            return
        if name not in _ACTIONS:
            of = f" {shown(argument)}" if isinstance(argument, str) else ""
            raise _Refused(f"the pickle uses {name}{of}, which no state dict needs")
        self._stack.append(_ACTIONS[name](self, argument))

    def pop(self) -> Any:
        return self._stack.pop()

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise IndexError("too few values")
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def to_mark(self) -> tuple[Any, ...]:
        place = next((i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i] is _MARK), None)
        if place is None:
            raise IndexError("no mark")
        values = tuple(self._stack[place + 1 :])
        del self._stack[place:]
        return values

    def remember(self, place: Any) -> Any:
        value = self._stack.pop()
        self._memo[len(self._memo) if place is None else place] = value
        return value

    def recall(self, place: Any) -> Any:
        return self._memo[place]

    def set_items(self, values: tuple[Any, ...], target: Any = None) -> Any:
        target = self._stack.pop() if target is None else target
        if not isinstance(target, dict) or len(values) % 2:
            raise _Refused("the pickle puts items into something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise _Refused("the pickle has a dict whose keys are not names")
            target[key] = value
        return target

    def append_values(self, values: tuple[Any, ...]) -> Any:
        target = self._stack.pop()
        if not isinstance(target, list):
            raise _Refused("the pickle appends to something that is not a list")
        target.extend(values)
        return target

    def call(self, argument: Any) -> Any:
        target, arguments = self.last(2)
        if not isinstance(target, _Named) or not isinstance(arguments, tuple):
            raise _Refused("the pickle calls something that is not a function")
        return target.call(arguments)

    def set_state(self, argument: Any) -> Any:
        """Drops the state. In a PyTorch state dict, the state holds only the versions of modules."""
        target, state = self.last(2)
        if not isinstance(target, dict) or not isinstance(state, dict):
            raise _Refused("the pickle sets the state of something that is not a dict")
        return target


_IGNORED: Final = frozenset({"PROTO", "FRAME"})
_NUMBERS: Final = ("BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG", "BINFLOAT", "FLOAT")
_TEXTS: Final = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
_BYTES: Final = ("BINSTRING", "SHORT_BINSTRING", "STRING", "BINBYTES", "SHORT_BINBYTES")
_ACTIONS: Final[dict[str, Callable[[_Machine, Any], Any]]] = {
    **dict.fromkeys((*_NUMBERS, *_TEXTS, *_BYTES), lambda _, argument: argument),
    "NONE": lambda *_: None,
    "NEWTRUE": lambda *_: True,
    "NEWFALSE": lambda *_: False,
    "EMPTY_TUPLE": lambda *_: (),
    "EMPTY_LIST": lambda *_: [],
    "EMPTY_DICT": lambda *_: {},
    "MARK": lambda *_: _MARK,
    "TUPLE1": lambda machine, _: machine.last(1),
    "TUPLE2": lambda machine, _: machine.last(2),
    "TUPLE3": lambda machine, _: machine.last(3),
    "TUPLE": lambda machine, _: machine.to_mark(),
    "LIST": lambda machine, _: list(machine.to_mark()),
    "DICT": lambda machine, _: machine.set_items(machine.to_mark(), {}),
    "APPEND": lambda machine, _: machine.append_values(machine.last(1)),
    "APPENDS": lambda machine, _: machine.append_values(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), _Machine.recall),
    "GLOBAL": lambda _, argument: _allowed(*str(argument).partition(" ")[::2]),
    "STACK_GLOBAL": lambda machine, _: _allowed(*machine.last(2)),
    "REDUCE": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": lambda machine, _: _storage(machine.pop()),
}


def _storage(reference: Any) -> StorageRef:
    if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
        raise _Refused("the pickle refers to something that is not a storage")
    _, kind, key, _, count = reference
    if not isinstance(kind, _Named) or kind.name not in _STORAGES or not isinstance(key, str):
        raise _Refused("the pickle refers to a storage of an unknown type")
    if type(count) is not int or not 0 <= count < 1 << 48:
        raise _Refused("the pickle refers to a storage of an impossible size")
    return StorageRef(_STORAGES[kind.name], key, count)


def _allowed(module: Any, name: Any) -> _Named:
    if not isinstance(module, str) or not isinstance(name, str):
        raise _Refused("the pickle has a name that is not text")
    full = f"{module}.{name}"
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _Named(name, _refuse_call)
    if full not in _FUNCTIONS:
        raise _Refused(f"the pickle names {shown(full)}, which no state dict needs")
    return _Named(full, _FUNCTIONS[full])


def _refuse_call(arguments: tuple[Any, ...]) -> Any:
    raise _Refused("the pickle calls a storage type as a function")


def _tensor(arguments: tuple[Any, ...]) -> TensorRef:
    """Makes a tensor from the arguments (storage, offset, shape, strides, requires_grad, hooks, ...)."""
    if len(arguments) < 4 or not isinstance(arguments[0], StorageRef):
        raise _Refused("the pickle makes a tensor of something that is not a storage")
    numbers = [arguments[1], *_shape(arguments[2]), *_shape(arguments[3])]
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise _Refused("the pickle makes a tensor with a shape that is not numbers")
    return TensorRef(arguments[0], arguments[1], arguments[2], arguments[3])


def _shape(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise _Refused("the pickle makes a tensor whose shape is not a tuple")
    if len(value) > MAX_DIMENSIONS:
        raise _Refused(f"the pickle makes a tensor of {len(value)} dimensions; the limit is {MAX_DIMENSIONS}")
    return value


def _parameter(arguments: tuple[Any, ...]) -> TensorRef:
    if not arguments or not isinstance(arguments[0], TensorRef):
        raise _Refused("the pickle makes a parameter of something that is not a tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str | int, Any]:
    if not arguments:
        return {}
    if len(arguments) > 1 or not isinstance(arguments[0], list):
        raise _Refused("the pickle makes a dict of something that is not a list")
    pairs: list[Any] = [pair for pair in arguments[0] if isinstance(pair, tuple | list) and len(pair) == 2]
    if len(pairs) < len(arguments[0]) or not all(isinstance(key, str) for key, _ in pairs):
        raise _Refused("the pickle makes a dict of something that is not a list of names and values")
    found = dict(pairs)
    arguments[0].clear()  # Without this, a small pickle could make many dicts from one list.
    return found


_FUNCTIONS: Final[dict[str, Callable[[tuple[Any, ...]], Any]]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda arguments: _shape(arguments[0]),
    "collections.OrderedDict": _ordered_dict,
}
