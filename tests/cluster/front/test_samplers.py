"""Tests of further samplers: fields of requests, the engine's requests, and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest

from llamaclust.cluster.client.http import Client
from llamaclust.cluster.client.http_codec import AnswerOptions
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.sampler.params import PLAIN_ORDER, SamplerChain, SamplerName
from support.clusters.served import CONTEXT, ScriptedEngine, client, make_app, says
from support.models.tiny_model import build_tiny_model

ENDPOINTS: dict[str, dict[str, Any]] = {
    "/completion": {"prompt": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
}


async def asked(path: str, **given: Any) -> GenerationRequest:
    engine = ScriptedEngine(says("a"))
    async with client(make_app(engine)) as http:
        reply = await http.post(path, json={**ENDPOINTS[path], **given})
    assert reply.status_code == 200, reply.text
    return engine.submitted[0]


async def chain_of(path: str, **given: Any) -> SamplerChain:
    chain = (await asked(path, **given)).params.chain
    assert chain is not None
    return chain


SETTINGS = {
    "top_n_sigma": (SamplerName.TOP_N_SIGMA, 1.5),
    "tfs_z": (SamplerName.TFS_Z, 0.9),
    "typical_p": (SamplerName.TYPICAL_P, 0.8),
    "xtc_probability": (SamplerName.XTC, 0.5),
    "dry_multiplier": (SamplerName.DRY, 0.7),
}


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_every_sampler_can_be_requested(path: str) -> None:
    for name, (step, value) in SETTINGS.items():
        chain = await chain_of(path, **{name: value})
        assert getattr(chain, name) == value
        assert set(chain.order) == {*PLAIN_ORDER, step} and list(chain.order) == [
            s for s in SamplerName if s in chain.order
        ]
    chain = await chain_of(path, dynatemp_range=0.5, dynatemp_exponent=2)
    assert (chain.order, chain.dynatemp_range, chain.dynatemp_exponent) == (PLAIN_ORDER, 0.5, 2)
    chain = await chain_of(path, mirostat=2, mirostat_tau=4, mirostat_eta=0.3)
    assert chain.order == (SamplerName.PENALTIES, SamplerName.TEMPERATURE)
    assert (chain.mirostat, chain.mirostat_tau, chain.mirostat_eta) == (2, 4, 0.3)


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_settings_that_do_nothing_need_no_chain(path: str) -> None:
    for given in (
        {},
        {"mirostat_tau": 3.0, "dry_base": 2, "xtc_threshold": 0.3, "dynatemp_exponent": 2.0},
        {"xtc_probability": 0.5, "xtc_threshold": 0.6},
        {"samplers": ["penalties", "dry", "top_n_sigma", "top-k", "typ-p", "nucleus", "min_p", "xtc", "temp"]},
        {"samplers": "edskypmxt", "penalize_nl": False},
    ):
        assert (await asked(path, **given)).params.chain is None


async def test_the_requested_order_of_samplers_is_kept() -> None:
    assert (await chain_of("/completion", samplers=["temperature", "top_k"])).order == (
        SamplerName.TEMPERATURE,
        SamplerName.TOP_K,
    )
    assert (await chain_of("/completion", samplers="pt")).order == (SamplerName.TOP_P, SamplerName.TEMPERATURE)
    assert (await chain_of("/completion", samplers=[])).order == ()


async def test_windows_breakers_and_line_breaks() -> None:
    generation = await asked("/completion", dry_multiplier=1, dry_sequence_breakers=["\n"], repeat_penalty=1.1)
    assert (
        (generation.dry_window, generation.penalty_window) == (CONTEXT, 64)
        and generation.breakers
        and generation.history_window == CONTEXT
    )
    assert generation.params.chain is not None and generation.params.chain.unpenalized == ()
    generation = await asked("/completion", dry_multiplier=1, dry_penalty_last_n=9, dry_sequence_breakers=[])
    assert (generation.dry_window, generation.breakers, generation.history_window) == (9, {}, 9)
    chain = await chain_of("/v1/completions", penalize_nl=False, repetition_penalty=1.2)
    assert chain.order == PLAIN_ORDER and len(chain.unpenalized) == 1


# -- answers of the real engine ----------------------------------------------------------------------------------------

EVERYTHING: dict[str, AnswerOptions] = {
    "top_n_sigma": {"top_n_sigma": 1.0},
    "tfs_z": {"tfs_z": 0.7},
    "typical_p": {"typical_p": 0.4},
    "xtc": {"xtc_probability": 0.7, "xtc_threshold": 0.001},
    "dynatemp": {"dynatemp_range": 0.9},
    "mirostat 1": {"mirostat": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.5},
    "mirostat 2": {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.5},
    "dry": {"dry_multiplier": 30.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["a"]},
    "penalties": {"repetition_penalty": 1.3, "penalize_nl": False},
    "order": {"samplers": ["temperature", "xtc", "top_p", "penalties", "typ_p"], "typical_p": 0.9, "top_p": 0.9},
}
BASE: AnswerOptions = {"max_tokens": 60, "temperature": 1.2, "seed": 5, "ignore_eos": True}


def _with(options: Mapping[str, Any]) -> AnswerOptions:
    return cast(AnswerOptions, {**BASE, **options})


def answers(path: Path, settings: LocalSettings, *, together: bool) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    prompts = [[3 + number, *range(20, 20 + 3 * number)] for number in range(len(EVERYTHING))]
    with Client.local(path, 1, settings=settings) as model:
        streams = [
            model.generate(prompt, stream=True, **_with(options))
            for prompt, options in zip(prompts, EVERYTHING.values(), strict=True)
        ]
        if together:
            chunks: list[list[Any]] = [[next(stream)] for stream in streams]
        else:
            chunks = [[] for _ in streams]
        for place, stream in enumerate(streams):
            chunks[place] += list(stream)
    return [
        (tuple(t for c in answer for t in c.token_ids), tuple(p for c in answer for p in c.logprobs))
        for answer in chunks
    ]


def test_company_and_preemption_change_no_answer(tmp_path: Path) -> None:
    """Compares requests, one per sampler, alone, together, and with so little memory that they are preempted."""
    path = build_tiny_model(tmp_path / "m.gguf")
    alone = answers(path, LocalSettings(context_length=128, prefix_cache=False), together=False)
    assert len({tokens for tokens, _ in alone}) == len(alone)
    assert answers(path, LocalSettings(context_length=128, prefill_chunk=3), together=True) == alone
    assert answers(path, LocalSettings(context_length=128, kv_blocks=12, max_sequences=6), together=True) == alone


def test_each_sampler_makes_a_difference(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m.gguf")
    with Client.local(path, 1, settings=LocalSettings(context_length=128)) as model:
        plain = model.generate([3, 4, 5], **BASE).token_ids
        for name, options in EVERYTHING.items():
            assert model.generate([3, 4, 5], **_with(options)).token_ids != plain, name
    assert {field.name for field in fields(SamplerChain)} >= set(SETTINGS)
