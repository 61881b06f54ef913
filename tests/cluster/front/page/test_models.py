"""Tests of the page's choice of a model, and of its sampling, which equals that of `llamaclust chat`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette

from llamaclust.cluster.client.http import Client
from llamaclust.cluster.client.session import ChatSession
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.models import ApiModel
from llamaclust.cluster.front.settings import ApiSettings
from support.browser.chatting import answers, ended, send
from support.browser.chromium import opened
from support.clusters.fakes import FakePipeline
from support.clusters.served import SETTINGS, ScriptedEngine, make_service, says, serving
from support.several_models.api_models import api_model

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytestmark = pytest.mark.asyncio(loop_scope="module")

RECOMMENDED: Mapping[str, Mapping[str, Any]] = {
    "first": {},
    "second": {"temperature": 0.3, "top_k": 7, "repeat_penalty": 1.5, "xtc_probability": 0.25},
}


def model_of(name: str, engine: ScriptedEngine) -> ApiModel:
    settings = ApiSettings(recommended=RECOMMENDED[name], strict_model=True, can_unload=True)
    idle, status = Engine(FakePipeline(SETTINGS.kv_blocks), SETTINGS), {"status": {"name": name}}
    return api_model(make_service(engine, name=name), idle, settings, status.copy)


def models_app(engines: Mapping[str, ScriptedEngine]) -> Starlette:
    return create_app([model_of(name, engine) for name, engine in engines.items()])


def chat_of_the_command(address: str, model: str) -> None:
    """Takes a turn like `llamaclust chat --served-model NAME --seed 11`."""
    with Client(address, model=model) as client:
        options = client.chat_sampling()
        options["seed"] = 11
        assert ChatSession(client, **options).send("Hi").text


async def test_each_model_is_asked_as_the_chat_command_asks_it(browser: Browser) -> None:
    engines = {name: ScriptedEngine(says(f"of {name}")) for name in RECOMMENDED}
    async with serving(models_app(engines)) as address, opened(browser, address) as seen:
        page = seen.page
        await page.get_by_role("button", name="Settings").click()
        await page.get_by_label("Seed").fill("11")
        await page.get_by_role("button", name="Close").click()
        for name, engine in engines.items():
            await page.get_by_label("Model", exact=True).select_option(name)
            await page.get_by_role("button", name="New chat").click()
            await send(page, "Hi")
            await ended(page)
            assert await answers(page) == [f"of {name}"]
            assert await page.locator(".message.assistant h2").inner_text() == name
            await asyncio.to_thread(chat_of_the_command, address, name)
            asked, other = engine.submitted
            assert (asked.prompt, asked.params, asked.seed) == (other.prompt, other.params, other.seed)
            assert asked.penalty_window == other.penalty_window
        seen.check()
    first, second = (engine.submitted[0].params for engine in engines.values())
    assert (first.temperature, first.top_k, first.top_p, first.min_p) == (0.8, 40, 0.95, 0.05)
    assert (second.temperature, second.top_k, second.repetition_penalty) == (0.3, 7, 1.5)
    assert second.chain is not None and second.chain.xtc_probability == 0.25


async def test_the_settings_show_the_numbers_of_the_chosen_model_which_stays_chosen(browser: Browser) -> None:
    engines = {name: ScriptedEngine(says("Yes")) for name in RECOMMENDED}
    async with serving(models_app(engines)) as address, opened(browser, address) as seen:
        page = seen.page
        for name, temperature in (("first", "0.8"), ("second", "0.3")):
            await page.get_by_label("Model", exact=True).select_option(name)
            assert await page.get_by_label("Temperature").get_attribute("placeholder") == temperature
        await page.reload()
        await page.get_by_text("second: ready").wait_for()
        assert await page.get_by_label("Model", exact=True).input_value() == "second"
        seen.check()
