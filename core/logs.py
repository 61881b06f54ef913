"""Formats log lines as text for people, or as logfmt or JSON for programs. Also parses such lines."""

from __future__ import annotations

import errno
import json
import logging
import re
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from enum import StrEnum
from threading import Lock, Timer
from time import monotonic

_TEXT = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (?P<level>[A-Z]+) (?P<message>.*)")
_FIELD = re.compile(r'(?P<key>[a-z_]+)=(?P<value>"(?:[^"\\]|\\.)*"|\S*)(?: |$)')
_PLAIN = re.compile(r"[A-Za-z0-9_.:/@+-]+")

RECENT_S = 5.0
"""An error that a worker logged longer than this before its loss is not the cause."""
_OWN = "llamaclust"
_KEPT_LINES = 1000
_KEPT_CHARACTERS = 2000  # Maximum number of characters of a kept line.

FIELDS = ("request", "reason", "prompt_tokens", "tokens", "ttft_ms", "seconds")


class LogFormat(StrEnum):
    TEXT = "text"  # Time, level and message.
    LOGFMT = "logfmt"  # Pairs key=value.
    JSON = "json"  # One JSON object per line.


class _Fields(logging.Formatter):
    def __init__(self, form: LogFormat, where: Mapping[str, str]) -> None:
        super().__init__()
        self._is_json = form is LogFormat.JSON
        self._where = {key: value for key, value in where.items() if value}

    def name_cluster(self, name: str) -> None:
        self._where = {"cluster": name, **{key: value for key, value in self._where.items() if key != "cluster"}}

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields: dict[str, object] = {"time": at, "level": record.levelname.lower(), **self._where}
        fields["msg"] = record.getMessage()
        fields |= {key: getattr(record, key) for key in FIELDS if hasattr(record, key)}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        if self._is_json:
            return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def _quoted(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class _Memory(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.count = 0  # Number of all lines, including lines that are no longer kept.
        self.trouble = "", 0.0  # The last warning or error, and its time on the monotonic clock.

    def emit(self, record: logging.LogRecord) -> None:
        try:
            is_own = record.name.partition(".")[0] == _OWN
            if record.levelno >= (logging.WARNING if is_own else logging.ERROR):
                self.trouble = record.getMessage(), monotonic()
            for line in self.format(record).splitlines():
                self.lines.append(line[:_KEPT_CHARACTERS])
                self.count += 1
        except Exception:  # noqa: BLE001  every handler of `logging` does this
            self.handleError(record)


class FileShortage(logging.Filter):
    """Drops and counts log records about too many open files. Logs the count at most once per `wait_s` seconds."""

    def __init__(self, log: logging.Logger, wait_s: float = 5.0) -> None:
        super().__init__()
        self._log = log
        self._wait_s = wait_s
        self._lock = Lock()
        self._count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            return True
        with self._lock:
            self._count += 1
            if self._count == 1:
                timer = Timer(self._wait_s, self._report, (error.strerror,))
                timer.daemon = True
                timer.start()
        return False

    def _report(self, why: str) -> None:
        with self._lock:
            count, self._count = self._count, 0
        advice = "close connections, or raise the limit of open files (ulimit -n)"
        self._log.error("%s: %d failures in %g s; %s", why, count, self._wait_s, advice)


_memory = _Memory()


def start_logging(form: LogFormat, **where: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(plain if form is LogFormat.TEXT else _Fields(form, where))
    _memory.setFormatter(handler.formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler, _memory])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Otherwise httpx logs a line for each request.
    count_file_shortages()


def count_file_shortages() -> None:
    logging.getLogger("asyncio").addFilter(FileShortage(logging.getLogger(_OWN)))


def name_cluster(name: str) -> None:
    _memory.trouble = "", 0.0
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Fields):
            handler.formatter.name_cluster(name)


def recent_trouble() -> str:
    """Returns the last warning or error of this process, or "" if it is older than `RECENT_S` seconds."""
    text, at_s = _memory.trouble
    return text if monotonic() - at_s <= RECENT_S else ""


def last_lines() -> tuple[tuple[str, ...], int]:
    with _memory.lock or nullcontext():
        return tuple(_memory.lines), _memory.count - len(_memory.lines)


def read_line(line: str) -> tuple[str, str] | None:
    """Parses a log line in any format into (level in capitals, message). Returns None if no logger wrote the line."""
    text = _TEXT.fullmatch(line)
    if text is not None:
        return text["level"], text["message"]
    fields = _fields_of(line)
    level, message = fields.get("level"), fields.get("msg")
    if not isinstance(level, str) or not isinstance(message, str):
        return None
    error = fields.get("error")
    # The last line of a traceback contains the error.
    last = str(error).strip().rpartition("\n")[2] if error else message
    return level.upper(), last


def logged_at_s(line: str) -> float | None:
    """Returns the time of a log line in any format, in seconds since 1970. None if no logger wrote the line."""
    text = _TEXT.fullmatch(line)
    written = text["time"] if text is not None else _fields_of(line).get("time")
    try:
        return datetime.fromisoformat(str(written).replace(",", ".")).timestamp()
    except (ValueError, OverflowError):
        return None


def _fields_of(line: str) -> dict[str, object]:
    fields: dict[str, object] = {}
    at = 0
    try:
        if line.startswith("{"):
            parsed = json.loads(line)
            return parsed if isinstance(parsed, dict) else {}
        while found := _FIELD.match(line, at):
            at, value = found.end(), found["value"]
            fields[found["key"]] = json.loads(value, strict=False) if value.startswith('"') else value
    except (ValueError, RecursionError):
        return {}
    return fields if at == len(line) else {}
