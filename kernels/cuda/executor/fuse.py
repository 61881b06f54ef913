"""Fuses the small steps between two matrix products into one GPU launch, after the fusion in kernels/fuse.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from llamaclust.kernels.cuda.launches.elementwise import WIDEST_ROW
from llamaclust.kernels.cuda.launches.matmul import MOST_PRODUCTS
from llamaclust.kernels.fuse import Adapts, Attend, FusedStep, Products, fuse, is_read
from llamaclust.model import program as ir
from llamaclust.model.quant_types import ActivationFormat, QuantType
from llamaclust.model.steps.options import ActivationFunction

_MOST_STEPS = 4

TypeOf = Callable[[str], QuantType]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm of a row or, if `add` is set, of the sum of two rows. The result is written in each of `formats`."""

    norm: ir.RmsNorm
    add: ir.Add | None
    formats: frozenset[ActivationFormat]


@dataclass(frozen=True, slots=True)
class Gated:
    """Computes `out` = activation(gate) * up, and writes it only in the format that the next matrix product reads."""

    gate: ir.Buffer
    up: ir.Buffer
    out: ir.Buffer
    function: ActivationFunction
    format: ActivationFormat


@dataclass(frozen=True, slots=True)
class Attended:
    """Attention, fused with the norms of its heads. `format` is set if all readers want the same int8 format."""

    attend: Attend
    norms: tuple[ir.RmsNorm, ...] = ()
    format: ActivationFormat | None = None

    @property
    def steps(self) -> tuple[ir.Step, ...]:
        return *self.norms, *_plain(self.attend)

    @property
    def rotates(self) -> bool:
        q, k = self.attend.rotate_q, self.attend.rotate_k
        return q is not None and k is not None and (q.table, q.style, q.sections) == (k.table, k.style, k.sections)


GpuStep = FusedStep | Norm | Gated | Attended


def fuse_for_gpu(program: ir.Program, type_of: TypeOf) -> Iterator[GpuStep]:
    """Groups a program's steps into launches. All matrices of a `Products` step have the same quant type."""
    steps = tuple(fuse(program))
    at = done = 0  # Indices into `steps` and into the program's own steps.
    while at < len(steps):
        count, step = _fused(steps[at : at + _MOST_STEPS], _Reader(program, done, type_of))
        if isinstance(step, Products):
            yield from _of_one_type(step, type_of)
        else:
            yield step
        done += sum(len(_plain(step)) for step in steps[at : at + count])
        at += count


@dataclass(frozen=True, slots=True)
class _Reader:
    program: ir.Program
    done: int
    type_of: TypeOf

    def is_read(self, out: ir.Buffer, makers: int) -> bool:
        return is_read(self.program, self.done + makers, out.name)

    def formats(self, out: ir.Buffer, makers: int, reader: FusedStep) -> frozenset[ActivationFormat]:
        """Returns the formats in which `out` is read. The next `makers` steps compute `out`. `reader` follows them."""
        if isinstance(reader, ir.Exchange) and out in reader.reads:
            return frozenset({ActivationFormat.F32})
        weights = _weights_of(reader, out)
        found = {activation for name in weights if (activation := self.type_of(name).info.activation) is not None}
        if found and (_weighs_inputs(reader) or self.is_read(out, makers + len(_plain(reader)))):
            found.add(ActivationFormat.F32)
        return frozenset(found)


def _fused(steps: Sequence[FusedStep], reader: _Reader) -> tuple[int, GpuStep]:
    if (attended := _attended(steps, reader)) is not None:
        return attended
    match steps:
        case [ir.Add() as add, ir.RmsNorm() as norm, after, *_] if norm.x == add.out != norm.out and _fits(norm):
            if formats := reader.formats(norm.out, 2, after):
                return 2, Norm(norm, add, formats)
        case [ir.RmsNorm() as norm, after, *_] if _fits(norm):
            if formats := reader.formats(norm.out, 1, after):
                return 1, Norm(norm, None, formats)
        case [ir.SiluMul(gate, up, out), after, *_]:
            if (only := _single(reader.formats(out, 1, after))) is not None:
                return 1, Gated(gate, up, out, ActivationFunction.SILU, only)
        case [ir.Activate() as activate, ir.Mul() as mul, after, *_] if (
            mul.x == activate.out != mul.y and activate.out == mul.out
        ):
            if (only := _single(reader.formats(mul.out, 2, after))) is not None:
                return 2, Gated(activate.x, mul.y, mul.out, activate.function, only)
    return 1, steps[0]


def _attended(steps: Sequence[FusedStep], reader: _Reader) -> tuple[int, Attended] | None:
    norms: list[ir.RmsNorm] = []
    for count, step in enumerate(steps, 1):
        if isinstance(step, Attend):
            attended = Attended(step, tuple(norms))
            if norms and not _fuses_norms(attended, reader):
                return None
            after = steps[count:]
            formats = reader.formats(step.attention.out, len(attended.steps), after[0]) if after else frozenset()
            return count, replace(attended, format=_single(formats))
        if not isinstance(step, ir.RmsNorm):
            return None
        norms.append(step)
    return None


def _fuses_norms(attended: Attended, reader: _Reader) -> bool:
    attend, step, norms = attended.attend, attended.attend.attention, attended.norms
    read = step.reads
    heads = dict(zip((buffer.name for buffer in read[:2]), (step.heads, step.kv_heads), strict=False))
    rotates_before = not attended.rotates and (attend.rotate_q is not None or attend.rotate_k is not None)
    return (
        not (step.shares_kv or rotates_before)
        and _are_distinct(read)
        and _are_distinct([norm.x for norm in norms])
        and all(norm.x == norm.out and not norm.own_weights for norm in norms)
        and all(heads.get(norm.x.name) == norm.heads for norm in norms)
        and not any(reader.is_read(norm.x, len(attended.steps)) for norm in norms)
    )


def _are_distinct(buffers: Sequence[ir.Buffer]) -> bool:
    return len({buffer.name for buffer in buffers}) == len(buffers)


def _fits(norm: ir.RmsNorm) -> bool:
    return norm.heads == 1 and not norm.own_weights and norm.width <= WIDEST_ROW


def _single(formats: frozenset[ActivationFormat]) -> ActivationFormat | None:
    return next(iter(formats)) if len(formats) == 1 and ActivationFormat.F32 not in formats else None


def _weights_of(step: FusedStep, x: ir.Buffer) -> tuple[str, ...]:
    if isinstance(step, Products) and step.x == x:
        return tuple(product.weight for product in step.steps)
    if isinstance(step, ir.Moe) and step.routed is None and step.x == x:
        return (step.router,) if _weighs_inputs(step) else (step.router, *step.inner)
    return ()


def _weighs_inputs(step: FusedStep) -> bool:
    return isinstance(step, ir.Moe) and step.options.weighs_inputs


def _of_one_type(products: Products, type_of: TypeOf) -> Iterator[Products]:
    alike: dict[QuantType, list[ir.MatMul]] = {}
    for step in products.steps:
        alike.setdefault(type_of(step.weight), []).append(step)
    for steps in alike.values():
        for at in range(0, len(steps), MOST_PRODUCTS):
            yield replace(products, steps=tuple(steps[at : at + MOST_PRODUCTS]))


def _plain(step: FusedStep) -> tuple[ir.Step, ...]:
    match step:
        case Products() | Adapts():
            return step.steps
        case Attend():
            return *(rope for rope in (step.rotate_q, step.rotate_k) if rope is not None), step.attention
        case _:
            return (step,)
