"""Which buffers steps read and write."""

from __future__ import annotations

from collections.abc import Iterable

from llamaclust.model import program as ir


def reads_of(step: ir.Step) -> tuple[ir.Buffer, ...]:
    """What it reads, in the order of its fields."""
    match step:
        case ir.Embed():
            return ()
        case ir.Attention():
            if step.shares_kv:
                return (step.q,)
            return (step.q, step.k) if step.v is None else (step.q, step.k, step.v)
        case ir.SiluMul():
            return step.gate, step.up
        case ir.Adapt():
            return step.x, step.out
        case ir.Add() | ir.Mul() | ir.Join() | ir.SigmoidGate() | ir.MatchMagnitude():
            return step.x, step.y
        case ir.Mix():
            return (step.x, step.y) if step.coefficients is None else (step.x, step.y, step.coefficients)
        case ir.DeltaRule():
            return step.q, step.k, step.v, step.decay, step.beta
        case ir.Scan():
            return step.x, step.dt
        case ir.Moe(routed=ir.Buffer() as routed):
            return step.x, routed
        case ir.ExpertShards():
            given = () if step.given is None else (step.given,)
            return step.x, step.choice, *given, *(step.carried or ())
        case ir.ExpertInner() | ir.ExpertDown() | ir.ExpertSum():
            return step.x, step.choice
        case ir.Exchange():
            return step.reads
        case ir.Gather():
            return () if step.x is None else (step.x,)
        case _:
            return (step.x,)


def written_by(step: ir.Step) -> ir.Buffer:
    """Its result."""
    return step.x if isinstance(step, ir.Rope) else step.out


def read_before_written(steps: Iterable[ir.Step], *results: ir.Buffer | None) -> tuple[ir.Buffer, ...]:
    """What has to be there before these steps, in the order of use; `results`: what is read behind them."""
    found: dict[str, ir.Buffer] = {}
    written: set[str] = set()
    for step in steps:
        found |= {buffer.name: buffer for buffer in reads_of(step) if buffer.name not in written | found.keys()}
        written.add(written_by(step).name)
    for result in results:
        if result is not None and result.name not in written | found.keys():
            found[result.name] = result
    return tuple(found.values())
