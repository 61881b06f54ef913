"""Measures how often the right one of four endings in HellaSwag is the likeliest. Tasks have llama.cpp's format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Final

from llamaclust.cluster.client.base import TextClient
from llamaclust.core.errors import UsageError
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.tools.evaluate.perplexity import read_text

AT_ONCE: Final = 8

_LINES: Final = 6
_NORMAL_95: Final = 1.95996398454


@dataclass(frozen=True, slots=True)
class Task:
    """A task. Each of the four token sequences in `endings` is the context, followed by an ending. The first
    `shared` tokens of all four are equal. `right` is the index of the right ending."""

    endings: tuple[tuple[int, ...], ...]
    shared: int
    right: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Counts tasks whose right ending has the highest sum of logprobs (`right`), or the highest mean (`right_norm`)."""

    tasks: int = 0
    right: int = 0
    right_norm: int = 0

    @property
    def acc(self) -> float:
        return self.right / self.tasks

    @property
    def acc_norm(self) -> float:
        return self.right_norm / self.tasks

    @property
    def acc_norm_range(self) -> tuple[float, float]:
        """The 95 % Wilson interval of `acc_norm`."""
        share, z = self.acc_norm, _NORMAL_95**2 / self.tasks
        half = z * math.sqrt(self.tasks * (4 * share * (1 - share) + z)) / (2 * _NORMAL_95)
        return (share + z / 2 - half) / (1 + z), (share + z / 2 + half) / (1 + z)

    def plus(self, task: Task, logprobs: Sequence[Sequence[float]]) -> Accuracy:
        """Returns the accuracy with one more task. `logprobs` has the logprobs of each ending's tokens."""
        sums = [math.fsum(ending) for ending in logprobs]
        means = [total / len(ending) for total, ending in zip(sums, logprobs, strict=True)]
        right, norm = sums.index(max(sums)) == task.right, means.index(max(means)) == task.right
        return Accuracy(self.tasks + 1, self.right + right, self.right_norm + norm)

    def as_json(self) -> dict[str, float | list[float]]:
        return {
            "acc": self.acc,
            "acc_norm": self.acc_norm,
            "acc_norm_95": list(self.acc_norm_range),
            "tasks": self.tasks,
        }


def read_tasks(path: Path, tokenizer: Tokenizer, most: int | None) -> list[Task]:
    """Reads the first `most` tasks. A task is six lines: context, number of the right ending, four endings. Raises
    UsageError if a task has another form."""
    lines = read_text(path).split("\n")
    if len(lines) % _LINES:
        raise UsageError(
            f"{path}: expected six lines for each task (context, number, four endings), found {len(lines)} lines"
        )
    starts = range(0, len(lines), _LINES)[:most]
    return [_task(path, tokenizer, lines[start : start + _LINES], start + 1) for start in starts]


def _task(path: Path, tokenizer: Tokenizer, lines: Sequence[str], line: int) -> Task:
    context, right, *endings = (text.removesuffix("\r") for text in lines)
    if right.strip() not in ("0", "1", "2", "3"):
        raise UsageError(
            f"{path}: line {line + 1}: expected the number of the right ending, 0 to 3, found {right[:40]!r}"
        )
    encoded = tuple(tuple(tokenizer.encode(f"{context} {ending}")) for ending in endings)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*encoded, strict=False)))
    shared = min(shared, min(map(len, encoded)) - 1)
    if shared < 1:
        raise UsageError(f"{path}: line {line}: the context's first token must be the same with all four endings")
    return Task(encoded, shared, int(right))


def measure_hellaswag(client: TextClient, tasks: Sequence[Task], on_task: Callable[[Accuracy], None]) -> Accuracy:
    value = Accuracy()
    with ThreadPoolExecutor(AT_ONCE, "hellaswag") as pool:
        try:
            for task, logprobs in zip(tasks, pool.map(lambda task: _score(client, task), tasks), strict=True):
                value = value.plus(task, logprobs)
                on_task(value)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return value


def _score(client: TextClient, task: Task) -> list[tuple[float, ...]]:
    return [client.generate(ending, max_tokens=0, score_from=task.shared).prompt_logprobs for ending in task.endings]
