"""Losses register by name; one from another package trains, and reads what it asks for."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar

import pytest
import torch

from agentpref import plugins
from agentpref.config import KLSettings, LossSettings, UpdateConfig
from agentpref.errors import ConfigError
from agentpref.learn.losses import Loss, LossInputs, LossOutput, load_loss
from agentpref.learn.losses.dpo import Sigmoid
from agentpref.learn.losses.kto import KTO
from tests.core.learn.examples import make_thumb


class Proximal(Loss):
    """A stranger's loss: raise the chosen answer, and stay where live is on the others."""

    needs_live = True
    passes: ClassVar[list[LossInputs]] = []

    def __call__(self, inputs):
        self.passes.append(inputs)
        apart = inputs.policy - inputs.live
        loss = -apart[:, 0] + apart[:, 1:].square().sum(1)
        return LossOutput(loss, inputs.ratios.detach()[:, 0])


class Quiet(Loss):
    """A stranger's loss that asks for nothing."""

    passes: ClassVar[list[LossInputs]] = []

    def __call__(self, inputs):
        self.passes.append(inputs)
        return LossOutput(-inputs.ratios[:, 0], inputs.ratios.detach()[:, 0])


@pytest.fixture
def installed(monkeypatch):
    """Packages that offer the losses of this file are installed."""
    group = plugins.LOSSES
    offered = [
        EntryPoint("proximal", f"{__name__}:Proximal", group),
        EntryPoint("quiet", f"{__name__}:Quiet", group),
        EntryPoint("notaloss", "builtins:dict", group),
        EntryPoint("broken", "no_such_package.losses:Loss", group),
    ]

    def found(*, group):
        return [*entry_points(group=group), *(point for point in offered if point.group == group)]

    monkeypatch.setattr(plugins, "entry_points", found)
    for loss in (Proximal, Quiet):
        monkeypatch.setattr(loss, "passes", [])


def test_our_losses_are_loaded_by_their_names():
    assert load_loss("sigmoid") is Sigmoid
    assert load_loss("kto") is KTO
    assert set(plugins.names(plugins.LOSSES)) >= {
        "sigmoid", "robust", "ipo", "ipo_sum", "hinge", "apo_zero", "kto",
    }  # fmt: skip


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"'sigmiod'.*did you mean 'sigmoid'"):
        load_loss("sigmiod")


def test_a_loss_of_another_package_is_loaded_by_its_name(installed):
    assert load_loss("proximal") is Proximal
    assert "proximal" in plugins.names(plugins.LOSSES)


def test_a_loss_that_cannot_be_imported_names_its_package(installed):
    with pytest.raises(ConfigError, match=r"'broken'.*no_such_package.*repair or uninstall"):
        load_loss("broken")


def test_only_losses_with_a_noise_term_read_the_noise():
    reading = {kind for kind in plugins.names(plugins.LOSSES) if "noise" in load_loss(kind).reads}
    assert reading == {"sigmoid", "robust"}


def test_what_is_registered_must_be_a_loss(installed):
    with pytest.raises(ConfigError, match=r"'notaloss' .* must be a subclass of Loss"):
        load_loss("notaloss")


def live_folder(make_learner, pairs, folder):
    """A folder with an adapter that differs from the base."""
    first = make_learner(epochs=1)
    first.fit(first.encode(pairs), new=len(pairs))
    first.save(folder)
    return folder


def test_a_loss_that_needs_live_sees_the_log_probs_of_the_live_policy(
    installed, make_learner, pairs, tmp_path
):
    live = live_folder(make_learner, pairs, tmp_path / "rev-1")
    settings = {"loss": LossSettings(kind="proximal"), "kl": KLSettings(weight=0.0)}
    learner = make_learner(live=live, epochs=2, **settings)
    rows = learner.encode([*pairs, *(make_thumb(n, f"thumb {n}") for n in range(100, 103))])
    report = learner.fit(rows, new=12)

    expected = {
        row.example.example_id: logps
        for row, logps in zip(rows, learner.score("live", rows), strict=True)
    }
    base = learner.score("base", rows)
    assert [*expected.values()] != base
    seen = {
        example.example_id: tuple(logps)
        for inputs in Proximal.passes
        for example, logps in zip(inputs.examples, inputs.live.tolist(), strict=True)
    }
    assert seen == {name: logps for name, logps in expected.items() if name.startswith("pair")}
    assert not any(inputs.live.requires_grad for inputs in Proximal.passes)
    assert Proximal.passes[0].examples[0].completions[0].label == 1.0
    first = Proximal.passes[0]
    torch.testing.assert_close(first.policy, first.live, atol=1e-3, rtol=0)
    assert report.last_loss < report.first_loss
    trained = learner.score("candidate", rows[:12])
    gained = [
        own[0] - expected[row.example.example_id][0]
        for row, own in zip(rows[:12], trained, strict=True)
    ]
    assert sum(gained) > 0, "it trains"


def test_without_a_live_revision_live_is_the_base(installed, make_learner, pairs):
    settings = {"loss": LossSettings(kind="proximal"), "kl": KLSettings(weight=0.0)}
    learner = make_learner(epochs=1, **settings)
    learner.fit(learner.encode(pairs), new=12)
    assert all(torch.equal(inputs.live, inputs.reference) for inputs in Proximal.passes)


def test_a_loss_that_does_not_need_live_costs_no_scores_of_it(installed, make_learner, pairs):
    learner = make_learner(epochs=1, loss=LossSettings(kind="quiet"))
    scored, score = [], learner.score
    learner.score = lambda policy, rows: scored.append(policy) or score(policy, rows)
    learner.fit(learner.encode(pairs), new=12)
    assert scored == ["base"]
    assert Quiet.passes
    assert all(inputs.live is None for inputs in Quiet.passes)


def test_a_loss_is_told_the_settings_the_examples_and_the_live_revision(installed, monkeypatch):
    made = []
    monkeypatch.setattr(Quiet, "__init__", lambda self, *told: made.append(told))
    from agentpref.learn.objective import Losses

    config = UpdateConfig(loss=LossSettings(kind="quiet"))
    examples = [make_thumb(0, "yes")]
    Losses(config, examples, "rev-1")
    Losses(config, examples, None)
    assert made == [(config, examples, "rev-1"), (config, examples, "base")]
