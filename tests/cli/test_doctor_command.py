"""`doctor` on what is truly installed here, and on what is not."""

from __future__ import annotations

import sys

import pytest

import agentpref_cli.commands.doctor as module
from agentpref.record.home import Home
from agentpref.record.keeper import drain
from agentpref.record.spill import Spill
from agentpref.types import Feedback


def checks(value: dict) -> dict[str, dict]:
    return {check["name"]: check for check in value["checks"]}


def test_a_sound_machine_is_healthy(run, filled, random_base) -> None:
    value = run("doctor", "--model", random_base, "--json").json
    assert value["healthy"] is True
    found = checks(value)
    assert "46 runs" in found["home"]["words"] or "86 runs" in found["home"]["words"]
    assert "torch 2." in found["train"]["words"]
    assert " for torch" in found["threads"]["words"]
    assert str(random_base) in found["model"]["words"]


def test_a_model_that_is_nowhere_fails(run, filled, tmp_path) -> None:
    assert "nowhere" in run("doctor", "--model", tmp_path / "nowhere", exits=1).out


def test_a_model_on_a_hub_needs_what_fetches_it(run, filled, monkeypatch) -> None:
    """The base install brings no client of the hub."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = checks(run("doctor", "--model", "some/name", "--json", exits=1).json)
    assert found["model"]["holds"] is False
    assert "'some/name' is no folder here" in found["model"]["words"]
    assert "pip install 'agentpref[train]'" in found["model"]["words"]


def test_a_home_that_is_none_fails_only_where_one_was_named(run, home, random_base, tmp_path):
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert found["home"]["holds"] is True
    assert "agentpref init" in found["home"]["words"]
    run("doctor", "--model", random_base, "--home", tmp_path, exits=1)


def test_what_waits_and_what_was_refused_is_said(run, home, filled, random_base) -> None:
    assert (
        checks(run("doctor", "--model", random_base, "--json").json)
        .keys()
        .isdisjoint({"spill", "refused"})
    )
    place = Home.open(home)
    Spill(place).append([Feedback("f", "nowhere", 1.0, "k", 1.0)])
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert found["spill"]["words"].startswith("1 entries wait")
    drain(place)
    found = checks(run("doctor", "--model", random_base, "--json", exits=1).json)
    assert "spill" not in found
    assert found["refused"]["words"].startswith("1 entries name what this home has not")


def test_what_is_not_installed_comes_with_its_cure(run, filled, random_base, monkeypatch) -> None:
    monkeypatch.setattr(module, "EXTRAS", {"train": ("torch", "no-such-package")})
    words = checks(run("doctor", "--model", random_base, "--json").json)["train"]["words"]
    assert words == "not installed (no-such-package); if wanted: pip install 'agentpref[train]'"


@pytest.mark.parametrize("error", [ImportError("libtorch is missing"), OSError("no space")])
def test_a_torch_that_cannot_be_imported_is_a_failure(run, filled, random_base, monkeypatch, error):
    def broken(_name: str) -> None:
        raise error

    monkeypatch.setattr(module, "import_module", broken)
    found = checks(run("doctor", "--model", random_base, "--json", exits=1).json)
    assert str(error) in found["threads"]["words"]
