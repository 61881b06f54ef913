"""Sampler chains as protobuf messages and back, for the codec alone; every field from a peer is checked."""

from __future__ import annotations

from collections.abc import Iterable

from llamaclust.core.bounds import bounded, finite
from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_CONTEXT_TOKENS, MAX_VOCABULARY
from llamaclust.core.sampler_chain import SAMPLERS, SamplerChain
from llamaclust.core.sampling_bounds import CHAIN_BOUNDS, MAX_BREAKER_TOKENS, MAX_BREAKERS, MAX_MIROSTAT
from llamaclust.proto import sampling_pb2 as sampling_proto


def chain_out(chain: SamplerChain | None) -> sampling_proto.SamplerChain | None:
    if chain is None:
        return None
    return sampling_proto.SamplerChain(
        order=[SAMPLERS.index(step) for step in chain.order],
        dry_allowed_length=chain.dry_allowed_length,
        mirostat=chain.mirostat,
        unpenalized=chain.unpenalized,
        **{name: getattr(chain, name) for name in CHAIN_BOUNDS},
    )


def chain_in(message: sampling_proto.SamplingParams) -> SamplerChain | None:
    """The chain of sampling parameters, if they have one. ProtocolError for one out of bounds."""
    if not message.HasField("chain"):
        return None
    chain = message.chain
    bounded("steps", len(chain.order), 0, len(SAMPLERS))
    steps = tuple(SAMPLERS[bounded("step", number, 0, len(SAMPLERS) - 1)] for number in chain.order)
    if len(set(steps)) < len(steps):
        raise ProtocolError("a sampler stands twice in one order")
    bounded("unpenalized", len(chain.unpenalized), 0, MAX_VOCABULARY)
    return SamplerChain(
        steps,
        dry_allowed_length=bounded("dry_allowed_length", chain.dry_allowed_length, 1, MAX_CONTEXT_TOKENS),
        mirostat=bounded("mirostat", chain.mirostat, 0, MAX_MIROSTAT),
        unpenalized=_tokens(chain.unpenalized),
        **{name: finite(name, getattr(chain, name), *bounds) for name, bounds in CHAIN_BOUNDS.items()},
    )


def breakers_in(messages: Iterable[sampling_proto.TokenSequence]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of DRY. ProtocolError for too many or one that is empty or too long."""
    sequences = tuple(_tokens(message.tokens) for message in messages)
    bounded("breakers", len(sequences), 0, MAX_BREAKERS)
    for sequence in sequences:
        bounded("tokens of a breaker", len(sequence), 1, MAX_BREAKER_TOKENS)
    return sequences


def _tokens(values: Iterable[int]) -> tuple[int, ...]:
    tokens = tuple(values)
    bounded("token", max(tokens, default=0), 0, MAX_VOCABULARY - 1)
    return tokens
