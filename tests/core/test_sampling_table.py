"""Checks that the sampling table agrees with the messages, the Python client and docs/api.md."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from llamaclust.cluster.client.http_codec import AnswerOptions
from llamaclust.core.sampler.fields import Dialect
from llamaclust.core.sampler.params import CHAIN, PARAMS, SamplerChain, SamplingParams
from llamaclust.core.sampler.table import MAIN_NUMBERS, SAMPLING_TABLE
from llamaclust.proto import sampling_pb2
from support.paths import ROOT


@pytest.mark.parametrize("name", SAMPLING_TABLE)
def test_defaults_are_numbers_of_the_row_s_kind_within_its_bounds(name: str) -> None:
    row = SAMPLING_TABLE[name]
    for default in (*map(row.default_in, Dialect), row.low, row.high):
        assert row.low <= default <= row.high and type(default) is (int if row.is_whole else float)
    assert row.doc[0].isupper() and row.doc.endswith(".") and ". " not in row.doc
    assert row.is_whole is (row.placeholder == "N")


@pytest.mark.parametrize(("message", "kind", "rows"), [
    (sampling_pb2.SamplingParams, SamplingParams, PARAMS), (sampling_pb2.SamplerChain, SamplerChain, CHAIN),
])  # fmt: skip
def test_messages_have_a_field_for_each_row(
    message: type[sampling_pb2.SamplingParams], kind: Any, rows: dict[str, object]
) -> None:
    arrays = {"logit_bias_tokens": "logit_bias", "logit_biases": "logit_bias"}
    sent = {arrays.get(field.name, field.name) for field in message.DESCRIPTOR.fields}
    assert sent == {field.name for field in fields(kind)} and rows.keys() <= sent
    reals = [field.name for field in message.DESCRIPTOR.fields if field.type == field.TYPE_DOUBLE]
    assert reals == [name for name in rows if not SAMPLING_TABLE[name].is_whole], "the native reader has their order"


@pytest.mark.parametrize("name", SAMPLING_TABLE)
def test_the_python_client_has_the_option(name: str) -> None:
    kind = int if SAMPLING_TABLE[name].is_whole else float
    options = get_type_hints(AnswerOptions)
    assert options["penalty_window"] == int | None if name == "repeat_last_n" else options[name] is kind


def test_keys_and_names_are_unique() -> None:
    keys = [row.gguf for row in SAMPLING_TABLE.values() if row.gguf]
    names = [row.name_in(Dialect.LLAMACPP, name) for name, row in SAMPLING_TABLE.items()]
    assert len(keys) == len({*keys}) and len(names) == len({*names})
    assert {*MAIN_NUMBERS} <= PARAMS.keys()


APIS = {Dialect.LLAMACPP: "llama.cpp", Dialect.OLLAMA: "Ollama"}


def documented_row(name: str) -> str:
    """Returns the line of docs/api.md for a field of the sampling table."""
    row = SAMPLING_TABLE[name]
    others = [
        f"{api} {row.default_in(dialect):g}" for dialect, api in APIS.items() if row.default_in(dialect) != row.default
    ]
    other_name = f"; llama.cpp, Ollama: `{row.llamacpp_name}`" if row.llamacpp_name else ""
    default = "; ".join([f"{row.default:g}", *others])
    return f"| `{name}`{other_name} | {row.low:,.6g} to {row.high:,.11g} | {default} | {row.doc} |"


@pytest.mark.parametrize("name", SAMPLING_TABLE)
def test_the_page_has_the_row(name: str) -> None:
    lines = (ROOT / "docs/api.md").read_text().splitlines()
    assert documented_row(name) in lines, f"put this line into docs/api.md: {documented_row(name)}"
