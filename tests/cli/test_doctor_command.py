"""`doctor` on what is truly installed here, and on what is not."""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import closing
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest

import agentpref_cli.commands.doctor as module
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.keeper import drain
from agentpref.record.spill import Spill
from agentpref.serve.pins import Pins
from agentpref.serve.registry import Registry
from agentpref.serve.status import mark_pruned
from agentpref.testing import write_adapter
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


def test_it_knows_the_extras_that_there_are_and_all_that_they_bring() -> None:
    offered = set(metadata("agentpref").get_all("Provides-Extra") or ())
    assert module.EXTRAS.keys() == offered - {"all", "bench", "dev"}
    known = {package for packages in module.EXTRAS.values() for package in packages}
    for extra, packages in module.EXTRAS.items():
        asked = [one for one in requires("agentpref") or () if re.search(rf"\b{extra}\W$", one)]
        brought = {re.split(r"[^\w-]", one)[0] for one in asked} - {"agentpref"}
        assert set(packages) <= brought <= known


@pytest.mark.parametrize("error", [ImportError("libtorch is missing"), OSError("no space")])
def test_a_torch_that_cannot_be_imported_is_a_failure(run, filled, random_base, monkeypatch, error):
    def broken(_name: str) -> None:
        raise error

    monkeypatch.setattr(module, "import_module", broken)
    found = checks(run("doctor", "--model", random_base, "--json", exits=1).json)
    assert str(error) in found["threads"]["words"]


@pytest.fixture
def names(home: Path, tmp_path: Path) -> list[str]:
    """Two revisions, of which the first is live and the second the canary."""
    registry = Registry(Home.create(home))
    published = []
    for seed in (1, 2):
        folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed)
        revision = registry.publish(folder, parent=None, base={"name": "tiny"}, training={})
        published.append(revision.revision_id)
    registry.promote(published[0])
    registry.canary(published[1], 0.1)
    return published


def test_what_serves_and_is_whole_is_said(run, random_base, names) -> None:
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert found["live"]["words"] == f"'default': {names[0]} is whole"
    assert found["canary"]["words"] == f"'default': {names[1]} is whole"
    assert found.keys().isdisjoint({"quarantine", "leavings", "holds"})


def _quarantined(home: Path, name: str) -> None:
    Registry(home).quarantine(name, "it answers in Latin")


def _marked(home: Path, name: str) -> None:
    with closing(connect(Home.open(home))) as connection:
        mark_pruned(connection, name, 5.0)


def _edited(home: Path, name: str) -> None:
    with (home / "adapters" / name / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"!")


def _deleted(home: Path, name: str) -> None:
    shutil.rmtree(home / "adapters" / name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_quarantined, "is in quarantine: it answers in Latin"),
        (_marked, "was pruned"),
        (_edited, "adapter_model.safetensors is not the file that was published"),
        (_deleted, "is gone"),
    ],
)
@pytest.mark.parametrize("role", ["live", "canary"])
def test_what_serves_and_must_not_is_a_failure(run, home, random_base, names, damage, words, role):
    damage(home, names[role == "canary"])
    found = checks(run("doctor", "--model", random_base, "--json", exits=1).json)
    assert found[role]["holds"] is False
    assert words in found[role]["words"]
    assert found["canary" if role == "live" else "live"]["holds"] is True


def test_what_is_locked_away_or_left_is_said(run, home, random_base, names) -> None:
    registry = Registry(home)
    registry.canary(None, 0)
    registry.quarantine(names[1], "it answers in Latin")
    (home / "adapters" / ".pruning-1").mkdir()
    pins = Pins(Home.open(home).pins, "http://127.0.0.1:8000")
    pins.take(names[1])
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert f"{names[1]} since " in found["quarantine"]["words"]
    assert found["quarantine"]["words"].endswith("it answers in Latin")
    assert found["leavings"]["words"].startswith("1 half-made or half-removed folders")
    assert "holds" not in found, "a living process uses it"
    pins.close()
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert "1 revisions were loaded" in found["holds"]["words"]
    assert "at http://127.0.0.1:8000" in found["holds"]["words"]
