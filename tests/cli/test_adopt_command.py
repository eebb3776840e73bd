"""`adopt`: adapters of another home on the command line, and the exit codes of an update."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ENOUGH = ("--set", "gate.cross_fit_below=0")


@pytest.fixture
def trained(run, rows, random_base: Path, tmp_path: Path) -> Path:
    """The folder of an adapter that an update in another home has trained."""
    other = tmp_path / "other"
    run("init", "--home", other)
    run("import", rows, "--tag", "bread", "--home", other)
    done = run("update", "--home", other, "--model", random_base, *ENOUGH, "--json").json
    return Path(shutil.copytree(other / "adapters" / done["revision"], tmp_path / "taken"))


@pytest.fixture
def adopt(run, filled, trained, random_base: Path):
    """Call ``adopt(exits=0)`` on a home with 40 pairs."""

    def call(*arguments: str, folder: Path = trained, exits: int = 0):
        return run("adopt", folder, "--model", random_base, *arguments, exits=exits)

    return call


def serving(run) -> str:
    return run("adapters", "list", "--json").json["serving"]["live"]


def test_a_better_adapter_serves_is_shown_and_is_rolled_back(run, adopt, trained) -> None:
    shown = adopt().out
    assert shown.startswith("promoted: held-out accuracy ")
    assert f"adopted from {trained.name} (sha256 " in shown
    assert "nothing was trained here" in shown
    assert "new preferences\tyes" in shown
    assert serving(run).startswith("rev-000001-")
    assert run("report").out.startswith(shown.splitlines()[0])
    assert run("updates", "--json").json["updates"][0]["verdict"] == "promoted"
    manifest = run("adapters", "show", serving(run), "--json").json["manifest"]
    assert manifest["training"]["adopted"]["folder"] == trained.name
    run("adapters", "rollback")
    assert serving(run) == "base"


def test_its_page_is_written_like_that_of_an_update(run, adopt, tmp_path) -> None:
    adopt()
    run("report", "--html", tmp_path / "page.html")
    assert "adopted from taken" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_one_beyond_the_kl_budget_exits_4_and_does_not_serve(run, adopt) -> None:
    result = adopt("--set", "gate.kl_budget=1e-9", exits=4)
    assert result.out.startswith("refused: ")
    assert "KL budget\tno\t" in result.out
    assert serving(run) == "base"


def test_too_little_evidence_exits_5_and_no_promote_leaves_what_serves(run, adopt) -> None:
    value = adopt("--set", "gate.confidence=0.999999999999999", "--json", exits=5).json
    assert value["verdict"] == "insufficient"
    assert value["training"]["start"] == "adopted"
    assert adopt("--no-promote", "--json").json["verdict"] == "passed"
    assert serving(run) == "base"
    unseen = adopt("--unseen", "--no-promote", "--json", "--quiet")
    assert unseen.err == ""
    counts = unseen.json["counts"]
    assert counts["new_evaluated"] == counts["new"] + counts["new_held_out"]


def test_a_home_with_nothing_to_prove_it_by_exits_3(run, trained, random_base, tmp_path) -> None:
    run("init", "--home", tmp_path / "empty")
    where = ("--home", tmp_path / "empty", "--model", random_base)
    result = run("adopt", trained, *where, exits=3)
    assert result.out.startswith("nothing new: there is no example to prove the adapter by")


def test_a_broken_adapter_exits_1_and_bad_usage_2(run, adopt, trained, tmp_path) -> None:
    assert "is not a folder" in adopt(folder=tmp_path / "missing", exits=1).err
    (trained / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "cannot be read as safetensors" in adopt(exits=1).err
    assert "loss.beta" in adopt("--set", "loss.beat=1", exits=2).err
    adopt("--canary", "2", exits=2)
