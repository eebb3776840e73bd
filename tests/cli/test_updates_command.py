"""`updates`, and how `report` and `update` tell of nights that went otherwise than hoped."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.home import Home
from agentpref.record.database import connect, exclusive
from agentpref.record.journal import Journal
from agentpref.record.updates import UpdateRow, Updates
from agentpref.types import UpdateReport

ENOUGH = ("--set", "gate.cross_fit_below=0")


@pytest.fixture
def update(run, filled, random_base: Path):
    """Call ``update(exits=0)`` on a home with 40 pairs."""

    def call(*arguments: object, exits: int):
        return run("update", "--model", random_base, *ENOUGH, *arguments, exits=exits)

    return call


def lines(run, *arguments) -> list[dict[str, str]]:
    header, *rows = (line.split("\t") for line in run("updates", *arguments).out.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_nights_of_each_kind_are_listed_and_every_id_can_be_asked_for(
    run, update, rows, tmp_path
) -> None:
    assert "no update yet" in run("updates").out
    first = update("--json", exits=0).json
    for _ in range(2):
        nothing = update("--json", exits=3).json
    run("import", rows, "--namespace", "shop")
    run("update", "--model", tmp_path / "nowhere", "--namespace", "shop", exits=1)
    shop, ours, promoted = lines(run)
    assert [*shop] == [
        "time", "namespace", "verdict", "examples", "accuracy", "took", "serves", "id",
    ]  # fmt: skip
    assert (shop["verdict"], shop["namespace"], shop["took"]) == ("failed", "shop", "0 s")
    assert (ours["verdict"], ours["examples"], ours["accuracy"]) == ("nothing new × 2", "0", "-")
    assert (promoted["verdict"], promoted["id"]) == ("promoted", first["revision"][:10])
    assert [row["serves"] for row in (shop, ours, promoted)] == ["-", "-", "live"]
    counts = first["counts"]
    assert int(promoted["examples"]) == counts["trained"] + counts["trained_thumbs"]
    before, after = map(float, promoted["accuracy"].split(" -> "))
    assert 0 <= before < after <= 1
    assert "namespace" not in lines(run, "--namespace", "default")[0]

    found = run("updates", "--json").json["updates"]
    assert [row["update_id"][:13] for row in found[:2]] == [shop["id"], ours["id"]]
    assert "nowhere" in found[0]["notes"][0]
    assert len(run("updates", "--json", "--limit", 1).json["updates"]) == 1
    assert len(lines(run, "--namespace", "default")) == 2

    assert "failed: an error ended it" in run("report", found[0]["update_id"]).out
    for name in (first["update_id"], first["revision"], promoted["id"]):
        assert run("report", name, "--json").json["update_id"] == first["update_id"]
    for name in (nothing["update_id"], ours["id"]):
        out = run("report", name).out.splitlines()
        assert out[0].startswith("nothing new: ")
        assert out[2].startswith("the last of 2 that ended so, since 20")
    assert "has no update 'zz'" in run("report", "zz", exits=1).err


def test_thumbs_count_as_examples_and_not_as_pairs(run, filled) -> None:
    """The report said pairs 47, thumbs 65, and the list 112 pairs."""
    counts = {"trained": 47, "trained_thumbs": 65}
    report = UpdateReport("u-1", "default", "tiny", 1.0, "nothing_to_gain", None, counts=counts)
    with closing(connect(Home.open(filled))) as connection:
        Updates(connection).add(
            UpdateRow("u-1", "default", 1.0, 2.0, None, None, report.verdict, report.to_mapping())
        )
    (row,) = lines(run)
    assert (row["examples"], "pairs" in row) == ("112", False)
    (row,) = run("updates", "--json").json["updates"]
    assert (row["pairs"], row["thumbs"]) == (47, 65)


def test_a_report_opens_with_the_newest_night_and_says_that_it_failed(
    run, update, filled, tmp_path
) -> None:
    first = update("--json", exits=0).json
    run("import", _more(tmp_path))
    run("update", "--model", tmp_path / "nowhere", exits=1)
    shown = run("report").out
    assert shown.startswith("failed: an error ended it; nothing was changed\n")
    assert str(tmp_path / "nowhere") in shown.splitlines()[2]
    assert "the last update that trained something:\npromoted: held-out accuracy" in shown
    value = run("report", "--json").json
    assert (value["verdict"], value["serving"]["now"]) == ("failed", None)
    assert value["last_trained"]["update_id"] == first["update_id"]
    assert value["last_trained"]["serving"]["now"] == "live"
    run("pairs")  # which reads the share that is held out of the last update that trained


def _more(folder: Path) -> Path:
    file = folder / "more.jsonl"
    file.write_text('{"prompt": "Who?", "chosen": "A friend.", "rejected": "Nobody."}\n')
    return file


def test_an_update_that_runs_or_finds_another_one_running_is_listed(run, update, filled) -> None:
    home = Home.open(filled)
    found = UpdateReport("u-1", "default", "tiny", 1.0, "nothing_new", None)
    with closing(connect(home)) as connection, exclusive(home):
        Journal(connection).begin(found)
        update(exits=75)
    assert [row["verdict"] for row in lines(run)] == ["running", "busy"]
    assert lines(run)[0]["took"] == "-"
    out = run("report").out.splitlines()
    assert out[0].startswith("running: it has not ended")
    assert len(out) == 2, "nothing says that it was killed"


# What an update is asked for


def test_no_promote_publishes_and_exits_0(run, update) -> None:
    result = update("--no-promote", exits=0)
    first = result.out.splitlines()[0]
    assert first.startswith("passed: held-out accuracy")
    assert first.endswith("; published, and not made live")
    assert (
        "was not made live: it was not to be promoted; `agentpref adapters promote rev-"
        in result.out
    )
    assert run("adapters", "list", "--json").json["serving"]["live"] == "base"
    assert run("report").out.startswith(result.out)


def test_canary_serves_a_share_and_again_repeats_a_night(run, update) -> None:
    update("--no-promote", exits=0)
    out = update("--canary", "0.1", exits=3).out
    assert "agentpref update --again" in out
    value = update("--canary", "0.1", "--again", "--json", exits=0).json
    serving = run("adapters", "list", "--json").json["serving"]
    assert (serving["canary"], serving["weight"]) == (value["revision"], 0.1)
    assert "now the canary" in run("report").out
    listed = [(row["verdict"], row["serves"]) for row in lines(run)]
    assert listed == [("passed", "canary"), ("nothing new", "-"), ("passed", "-")]
    assert "share above 0" in update("--canary", "2", exits=2).err
    assert "--no-promote" in update("--canary", "0.1", "--no-promote", exits=2).err


def test_of_a_canary_that_was_ended_nothing_says_that_it_serves(run, update) -> None:
    revision = update("--canary", "0.1", "--json", exits=0).json["revision"]
    run("adapters", "canary", "--end")
    assert [row["serves"] for row in lines(run)] == ["-"]
    assert run("updates", "--json").json["updates"][0]["serves"] is None
    headline, _, identity, *more = run("report").out.splitlines()
    assert headline.endswith("; published, and not made live")
    assert f"revision {revision}, from the base model; was the canary until 20" in identity
    assert any(line.startswith(f"{revision} passed and was not made live: ") for line in more)
    run("adapters", "promote", revision)
    assert run("report").out.splitlines()[2].endswith("; now serving")
    run("adapters", "rollback")
    assert "; served until 20" in run("report").out.splitlines()[2]


def test_an_update_that_the_limit_of_time_spoiled_exits_7(run, update) -> None:
    short = ("--max-minutes", "0.0001", "--set", "gate.kl_budget=1e-12")
    out = update(*short, exits=7).out
    assert out.startswith("cut short: max_minutes stopped the training")
    assert lines(run)[0]["verdict"] == "cut short"


def test_what_was_rolled_back_stays_so_until_people_promote_it(run, update) -> None:
    first = update("--json", exits=0).json["revision"]
    run("adapters", "rollback")
    out = update(exits=3).out
    assert f"learned by {first}, which was rolled back" in out
    assert run("adapters", "list", "--json").json["serving"]["live"] == "base"
    run("adapters", "promote", first)
    assert "rolled back" not in update(exits=3).out


def test_a_hold_is_shown_respected_and_ended(run, update) -> None:
    out = run("adapters", "hold", "--reason", "the auditors are here").out
    assert out.startswith("held since 20")
    assert out.endswith(
        ": the auditors are here; nothing is promoted until `agentpref adapters hold --end`\n"
    )
    assert run("adapters", "list").out.endswith(out)
    assert run("adapters", "list", "--json").json["hold"]["reason"] == "the auditors are here"
    out = update(exits=0).out
    assert "'default' is held (the auditors are here)" in out
    assert "was not made live: the namespace is held" in out
    (found,) = run("adapters", "list", "--json").json["revisions"]
    err = run("adapters", "promote", found["revision"], exits=1).err
    assert "agentpref adapters hold --end" in err
    assert err.count(os.linesep) == 1
    assert "not held" in run("adapters", "hold", "--end").out
    assert run("adapters", "list", "--json").json["hold"] is None
    run("adapters", "promote", found["revision"])
    run("adapters", "hold", "--end", "--reason", "none", exits=2)
