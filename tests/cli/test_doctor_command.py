"""`doctor` on the packages that are installed here, on a missing one, and on damaged homes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import closing
from importlib.metadata import metadata
from pathlib import Path

import pytest

import agentpref_cli.commands.doctor as module
from agentpref.home import Home
from agentpref.models import threads
from agentpref.record.database import connect
from agentpref.record.spill import Spill, drain
from agentpref.record.updates import UpdateRow, Updates
from agentpref.serve.pins import Pins
from agentpref.serve.pruning import mark_pruned
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref.types import Feedback


def checks(value: dict) -> dict[str, dict]:
    return {check["name"]: check for check in value["checks"]}


def test_a_working_installation_is_healthy(run, filled, random_base) -> None:
    value = run("doctor", "--model", random_base, "--json").json
    assert value["healthy"] is True
    found = checks(value)
    assert "46 runs" in found["home"]["message"] or "86 runs" in found["home"]["message"]
    assert "torch 2." in found["train"]["message"]
    assert " for torch" in found["threads"]["message"]
    assert str(random_base) in found["model"]["message"]


def test_a_missing_model_fails(run, filled, tmp_path) -> None:
    assert "nowhere" in run("doctor", "--model", tmp_path / "nowhere", exits=1).out


def test_a_model_on_a_hub_fails_without_the_client_of_the_hub(run, filled, monkeypatch) -> None:
    """The base install brings no client of the hub."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = checks(run("doctor", "--model", "some/name", "--json", exits=1).json)
    assert found["model"]["passed"] is False
    assert "'some/name' is no folder here" in found["model"]["message"]
    assert "pip install 'agentpref[train]'" in found["model"]["message"]


def test_a_missing_home_fails_only_if_it_was_named(run, home, random_base, tmp_path):
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert found["home"]["passed"] is True
    assert "agentpref init" in found["home"]["message"]
    run("doctor", "--model", random_base, "--home", tmp_path, exits=1)


def test_waiting_and_refused_entries_are_counted(run, home, filled, random_base) -> None:
    assert (
        checks(run("doctor", "--model", random_base, "--json").json)
        .keys()
        .isdisjoint({"spill", "refused"})
    )
    place = Home.open(home)
    Spill(place).append([Feedback("f", "nowhere", 1.0, "k", 1.0)])
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert found["spill"]["message"].startswith("1 entries wait")
    drain(place)
    found = checks(run("doctor", "--model", random_base, "--json", exits=1).json)
    assert "spill" not in found
    assert found["refused"]["message"].startswith("1 entries name runs that are not in this home")


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    run, filled, random_base, monkeypatch
) -> None:
    needed = ["torch>=2; extra == 'train'", "no-such-package==1.*; extra == 'train'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda package: needed)
    message = checks(run("doctor", "--model", random_base, "--json").json)["train"]["message"]
    assert message == "not installed (no-such-package); to use it: pip install 'agentpref[train]'"


def test_every_extra_is_listed_with_the_packages_that_it_brings(run, filled, random_base) -> None:
    offered = {*(metadata("agentpref").get_all("Provides-Extra") or ())} - {"all", "bench", "dev"}
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert offered <= found.keys()
    assert "langchain-core 1" in found["langchain"]["message"]
    assert {"torch", "peft", "transformers"} <= set(
        re.findall(r"[a-z]+", found["train"]["message"])
    )


@pytest.mark.parametrize("error", [ImportError("libtorch is missing"), OSError("no space")])
def test_a_torch_that_cannot_be_imported_fails(run, filled, random_base, monkeypatch, error):
    def broken(_name: str) -> None:
        raise error

    monkeypatch.setattr(module, "import_module", broken)
    found = checks(run("doctor", "--model", random_base, "--json", exits=1).json)
    assert str(error) in found["threads"]["message"]


@pytest.fixture
def names(home: Path, tmp_path: Path) -> list[str]:
    """Two revisions, of which the first is live and the second the canary."""
    registry = Registry(Home.create(home))
    published = []
    for seed in (1, 2):
        folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed)
        revision = registry.publish(folder, parent=None, model={"name": "tiny"}, training={})
        published.append(revision.revision_id)
    registry.promote(published[0])
    registry.canary(published[1], 0.1)
    return published


def test_live_and_canary_pass_if_their_files_are_whole(run, random_base, names) -> None:
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert found["live"]["message"] == f"'default': {names[0]} is whole"
    assert found["canary"]["message"] == f"'default': {names[1]} is whole"
    assert found.keys().isdisjoint({"quarantine", "leftovers", "pins"})


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
    ("damage", "message"),
    [
        (_quarantined, "is in quarantine: it answers in Latin"),
        (_marked, "was pruned"),
        (_edited, "adapter_model.safetensors is not the file that was published"),
        (_deleted, "is missing or a symbolic link"),
    ],
)
@pytest.mark.parametrize("role", ["live", "canary"])
def test_a_serving_revision_that_must_not_serve_fails(
    run, home, random_base, names, damage, message, role
):
    damage(home, names[role == "canary"])
    found = checks(run("doctor", "--model", random_base, "--json", exits=1).json)
    assert found[role]["passed"] is False
    assert message in found[role]["message"]
    assert found["canary" if role == "live" else "live"]["passed"] is True


def test_quarantined_revisions_leftover_folders_and_dead_pins_are_listed(
    run, home, random_base, names
) -> None:
    registry = Registry(home)
    registry.canary(None, 0)
    registry.quarantine(names[1], "it answers in Latin")
    (home / "adapters" / ".pruning-1").mkdir()
    pins = Pins(Home.open(home).pins, "http://127.0.0.1:8000")
    pins.take(names[1])
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert f"{names[1]} since " in found["quarantine"]["message"]
    assert found["quarantine"]["message"].endswith("it answers in Latin")
    assert found["leftovers"]["message"].startswith("1 half-made or half-removed folders")
    assert "pins" not in found, "a living process uses it"
    pins.close()
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert "1 revisions were loaded" in found["pins"]["message"]
    assert "at http://127.0.0.1:8000" in found["pins"]["message"]


def test_files_that_other_users_can_use_fail_and_the_chmod_that_is_named_mends_it(
    run, filled, random_base
) -> None:
    home = Home.open(filled)
    odd = home.reports / "it's a report.json"
    odd.touch()
    for path in (home.refused, odd):
        path.touch()
        path.chmod(0o644)
    value = run("doctor", "--model", random_base, "--json", exits=1).json
    message = checks(value)["readers"]["message"]
    assert message.startswith("every user of this machine can use 2 of the home's files")
    subprocess.run(message.rpartition(": ")[2], shell=True, check=True)
    assert {path.stat().st_mode & 0o777 for path in (home.refused, odd)} == {0o640}
    home.refused.unlink()
    assert "readers" not in checks(run("doctor", "--model", random_base, "--json").json)


def test_a_revision_whose_update_is_not_in_the_ledger_is_named(
    run, home: Path, random_base, tmp_path: Path
) -> None:
    """As a kill between publishing and the ledger left it in 0.1."""
    registry, folder = Registry(Home.create(home)), write_adapter(tmp_path / "adapter")
    given = {"parent": None, "model": {}, "training": {}}
    name = registry.publish(folder, **given, watermark={"update_id": "lost"}).revision_id
    found = checks(run("doctor", "--model", random_base, "--json").json)
    assert found["ledger"]["message"].startswith(f"{name}: the update that made it is not in the")
    problems = run("verify", "--json", exits=1).json["problems"]
    assert [problem["key"] for problem in problems] == [name]


def test_the_cores_that_a_quota_allows_are_said_and_used(run, home, monkeypatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run("init")
    message = checks(run("doctor", "--json").json)["threads"]["message"]
    assert message.startswith("1 for torch, on 64 cores, of which this process may use 1; ")


def test_a_shift_of_the_prompts_is_named_with_a_run_that_shows_it(
    run, random_base, names, home
) -> None:
    moved = {"tag": "all", "new": 80, "old": 90, "p": 0.001, "unlike": 0.6, "farthest": ["r1"]}
    assert "shift" not in checks(run("doctor", "--model", random_base, "--json").json)
    for number, alarm in enumerate((False, True)):
        report = {"training": {"shift": [{**moved, "alarm": alarm}]}}
        with closing(connect(Home.open(home))) as connection:
            Updates(connection).add(
                UpdateRow(f"u{number}", "default", number, number, None, None, "refused", report)
            )
        found = checks(run("doctor", "--model", random_base, "--json").json)
        assert ("shift" in found) is alarm
    assert found["shift"]["passed"] is True
    assert "60% of the new prompts of update u1 in 'default'" in found["shift"]["message"]
    assert "agentpref show r1" in found["shift"]["message"]
