"""Defines types and parsers of values in a cluster file, such as sizes, durations, addresses and layer ranges."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from llamaclust.core.addresses import split_address
from llamaclust.core.bounds import MAX_LAYERS, NAME
from llamaclust.core.limits import MAX_EXPERT_SHARDS

OFF = "off"
"""Value of `mmproj` that turns images off, even if the model's folder contains a projector."""
TAG = ":latest"
"""Tag that Ollama's clients append to a model name that has no tag."""
MAX_BYTES = 1 << 50
MAX_SECONDS = 30 * 86_400

_SIZE = r"(\d{1,15}(?:\.\d{1,6})?) ?(B|[kKMGT]B?|[KMGT]iB?)"
_SIZE_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_LEAST_WITHOUT_UNIT = 1 << 20
"""Minimum size that is accepted without a unit. A smaller number is probably not meant to be bytes."""
_DURATION = r"(\d{1,15}(?:\.\d{1,6})?) ?(ms|s|min|h)"
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}


_ORIGIN = r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?"
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
"""Default ports, which browsers omit from an origin."""
_GPU = r"cuda(:\d{1,3})?"
_MOST_GPUS = 16
_DEVICES = "give cpu, cuda:0, or several as cuda:0,cuda:1"
_MOST_SHOWN = 60


def shown(value: object) -> str:
    """Formats a value for an error message. Long texts and lists are shortened."""
    match value:
        case None:
            return "an empty value"
        case bool():
            return str(value).lower()
        case dict():
            return "a section of keys"
        case list() if len(value) > 4:
            return f"a list of {len(value)} items"
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else name + TAG


def parse_name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a name; put it in quotes")
    if not re.fullmatch(NAME, value):
        raise ValueError(
            f"{shown(value)} is not a name; write 1 to 63 letters, digits, dots, dashes or underscores, "
            "beginning and ending with a letter or digit"
        )
    return value


def parse_size(value: object) -> int:
    """Converts a size such as '8GiB', '512 MiB', '24Gi' or 1048576 to bytes. Raises ValueError if it is invalid."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,20}", value):
        value = int(value)
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is not None and 0 < number < _LEAST_WITHOUT_UNIT:
        raise ValueError(f"{shown(value)} has no unit: write {value}GiB, {value}MiB, or at least 1048576 bytes")
    size = number if isinstance(number, int) else _with_unit(value)
    if not 0 < size <= MAX_BYTES:
        raise ValueError(f"{shown(value)} is not a possible size; give 1B to 1024TiB")
    return size


def _parse_size_or_zero(value: object) -> int:
    return 0 if value in (0, "0") and not isinstance(value, bool) else parse_size(value)


def _with_unit(value: object) -> int:
    match = re.fullmatch(_SIZE, value, re.ASCII) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f"{shown(value)} is not a size; write it like 8GiB or 512MiB (KiB, MiB, GiB, TiB; kB, MB, GB, TB)"
        )
    base = 1024 if "i" in match[2] else 1000
    return round(float(match[1]) * float(base ** _SIZE_POWERS[match[2].rstrip("iB")]))


def parse_duration(value: object) -> float:
    """Converts a duration such as '600s', '10min', '250ms' or 600 to seconds. Raises ValueError if it is invalid."""
    seconds: float
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    else:
        match = re.fullmatch(_DURATION, value, re.ASCII) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f"{shown(value)} is not a duration; write it like 600s, 10min or 250ms")
        seconds = float(match[1]) * _DURATION_UNITS[match[2]]
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"{shown(value)} is not a possible duration; give more than 0 and at most 30 days")
    return float(seconds)


def _parse_address(value: object) -> object:
    split_address(value)
    return value


def _parse_layers(value: object) -> tuple[float, float]:
    match value:
        case [int() | float() as start, int() | float() as end] if not isinstance(start, bool) | isinstance(end, bool):
            pass
        case _:
            raise ValueError(f"{shown(value)} is not a layer range; write [0, 12] for layers 0 to 11")
    if not 0 <= start < end:
        raise ValueError(f"{shown(value)} is an empty layer range; ranges are half-open: [start, end) with start < end")
    if end > MAX_LAYERS:
        raise ValueError(f"{shown(value)} is not a layer range: no model has more than {MAX_LAYERS} layers")
    if any(place * MAX_EXPERT_SHARDS % 1 for place in (start, end)):
        what = f"a bound must be a multiple of 1/{MAX_EXPERT_SHARDS}, such as 4.5 for half of the experts of layer 4"
        raise ValueError(f"{shown(value)} is not a layer range: {what}")
    return start, end


def expand_home(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot contain a zero byte; give the path of a file or folder")
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ValueError(
            f"{shown(path)} begins with a home directory that does not exist; give the whole path"
        ) from error


def _parse_path(value: object) -> object:
    return Path(expand_home(value)) if isinstance(value, str) and value else value


def check_wire_type(value: object) -> object:
    if value in ("f16", "q8_0"):
        raise ValueError(f"{value} is not supported yet; give f32")
    return value


def parse_device(value: object) -> str:
    if value == "cpu":
        return "cpu"
    given = re.sub(r"^\[(.*)\]$", r"\1", value.strip()).split(",") if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not given or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{shown(value)} is not possible; {_DEVICES}")
    gpus = []
    for name in map(str.strip, given):
        found = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name)
        if found is None:
            what = (
                "cannot be combined with GPUs, which work together with the CPU anyway"
                if name == "cpu"
                else "is not a device"
            )
            raise ValueError(f"{shown(name)} {what}; {_DEVICES}")
        gpus.append(f"cuda:{int(found[1] or 0)}")
    if len(set(gpus)) < len(gpus) or len(gpus) > _MOST_GPUS:
        raise ValueError(f"{shown(value)}: list at most {_MOST_GPUS} GPUs, and each only once")
    return ",".join(gpus)


def parse_gpu_layers(value: str) -> int | None:
    if value == "auto":
        return None
    if not re.fullmatch(r"[0-9]{1,5}", value):
        raise ValueError(f"{shown(value)} is not a number of layers; give a whole number, or auto to fill VRAM")
    return int(value)


def parse_origin(value: object) -> str:
    """Parses the origin of a web page, such as https://chat.example. `*` allows all pages, `null` allows local files
    and sandboxed pages, and `localhost` allows pages from servers on the browser's machine. Raises ValueError if it is
    invalid."""
    given = value.lower().removesuffix("/") if isinstance(value, str) else ""
    if given in ("*", "null", "localhost"):
        return given
    match = re.fullmatch(_ORIGIN, given)
    if match is None:
        raise ValueError(f"{shown(value)} is not an origin of web pages; write it like https://chat.example")
    return given.removesuffix(_DEFAULT_PORTS.get(match[1], ""))


def parse_ray_address(value: object) -> object:
    if value not in ("auto", "none"):
        try:
            split_address(value)
        except ValueError as error:
            raise ValueError(f"{error}; auto and none are also possible") from error
    return value


class OrAuto:
    """Marks an optional field. In the cluster file and in the JSON schema, `auto` stands for None."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        read: Callable[[Any], Any] = lambda value: None if value == "auto" else value  # noqa: E731
        return core_schema.no_info_before_validator_function(read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json = handler(schema)
        json["anyOf"] = [{"const": "auto"}] + [option for option in json["anyOf"] if option.get("type") != "null"]
        return json


class OrWord:
    """Marks a field that also accepts `word`, which stands for `value` (default: a section without keys)."""

    def __init__(self, word: str, value: Any = MappingProxyType({})) -> None:
        self._word = word
        self._value = dict(value) if isinstance(value, Mapping) else value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        read: Callable[[Any], Any] = lambda value: self._value if value == self._word else value  # noqa: E731
        return core_schema.no_info_before_validator_function(read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json = handler(schema)
        return {**json, "anyOf": [{"const": self._word}, *json["anyOf"]]}


_SWITCHED = {"auto": True, "on": True, "true": True, "off": False, "false": False}


def switched(value: object) -> bool | None:
    return value if isinstance(value, bool) else _SWITCHED.get(value) if isinstance(value, str) else None


class OrOff:
    """Marks a field that also accepts `off` and false, which stand for `value`."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        read: Callable[[Any], Any] = lambda value: self._value if switched(value) is False else value  # noqa: E731
        return core_schema.no_info_before_validator_function(read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json = handler(schema)
        return {**json, "anyOf": [{"const": "off"}, {"const": False}, *json["anyOf"]]}


class OrSwitch:
    """Marks an optional section that also accepts a switch. `auto`, `on` and true stand for a section without keys.
    `off` and false stand for no section."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._read, handler(source))

    def _read(self, value: Any) -> Any:
        if value is None:
            raise ValueError("an empty value is not possible; give auto, off, or a section of keys")
        is_on = switched(value)
        return value if is_on is None else {} if is_on else None

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json = handler(schema)
        sections = [option for option in json["anyOf"] if option.get("type") != "null"]
        return {**json, "anyOf": [{"enum": ["auto", "on", "off"]}, {"type": "boolean"}, *sections]}


class OrText:
    """Marks a list of sections whose items can also be texts. It changes only the JSON schema."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json = handler(schema)
        return {**json, "items": {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 300}, json["items"]]}}


class OrCount:
    """Marks a list that also accepts a number N, which stands for N sections of `kind` with generated names."""

    def __init__(self, kind: type[BaseModel], most: int) -> None:
        self._kind = kind
        self._most = most

    def _read(self, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if not 1 <= value <= self._most:
            raise ValueError(f"{value} is not possible; give 1 to {self._most}")
        return [self._kind(name=f"any-{index + 1}") for index in range(value)]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"type": "integer", "minimum": 1, "maximum": self._most}]}


Device = Annotated[
    str,
    BeforeValidator(parse_device),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^(cpu|{_GPU}(,{_GPU})*)$"},
                {"type": "array", "items": {"type": "string", "pattern": f"^{_GPU}$"}, "minItems": 1, "maxItems": 16},
            ]
        }
    ),
]
Name = Annotated[str, BeforeValidator(parse_name), WithJsonSchema({"type": "string", "pattern": f"^{NAME}$"})]
_SIZE_SCHEMA: dict[str, Any] = {"type": ["string", "integer"], "pattern": f"^{_SIZE}$", "minimum": _LEAST_WITHOUT_UNIT}
Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema(_SIZE_SCHEMA)]
SizeOrZero = Annotated[
    int, BeforeValidator(_parse_size_or_zero), WithJsonSchema({"anyOf": [{"const": 0}, _SIZE_SCHEMA]})
]
Duration = Annotated[
    float, BeforeValidator(parse_duration), WithJsonSchema({"type": ["string", "number"], "pattern": f"^{_DURATION}$"})
]
Address = Annotated[str, BeforeValidator(_parse_address)]
Origin = Annotated[
    str,
    BeforeValidator(parse_origin),
    WithJsonSchema({"type": "string", "pattern": f"^(\\*|null|localhost|{_ORIGIN}/?)$"}),
]
FilePath = Annotated[Path, BeforeValidator(_parse_path), WithJsonSchema({"type": "string"})]
Layers = Annotated[
    tuple[int | float, int | float],
    BeforeValidator(_parse_layers),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "multipleOf": 1 / MAX_EXPERT_SHARDS},
            "minItems": 2,
            "maxItems": 2,
        }
    ),
]
