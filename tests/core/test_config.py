"""Settings as mappings: what is accepted, and what is said of what is not."""

from __future__ import annotations

from typing import Any

import pytest

from agentpref.config import UpdateConfig
from agentpref.errors import ConfigError


def test_a_config_is_rebuilt_from_its_mapping() -> None:
    config = UpdateConfig.from_mapping({"seed": 3, "loss": {"beta": 0.2}})
    assert (config.seed, config.loss.beta) == (3, 0.2)
    assert UpdateConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sed": 3}, r"sed.*did you mean 'seed'"),
        ({"loss": {"bete": 0.2}}, r"loss\.bete.*did you mean 'loss\.beta'"),
        ({"loss": 0.2}, r"loss is a group of settings: write loss\.KEY=VALUE, not 0\.2"),
        ({"loss": {"beta": -1}}, r"loss\.beta is -1, but must be"),
        ({"max_minutes": 0}, r"max_minutes is 0, but must be above 0"),
        ({"gate": {"max_old_pairs": 0}}, r"gate\.max_old_pairs is 0, but must be 1 or more"),
    ],
)
def test_what_is_no_setting_is_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        UpdateConfig.from_mapping(settings)


@pytest.mark.parametrize(
    ("settings", "where"), [({"held_out": "a"}, "the top level"), ({"kl": {"weight": "a"}}, "kl")]
)
def test_a_value_of_the_wrong_type_is_placed_and_its_cause_kept(
    settings: dict[str, Any], where: str
) -> None:
    with pytest.raises(ConfigError, match=f"a setting under '{where}") as caught:
        UpdateConfig.from_mapping(settings)
    assert isinstance(caught.value.__cause__, TypeError)
