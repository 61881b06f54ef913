"""Checks that groups are refused beside features that they lack, in a line that names the feature and a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.resources.groups import check_groups, largest_group, no_groups
from llamaclust.core.errors import UsageError
from llamaclust.model.loader import Model
from support.models.tiny_architectures import build_architecture

GROUP = {"workers": ["a", "b"], "layers": [0, 1]}
ELSE = "give each worker layers of its own"


def refusal(folder: Path, architecture: str, **keys: Any) -> str:
    values = {"model": "m", "workers": [{"name": "a"}, {"name": "b"}], "plan": [GROUP], **keys}
    with (
        Model.open(build_architecture(folder / "model.gguf", architecture)) as model,
        pytest.raises(UsageError) as raised,
    ):
        check_groups(ClusterConfig.model_validate(values), model, {})
    return str(raised.value)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"workers": [{"name": name, "kv_disk": "1GiB"} for name in "ab"]}, "kv_disk is set"),
        ({"workers": [{"name": name, "kv_disk": "1GiB"} for name in "abc"]}, "kv_disk is set"),
        ({"speculative": {"mtp": True}}, "speculative.mtp is set"),
    ],
)
def test_settings_are_named_and_may_be_left_out(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, "qwen3moe", **keys)
    assert text.startswith("plan: the group of a, b: ") and named in text and "\n" not in text
    assert text.endswith(f"; remove {named.split()[0]}, or {ELSE}")


@pytest.mark.parametrize("architecture", ["lfm2", "qwen3next", "granitehybrid"])
def test_layers_with_states_are_named(architecture: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, architecture)
    assert "have recurrent states" in text and text.endswith(f"; {ELSE}")


@pytest.mark.parametrize(
    ("architecture", "keys", "why"),
    [
        ("qwen3", {"groups": "off"}, "`groups` is off"),
        (
            "qwen3",
            {"workers": [{"name": name, "kv_disk": "1GiB"} for name in "ab"]},
            "kv_disk is set, but groups do not",
        ),
        ("qwen3", {"speculative": {"mtp": True}}, "speculative.mtp is set, but the MTP head is not divided yet"),
        ("lfm2", {}, "layers of this model have recurrent states, which groups do not divide yet"),
        ("qwen3", {}, ""),
        ("qwen3", {"groups": 2}, ""),
    ],
)
def test_automatic_plans_say_why_they_have_no_groups(
    architecture: str, keys: dict[str, Any], why: str, tmp_path: Path
) -> None:
    config = ClusterConfig.model_validate({"model": "m", "workers": [{"name": "a"}, {"name": "b"}], **keys})
    with Model.open(build_architecture(tmp_path / "model.gguf", architecture)) as model:
        found = no_groups(config, model)
        assert found.startswith(why) and (found == "") == (why == "") and ";" not in found
        assert (largest_group(config, model) == 1) == (why != "")
