"""Encodes sampling inputs. The last stage decodes them in native code (kernels/cpu/native/frames)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from struct import Struct
from typing import Final

from llamaclust.core.sampler.fields import numbers_of
from llamaclust.core.sampler.params import CHAIN, PARAMS, SAMPLERS, SamplerChain, SamplingParams
from llamaclust.core.sampler.tasks import RowTask, SampleTask
from llamaclust.proto import sampling_pb2 as sampling_proto
from llamaclust.wire.microbatch.codec import int32
from llamaclust.wire.microbatch.matchers import starts_out
from llamaclust.wire.microbatch.messages import SamplingInputs

PREPARE_MATCHERS: Final = b""
"""An empty message in place of sampling inputs. It announces that answers with matchers will follow."""

_TASK = Struct("<iiQIIIIiiIIII")
_CHAINED = Struct("<dIIII")
_MATCHER_ROW = Struct("<3Q")
_PARAMS_KEPT = 256


def encode_inputs(inputs: SamplingInputs) -> bytes:
    tasks = _Tasks()
    for row, task in enumerate(inputs.tasks):
        tasks.add(row, task)
    message = sampling_proto.SamplingInputs(
        epoch=inputs.epoch,
        number=inputs.number,
        params=tasks.params,
        tasks=b"".join(tasks.records),
        tokens=tasks.tokens.tobytes(),
        chained=b"".join(tasks.chained),
        breakers=tasks.breakers.tobytes(),
        matcher_rows=b"".join(tasks.matcher_rows),
        released=array("Q", inputs.released).tobytes(),
        starts=starts_out(inputs.starts) if inputs.starts else None,
    )
    return message.SerializeToString()


class _Tasks:
    """Collects the arrays of a SamplingInputs message. Equal parameters and shared token lists are stored once."""

    def __init__(self) -> None:
        self.params: dict[bytes, int] = {}
        self.records: list[bytes] = []
        self.tokens = array("i")
        self.chained: list[bytes] = []
        self.breakers = array("I")
        self.matcher_rows: list[bytes] = []
        # (index of the first token, number of tokens) of each stored list, by the list's id().
        self._written: dict[int, tuple[int, int]] = {}

    def add(self, row: int, task: RowTask) -> None:
        if not isinstance(task, SampleTask):
            self.records.append(_TASK.pack(-1, task.token, 0, 0, 0, task.top_logprobs, 0, -1, -1, 0, 0, 0, 0))
            return
        params = self.params.setdefault(_params_bytes(task.params), len(self.params))
        penalty, dry = (-1 if window is None else window for window in (task.penalty_window, task.dry_window))
        place = task.seed, task.choice, task.position
        lists = *self._place(task.history), *self._place(task.suppressed)
        self.records.append(_TASK.pack(params, 0, *place, task.top_logprobs, task.history_rows, penalty, dry, *lists))
        if task.breakers or task.mu:
            first = len(self.breakers) // 2
            for breaker in task.breakers:
                self.breakers.extend(self._place(breaker))
            self.chained.append(_CHAINED.pack(task.mu, row, first, len(task.breakers), 0))
        if task.matcher is not None:
            self.matcher_rows.append(_MATCHER_ROW.pack(row, task.matcher.key, task.matcher.position))

    def _place(self, tokens: Sequence[int]) -> tuple[int, int]:
        if not tokens:
            return 0, 0
        if (found := self._written.get(id(tokens))) is None:
            found = self._written[id(tokens)] = len(self.tokens), len(tokens)
            self.tokens.extend(tokens)
        return found


@lru_cache(_PARAMS_KEPT)
def _params_bytes(params: SamplingParams) -> bytes:
    return sampling_proto.SamplingParams(
        logit_bias_tokens=int32((token,) for token, _ in params.logit_bias),
        logit_biases=array("f", [bias for _, bias in params.logit_bias]).tobytes(),
        chain=None if params.chain is None else _chain_out(params.chain),
        **numbers_of(params, PARAMS),
    ).SerializeToString()


def _chain_out(chain: SamplerChain) -> sampling_proto.SamplerChain:
    return sampling_proto.SamplerChain(
        order=array("i", map(SAMPLERS.index, chain.order)).tobytes(),
        unpenalized=array("i", chain.unpenalized).tobytes(),
        **numbers_of(chain, CHAIN),
    )
