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


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loss": {"kind": "dpo"}}, r"loss\.kind is 'dpo', but must be sigmoid, robust, ipo,"),
        ({"loss": {"kind": ["ipo"]}}, r"loss\.kind is \('ipo',\), but must be"),
        ({"loss": {"noise": 0.6}}, r"loss\.noise is 0\.6, but must be from 0 to \.5"),
        ({"loss": {"noise": -0.1}}, r"loss\.noise is -0\.1, but must be from 0"),
        ({"loss": {"noise": float("nan")}}, r"loss\.noise is nan, but must be from 0"),
        ({"loss": {"wpo": "no"}}, r"loss\.wpo is 'no', but must be true or false"),
        ({"thumbs": {"weight": -1}}, r"thumbs\.weight is -1, but must be 0 or more"),
        ({"thumbs": {"desirable": 0}}, r"thumbs\.desirable is 0, but must be above 0"),
        ({"thumbs": {"undesirable": -2}}, r"thumbs\.undesirable is -2, but must be above 0"),
    ],
)
def test_what_a_setting_cannot_be_is_said(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        UpdateConfig.from_mapping(settings)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        *(
            (
                {"loss": {"kind": kind, "noise": noise}},
                rf"loss\.noise is {noise}, but has no effect, since loss\.kind '{kind}' has no "
                r"noise term: leave it out, or set loss\.kind to 'sigmoid' or 'robust'",
            )
            for kind in ("hinge", "ipo", "ipo_sum", "apo_zero")
            for noise in (0.0, 0.1)
        ),
        (
            {"loss": {"kind": "robust", "noise": 0.0}},
            r"loss\.kind is 'robust', but has no effect, since with loss\.noise 0 it is plain DPO",
        ),
        (
            {"thumbs": {"weight": 0, "desirable": 2.0}},
            r"thumbs\.desirable is 2\.0, but has no effect, since thumbs\.weight is 0",
        ),
        (
            {"thumbs": {"weight": 0, "undesirable": 1.0}},
            r"thumbs\.undesirable is 1\.0, .* leave it out, or raise thumbs\.weight",
        ),
        (
            {"kl": {"weight": 0, "target": 0.1}},
            r"kl\.target is 0\.1, but has no effect, since kl\.weight is 0: leave it out, or",
        ),
        (
            {"replay": {"minimum": 0, "hard_share": 0.5}},
            r"replay\.hard_share is 0\.5, but has no effect, since replay\.minimum is 0",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        UpdateConfig.from_mapping(settings)


def test_robust_cannot_take_a_coin_for_a_label() -> None:
    with pytest.raises(ConfigError, match=r"loss\.noise is 0\.5.*lower it, or set loss\.kind to"):
        UpdateConfig.from_mapping({"loss": {"kind": "robust", "noise": 0.5}})


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": {"kind": "robust", "noise": 0.49}},
        {"loss": {"kind": "robust"}},
        {"loss": {"kind": "sigmoid", "noise": 0.5}},
        {"loss": {"noise": 0}},
        {"loss": {"kind": "ipo", "wpo": True}},
        {"thumbs": {"weight": 0}},
        {"thumbs": {"weight": 2, "desirable": 1.0, "undesirable": 3.0}},
        {"kl": {"weight": 0, "target": 0.05}},
        {"replay": {"minimum": 0}},
    ],
)
def test_what_goes_together_is_taken(settings: dict[str, Any]) -> None:
    config = UpdateConfig.from_mapping(settings)
    assert UpdateConfig.from_mapping(config.to_mapping()) == config
