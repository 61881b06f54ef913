"""Splits fused products and mixtures of experts into steps that members of a group can divide separately."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llamaclust.model.program import (
    Adapt,
    Buffer,
    ExpertChoice,
    ExpertDown,
    ExpertInner,
    ExpertSum,
    MatMul,
    Moe,
    Slice,
    Step,
    read_before_written,
)


def separated(steps: Sequence[Step]) -> Iterator[Step]:
    at = 0
    while at < len(steps):
        step, at = steps[at], at + 1
        if isinstance(step, Moe):
            yield from _parts_of(step)
            continue
        if not isinstance(step, MatMul):
            yield step
            continue
        adapts = _adapts(step, steps[at:])
        slices = _slices(step, steps[at + len(adapts) :])
        behind = at + len(adapts) + len(slices)
        if not slices or _is_read(steps[behind:], step.out):
            yield step
            continue
        at, parts = behind, list[MatMul | Adapt]([step, *adapts])
        for part in parts:
            for cut in slices:
                yield replace(part.of_rows(range(cut.start, cut.start + cut.out.width)), out=cut.out)


def _adapts(product: MatMul, steps: Sequence[Step]) -> list[Adapt]:
    found: list[Adapt] = []
    for step in steps:
        if not isinstance(step, Adapt) or step.out != product.out:
            break
        found.append(step)
    return found


def _parts_of(mixture: Moe) -> Iterator[Step]:
    used = mixture.used
    choice, inner = Buffer("expert choice", 2 * used), Buffer("expert activations", used * mixture.ffn_width)
    results = Buffer("expert results", used * mixture.out.width)
    yield ExpertChoice(mixture, choice)
    yield ExpertInner(mixture, choice, inner)
    yield ExpertDown(mixture, choice, inner, results)
    yield ExpertSum(mixture, choice, results)


def _slices(product: MatMul, steps: Sequence[Step]) -> list[Slice]:
    found: list[Slice] = []
    for step in steps:
        if not isinstance(step, Slice) or step.x != product.out or step.heads > 1:
            break
        if step.out.name in {product.x.name, product.out.name}:
            break
        found.append(step)
    return found


def _is_read(steps: Sequence[Step], buffer: Buffer) -> bool:
    return buffer.name in {read.name for read in read_before_written(steps)}
