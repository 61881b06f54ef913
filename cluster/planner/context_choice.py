"""Chooses the context length of a plan's stages by the memory that their weights leave."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.cluster.planner.chain import Chain
from llamaclust.cluster.planner.context import ContextBounds, ContextChoice


def with_context(chain: Chain) -> tuple[Chain, ContextChoice]:
    """Returns the stages with KV memory for the context that was chosen, and the choice. Layers do not move, so a
    model that runs with the shortest context runs as fast with a longer one."""
    request = chain.sizes.request
    bounds = request.context_bounds or ContextBounds.fixed(request.context_length)
    kept = request.kept_context
    tokens = bounds.longest(lambda length: not _missing_bytes(chain, length)) if kept is None else kept
    missing_bytes = _missing_bytes(chain, bounds.most) if tokens < bounds.most else 0
    return _lengthened(chain, tokens), ContextChoice(tokens, bounds, missing_bytes)


def _lengthened(chain: Chain, tokens: int) -> Chain:
    request = chain.sizes.request
    if tokens == request.context_length:
        return chain
    # A longer context must not mean that fewer sequences run together.
    window_blocks = chain.sizes.kv_groups.window_blocks(chain.kv_blocks)
    longer = replace(request, context_length=tokens, least_window_blocks=window_blocks)
    return replace(chain, sizes=replace(chain.sizes, request=longer))


def _missing_bytes(chain: Chain, tokens: int) -> int:
    sizes = _lengthened(chain, tokens).sizes
    return sum(sizes.of(each.costs, each.portion).context_shortfall(each.parts) for each in chain.members)
