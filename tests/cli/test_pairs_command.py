"""`pairs`: counts and the newest, all of them or those of one night."""

from __future__ import annotations

from contextlib import closing

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.log import Log


def test_pairs_since_a_time_are_those_of_the_prompts_judged_since(run, filled) -> None:
    with closing(connect(Home.open(filled))) as connection:
        connection.execute("UPDATE comparison SET created_at = created_at - 1000000")
    with Log(filled) as log:
        asked = [{"role": "user", "content": "How is it tonight?"}]
        log.correct(log.record(asked, "Dark."), "Dark and warm.")
    assert _counts(run("pairs", "--json").json) == {"comparison": 40, "correction": 1}
    assert _counts(run("pairs", "--since", "1d", "--json").json) == {"correction": 1}
    assert _counts(run("pairs", "--since", "2001-01-01", "--json").json).keys() == {
        "comparison",
        "correction",
    }
    assert run("pairs", "--since", "2999-01-01").out.startswith("no pairs since 2999-01-01")


def _counts(value) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in value["strata"]:
        counts[row["origin"]] = counts.get(row["origin"], 0) + row["train"] + row["held_out"]
    return counts


def test_pairs_since_no_time_at_all(run, filled) -> None:
    err = run("pairs", "--since", "yesterday", exits=2).err
    assert "'yesterday' is no time" in err
    assert "2026-11-19" in err
