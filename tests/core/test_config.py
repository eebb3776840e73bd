"""Settings: which values are accepted, in Python and from mappings, and what an error says."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from pydantic import ValidationError

from agentpref import config as module
from agentpref import plugins
from agentpref.config import (
    AnchorSettings,
    CommentSettings,
    GateSettings,
    KLSettings,
    LoraSettings,
    LossSettings,
    OfflineSettings,
    ReplaySettings,
    ThumbSettings,
    UpdateConfig,
)
from agentpref.errors import ConfigError
from agentpref.types import HELD_OUT, LORA_RANKS

GROUPS = {
    "": UpdateConfig,
    "lora.": LoraSettings,
    "loss.": LossSettings,
    "thumbs.": ThumbSettings,
    "kl.": KLSettings,
    "anchor.": AnchorSettings,
    "comments.": CommentSettings,
    "offline.": OfflineSettings,
    "replay.": ReplaySettings,
    "gate.": GateSettings,
}
SETTINGS = [
    (prefix, kind, name, field)
    for prefix, kind in GROUPS.items()
    for name, field in kind.__pydantic_fields__.items()
    if f"{name}." not in GROUPS
]


def test_a_config_is_rebuilt_from_its_mapping() -> None:
    config = UpdateConfig.from_mapping({"seed": 3, "loss": {"beta": 0.2}})
    assert (config.seed, config.loss.beta) == (3, 0.2)
    assert UpdateConfig.from_mapping(config.to_mapping()) == config


def test_a_config_is_a_value_that_compares_and_shows_its_settings() -> None:
    assert UpdateConfig(kl=KLSettings(weight=1)) == UpdateConfig.from_mapping({"kl": {"weight": 1}})
    assert UpdateConfig(seed=1) != UpdateConfig()
    assert "seed=1, held_out=0.2" in repr(UpdateConfig(seed=1))
    with pytest.raises(FrozenInstanceError):
        UpdateConfig().seed = 1  # type: ignore[misc]


def test_a_changed_copy_is_checked_like_a_new_config() -> None:
    assert replace(UpdateConfig(seed=1), batch_size=2) == UpdateConfig(seed=1, batch_size=2)
    with pytest.raises(ConfigError, match=r"batch_size is 2\.5, but must be a whole number of 1"):
        replace(UpdateConfig(), batch_size=2.5)  # type: ignore[arg-type]


def test_a_whole_number_is_accepted_for_a_fraction_and_stored_as_one() -> None:
    beta = LossSettings(beta=1).beta
    assert (beta, type(beta)) == (1.0, float)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sed": 3}, r"sed.*did you mean 'seed'"),
        ({"loss": {"bete": 0.2}}, r"loss\.bete.*did you mean 'loss\.beta'"),
        ({"loss": 0.2}, r"loss is a group of settings: write loss\.KEY=VALUE, .* not 0\.2"),
        (
            {"xyzzy": 1},
            r"no setting is named 'xyzzy'; known: anchor, arm, batch_size, chat_template_kwargs",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        UpdateConfig.from_mapping(settings)


def test_a_setting_that_is_gone_is_refused_with_a_cure() -> None:
    with pytest.raises(
        ConfigError, match=r"gate\.min_pairs is no setting any more: .* leave it out"
    ):
        UpdateConfig.from_mapping({"gate": {"min_pairs": 50}})


def test_an_unknown_name_in_python_is_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"'loss\.bete'; did you mean 'loss\.beta'"):
        LossSettings(bete=0.2)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"loss is a group .* LossSettings\(KEY=VALUE\)"):
        UpdateConfig(loss={"beta": 0.2})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 2.5}, r"batch_size is 2\.5, but must be a whole number of 1 or more"),
        ({"seed": "abc"}, r"seed is 'abc', but must be a whole number from 0 to"),
        ({"seed": -1}, r"seed is -1, but must be a whole number from 0 to"),
        ({"seed": 2**70}, r"seed is 1180591620717411303424, but must be"),
        ({"epochs": 1.5}, r"epochs is 1\.5, but must be a whole number of 1 or more"),
        ({"epochs": True}, r"epochs is True, but must be a whole number"),
        ({"lora": {"alpha": True}}, r"lora\.alpha is True, but must be a whole number above 0"),
        ({"lora": {"rank": 3}}, r"lora\.rank is 3, but must be 8, 16, 32, 64, 128, 256 or 512"),
        ({"lora": {"rank": 16.0}}, r"lora\.rank is 16\.0, but must be 8, 16"),
        ({"learning_rate": True}, r"learning_rate is True, but must be a number above 0"),
        ({"learning_rate": "1e-4"}, r"learning_rate is '1e-4', but must be a number above 0"),
        ({"max_length": 99.5}, r"max_length is 99\.5, but must be a whole number of 16 or more"),
        ({"max_minutes": 0}, r"max_minutes is 0, but must be a number above 0"),
        ({"held_out": "a"}, r"held_out is 'a', but must be a number above 0 and below 1"),
        ({"held_out": 1.0}, r"held_out is 1\.0, but must be a number above 0 and below 1"),
        ({"precision": ["4bit"]}, r"precision is \['4bit'\], but must be auto, float32, bfloat16"),
        ({"loss": {"kind": "dpo"}}, r"loss\.kind is 'dpo', but must be .* robust or sigmoid"),
        ({"loss": {"kind": ["ipo"]}}, r"loss\.kind is \['ipo'\], but must be"),
        ({"loss": {"beta": -1}}, r"loss\.beta is -1, but must be a number above 0"),
        ({"loss": {"beta": math.inf}}, r"loss\.beta is inf, but must be a number above 0"),
        ({"loss": {"noise": 0.6}}, r"loss\.noise is 0\.6, but must be a number from 0 to 0\.5"),
        ({"loss": {"noise": -0.1}}, r"loss\.noise is -0\.1, but must be a number from 0"),
        ({"loss": {"noise": math.nan}}, r"loss\.noise is nan, but must be a number from 0"),
        ({"loss": {"wpo": "no"}}, r"loss\.wpo is 'no', but must be true or false"),
        ({"loss": {"wpo": 1}}, r"loss\.wpo is 1, but must be true or false"),
        ({"thumbs": {"weight": -1}}, r"thumbs\.weight is -1, but must be a number of 0 or more"),
        ({"thumbs": {"desirable": 0}}, r"thumbs\.desirable is 0, but must be a number above 0"),
        ({"thumbs": {"undesirable": -2}}, r"thumbs\.undesirable is -2, but must be a number above"),
        ({"kl": {"weight": "a"}}, r"kl\.weight is 'a', but must be a number of 0 or more"),
        ({"gate": {"max_old_pairs": 0}}, r"gate\.max_old_pairs is 0, but must be a whole number"),
        ({"gate": {"length_ratio": [0.5]}}, r"gate\.length_ratio is \[0\.5\], but must be \["),
        ({"gate": {"length_ratio": [1.1, 2]}}, r"\[1\.1, 2\], but must be \[a number above 0 and"),
        ({"gate": {"length_ratio": [True, 2]}}, r"gate\.length_ratio is \[True, 2\], but must be"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_is_allowed(
    settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        UpdateConfig.from_mapping(settings)
    assert isinstance(caught.value.__cause__, ValidationError)


@pytest.mark.parametrize(
    ("prefix", "kind", "name", "field"),
    SETTINGS,
    ids=[prefix + name for prefix, _, name, _ in SETTINGS],
)
@pytest.mark.parametrize("value", [True, math.inf, -math.inf, math.nan, "1", b"1", [], {}])
def test_no_setting_accepts_a_value_of_another_type_in_python(
    prefix: str, kind: Any, name: str, field: Any, value: object
) -> None:
    fits = {"wpo": True, "chat_template_kwargs": {}, "rules": [], "held_out_tags": []}
    if name in fits and type(value) is type(fits[name]) and value == fits[name]:
        return
    with pytest.raises(ConfigError, match=rf"^{prefix}{name} is .* but must be ") as caught:
        kind(**{name: value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        *(
            (
                {"loss": {"kind": kind, "noise": noise}},
                rf"loss\.noise is {noise}, but has no effect, since loss\.kind '{kind}' does not "
                r"read it: leave it out, or set another loss\.kind",
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
            {"kl": {"weight": 0, "pull": 0.7}},
            r"kl\.pull is 0\.7, but has no effect, since kl\.weight is 0",
        ),
        (
            {"kl": {"weight": 0}, "anchor": {"kl": 1.0}},
            r"anchor\.kl is 1\.0, but has no effect, since kl\.weight is 0",
        ),
        (
            {"anchor": {"size": 0, "weight": 0.5}},
            r"anchor\.weight is 0\.5, but has no effect, since anchor\.size is 0",
        ),
        (
            {"replay": {"minimum": 0, "hard_share": 0.5}},
            r"replay\.hard_share is 0\.5, but has no effect, since replay\.minimum is 0",
        ),
        (
            {"gate": {"cross_fit_below": 0, "folds": 5}},
            r"gate\.folds is 5, but has no effect, since gate\.cross_fit_below is 0: leave it out",
        ),
        (
            {"offline": {"gamma": 0.5}},
            r"offline\.gamma is 0\.5, but has no effect, since method is 'preferences': leave",
        ),
        (
            {"method": "awr", "offline": {"expectile": 0.9}},
            r"offline\.expectile is 0\.9, .* since method is 'awr': .* set another method",
        ),
        (
            {"method": "iql", "held_out_tags": ["x"]},
            r"held_out_tags is \('x',\), but has no effect, since method is 'iql': leave it out",
        ),
        (
            {"method": "iql", "arm": "prompt"},
            r"arm is 'prompt', but has no effect, since method is 'iql': .* trains an adapter",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        UpdateConfig.from_mapping(settings)


def test_the_robust_loss_refuses_labels_that_are_random() -> None:
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
        {"method": "iql", "offline": {"expectile": 0.9, "gamma": 1.0, "rewards": {"won": 2}}},
        {"learning_rate": None, "epochs": None, "max_minutes": None},
    ],
)
def test_settings_that_go_together_are_accepted(settings: dict[str, Any]) -> None:
    config = UpdateConfig.from_mapping(settings)
    assert UpdateConfig.from_mapping(config.to_mapping()) == config


def test_every_registered_loss_of_pairs_may_be_chosen() -> None:
    for kind in set(plugins.names(plugins.LOSSES)) - {"kto"}:
        assert LossSettings(kind=kind).kind == kind


def test_a_loss_is_refused_for_examples_that_it_is_not_for() -> None:
    with pytest.raises(ConfigError, match=r"loss\.kind is 'kto', a loss of lone thumbs"):
        LossSettings(kind="kto")
    with pytest.raises(ConfigError, match=r"thumbs\.kind is 'ipo', a loss of pairs"):
        ThumbSettings(kind="ipo")


def test_a_setting_that_a_strangers_loss_does_not_read_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ranked:
        lone, reads = False, frozenset({"beta"})

    monkeypatch.setattr(module.plugins, "names", lambda group: ("ranked", "sigmoid"))
    monkeypatch.setattr(module.plugins, "load", lambda group, name: Ranked)
    assert LossSettings(kind="ranked", beta=0.2).beta == 0.2
    for name, value in (("wpo", True), ("nll", 0.3), ("noise", 0.1)):
        with pytest.raises(ConfigError, match=rf"loss\.{name} is .* 'ranked' does not read it"):
            LossSettings(kind="ranked", **{name: value})


def test_a_whole_number_that_no_machine_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 1180591620717411303424, but may be"):
        UpdateConfig(batch_size=2**70)


@pytest.mark.parametrize("settings", [[1], "seed=1", {1: 2}])
def test_settings_that_are_no_mapping_of_names_are_refused(settings: object) -> None:
    with pytest.raises(ConfigError, match="must be a mapping of names to values"):
        UpdateConfig.from_mapping(settings)


def test_ranks_and_the_held_out_share_are_those_of_the_types() -> None:
    assert {LoraSettings(rank=rank).rank for rank in LORA_RANKS} == {*LORA_RANKS}
    assert UpdateConfig().held_out == HELD_OUT


def test_every_setting_is_described() -> None:
    assert [prefix + name for prefix, _, name, field in SETTINGS if not field.description] == []
