"""Checks that a body with many wrong fields is refused at the first one without validation of the others."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llamaclust.cluster.front.dialects.llamacpp.endpoints import DetokenizeBody
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.schema import Body, read_fields
from llamaclust.core.errors import ParameterError

MANY = 1000
UNKNOWN = {f"k{number}": 1 for number in range(MANY)}
MESSAGE = {"role": "user", "content": "hi"}

WRONG: dict[str, tuple[type[Body], dict[str, Any], str]] = {
    "unknown fields": (CompletionBody, {"prompt": "hi", **UNKNOWN}, "k0: unknown field"),
    "unknown fields of a part": (ChatBody, {"stream_options": UNKNOWN}, "stream_options.k0: unknown field"),
    "token ids": (DetokenizeBody, {"tokens": ["x"] * MANY}, "tokens[0]: input should be a valid integer"),
    "stop ids": (CompletionBody, {"prompt": "a", "stop_token_ids": ["x"] * 9}, "stop_token_ids[0]: input should be"),
    "messages": (ChatBody, {"messages": [MESSAGE, *[{"role": "x"}] * MANY]}, "messages[1]: role: input should be"),
    "one that is misspelt": (ChatBody, {"mesages": [MESSAGE]}, "mesages: unknown field; did you mean 'messages'?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_first_error_is_reported(name: str) -> None:
    kind, fields, says = WRONG[name]
    with pytest.raises(ParameterError) as caught:
        read_fields(kind, fields)
    assert str(caught.value).startswith(says)
    cause = caught.value.__cause__
    assert isinstance(cause, ValidationError) and cause.error_count() <= 2  # the first error and a missing field
