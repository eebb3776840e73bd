"""`agentpref online`: its options and its table of settings reach the loop, and how it ends."""

from __future__ import annotations

from typing import Any

import pytest

from agentpref import online
from agentpref.online import OnlineReport, Round
from agentpref_adapters import transformers


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command gave to the loop; ``ended`` says how it shall end."""
    given: dict[str, Any] = {"ended": "rounds"}

    def run_online(home: Any, **settings: Any) -> OnlineReport:
        given.update(settings)
        done = Round(1, 8, 16, 7, 1, 0, "promoted", "rev-000001-abc", 0.01, 0.8, (0.7, 0.9))
        if settings["heard"] is not None:
            settings["heard"](done)
        report = OnlineReport("brief", "default", "base", "rev-000001-abc", given["ended"])
        report.rounds.append(done)
        return report

    monkeypatch.setattr(online, "run_online", run_online)
    monkeypatch.setattr(transformers, "TransformersBackend", lambda model: model)
    return given


ASKED = ("online", "--model", "tiny", "--judge", "brief", "--quiet")


def test_each_option_reaches_the_loop(run, loop) -> None:
    run(
        *ASKED, "--check", "rule", "--rounds", 5, "--prompts", 9, "--samples", 3, "--probes", 7,
        "--temperature", 0.5, "--answer-tokens", 33, "--no-offline", "--max-minutes", 2,
        "--max-tokens", 99, "--concurrency", 2, "--set", "seed=4", "--namespace", "other",
    )  # fmt: skip
    expected = {
        "judge": "brief", "check": "rule", "rounds": 5, "prompts": 9, "samples": 3, "probes": 7,
        "temperature": 0.5, "max_tokens": 33, "offline": False, "max_minutes": 2, "train": None,
        "namespace": "other",
    }  # fmt: skip
    assert {name: loop[name] for name in expected} == expected
    assert (loop["config"].seed, loop["asking"].concurrency) == (4, 2)
    assert loop["asking"].limits.tokens == 99


def test_a_table_of_settings_counts_where_nothing_is_typed(run, loop, tmp_path) -> None:
    file = tmp_path / "loop.toml"
    lines = (
        "seed = 3",
        "[online]",
        "rounds = 6",
        "temperature = 1",
        "check = 'rule'",
        "probes = 9",
    )
    file.write_text("\n".join((*lines, "max_tokens = 40", "offline = true")))
    run(*ASKED, "--config", file, "--probes", 5, "--no-offline")
    assert (loop["rounds"], loop["temperature"], loop["check"]) == (6, 1, "rule")
    assert (loop["probes"], loop["max_tokens"], loop["offline"]) == (5, 40, False)
    assert loop["config"].seed == 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("round = 2", "online.round is no setting; did you mean 'rounds'?"),
        ("rounds = 'x'", "online.rounds is 'x', but must be a whole number"),
        ("offline = 1", "online.offline is 1, but must be true or false"),
    ],
)
def test_a_wrong_setting_of_the_table_is_bad_usage(run, loop, tmp_path, line, why) -> None:
    file = tmp_path / "loop.toml"
    file.write_text(f"[online]\n{line}\n")
    assert why in run(*ASKED, "--config", file, exits=2).err


def test_rounds_and_the_end_are_shown(run, loop) -> None:
    shown = run(*ASKED).out
    assert "round 1: 7 of 8 pairs decided, promoted, win rate over base 0.80 [0.70, 0.90]" in shown
    assert "ended: all rounds are done" in shown
    assert run(*ASKED, "--json").json["rounds"][0]["win_rate"] == 0.8


def test_judges_who_part_exit_4(run, loop) -> None:
    loop["ended"] = "judges_disagree"
    assert "live has learned to please its judge" in run(*ASKED, exits=4).out


def test_reinforcement_starts_from_what_serves(run, loop, monkeypatch, tmp_path) -> None:
    trl = pytest.importorskip("agentpref_adapters.trl")
    asked: dict[str, Any] = {}

    def train_online(folder: Any, **settings: Any) -> Any:
        asked.update(settings)
        return trl.Trained(folder, ())

    monkeypatch.setattr(trl, "train_online", train_online)
    run(*ASKED, "--method", "rloo", "--steps", 3)
    made = loop["train"](tmp_path, tmp_path / "live", [[{"role": "user", "content": "Hi"}]], max)
    assert made == tmp_path / "adapter"
    assert (asked["method"], asked["steps"], asked["start"]) == ("rloo", 3, tmp_path / "live")
