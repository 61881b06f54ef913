"""Fusion for every backend. Groups matrix products of the same input. Joins attention with the rotations before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamaclust.model import program as ir


@dataclass(frozen=True, slots=True)
class Products:
    """Matrix products that read the same x. x is quantized once, and the threads synchronize once."""

    x: ir.Buffer
    steps: tuple[ir.MatMul, ...]


@dataclass(frozen=True, slots=True)
class Attend:
    attention: ir.Attention
    rotate_q: ir.Rope | None = None
    rotate_k: ir.Rope | None = None


@dataclass(frozen=True, slots=True)
class Adapts:
    x: ir.Buffer
    steps: tuple[ir.Adapt, ...]

    @property
    def adapter(self) -> int:
        return self.steps[0].adapter


FusedStep = (
    ir.Embed
    | Products
    | ir.HeadMatMul
    | Adapts
    | Attend
    | ir.StateStep
    | ir.Moe
    | ir.MixtureStep
    | ir.Exchange
    | ir.Gather
    | ir.RowsChange
    | ir.RowStep
)


def fuse(program: ir.Program) -> Iterator[FusedStep]:
    steps, at = program.steps, 0
    while at < len(steps):
        step = steps[at]
        if isinstance(step, ir.MatMul):
            products = _products(steps[at:])
            yield Products(step.x, products)
            at += len(products)
        elif isinstance(step, ir.Adapt):
            adapts = _adapts(steps[at:])
            yield Adapts(step.x, adapts)
            at += len(adapts)
        elif (attend := _attend(program, at)) is not None:
            yield attend
            at += 1 + (attend.rotate_q is not None) + (attend.rotate_k is not None)
        else:
            assert not isinstance(step, ir.Attention)
            yield step
            at += 1


def _products(steps: Sequence[ir.Step]) -> tuple[ir.MatMul, ...]:
    found: list[ir.MatMul] = []
    written: set[str] = set()
    for step in steps:
        if not isinstance(step, ir.MatMul) or step.out.name in written:
            break
        if found and (step.x != found[0].x or step.x.name in written):
            break
        found.append(step)
        written.add(step.out.name)
    return tuple(found)


def _adapts(steps: Sequence[ir.Step]) -> tuple[ir.Adapt, ...]:
    found: list[ir.Adapt] = []
    for step in steps:
        if not isinstance(step, ir.Adapt) or (found and (step.x, step.adapter) != (found[0].x, found[0].adapter)):
            break
        found.append(step)
    return tuple(found)


def _attend(program: ir.Program, at: int) -> Attend | None:
    """Returns the attention step with the rotations before it, or None if other steps read the rotated buffers."""
    ropes: dict[str, ir.Rope] = {}
    step = program.steps[at]
    while isinstance(step, ir.Rope):
        if step.x.name in ropes or at + 1 == len(program.steps):
            return None
        ropes[step.x.name] = step
        at += 1
        step = program.steps[at]
    if not isinstance(step, ir.Attention):
        return None
    read = step.reads
    parts = dict(zip((buffer.name for buffer in read[:2]), (step.heads, step.kv_heads), strict=False))
    fits = all(
        rope.heads == parts.get(name) and rope.head_dim == step.head_dim and not is_read(program, at + 1, name)
        for name, rope in ropes.items()
    )
    if not fits or len({buffer.name for buffer in read}) < len(read):
        return None if ropes else Attend(step)
    return Attend(step, ropes.get(step.q.name), None if step.shares_kv else ropes.get(step.k.name))


def is_read(program: ir.Program, at: int, name: str) -> bool:
    """True if the content of buffer `name` is the program's result, or is read by a step at index `at` or later."""
    for step in program.steps[at:]:
        if any(buffer.name == name for buffer in step.reads):
            return True
        if step.out.name == name:
            return False
    return name in {result.name for result in (program.out, program.normed) if result is not None}


Elementwise = ir.SiluMul | ir.Activate | ir.Add | ir.Mul | ir.Scale | ir.SoftCap


def elementwise(step: Elementwise) -> tuple[str, float | None]:
    match step:
        case ir.SiluMul():
            return "silu_mul", None
        case ir.Activate():
            return step.function, None
        case ir.Scale():
            return "scale", step.factor
        case ir.SoftCap():
            return "soft_cap", step.cap
        case ir.Add():
            return "add", None
        case ir.Mul():
            return "mul", None
