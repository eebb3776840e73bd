"""What users write in options: ages, dates, TOML files and `--set` assignments."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from agentpref.config import UpdateConfig
from agentpref.errors import ConfigError
from agentpref_cli.options import SECONDS, parse_age, parse_since, read_settings

NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3)
ASSIGNMENTS = st.lists(st.tuples(NAMES.map(".".join), st.integers(0, 9)), max_size=6)


def test_values_are_toml_and_dotted_keys_nest() -> None:
    settings = read_settings(
        None, ["seed=3", "loss.beta=0.2", "loss.nll = 1", "gate.length_ratio=[0.5, 2.0]"]
    )
    assert settings == {
        "seed": 3,
        "loss": {"beta": 0.2, "nll": 1},
        "gate": {"length_ratio": [0.5, 2.0]},
    }
    assert UpdateConfig.from_mapping(settings).gate.length_ratio == (0.5, 2.0)


def test_assignments_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "update.toml"
    file.write_text("seed = 1\n[loss]\nbeta = 0.5\nnll = 0.3\n", encoding="utf-8")
    assert read_settings(file, ["loss.beta=0.2"]) == {"seed": 1, "loss": {"beta": 0.2, "nll": 0.3}}


@given(ASSIGNMENTS, st.sampled_from("abc"), st.integers(0, 9))
def test_the_last_assignment_of_a_key_wins(before, key, value) -> None:
    settings = read_settings(None, [*(f"{k}={v}" for k, v in before), f"{key}={value}"])
    assert settings[key] == value


@given(ASSIGNMENTS)
def test_overlaying_one_by_one_equals_overlaying_at_once(assignments) -> None:
    texts = [f"{key}={value}" for key, value in assignments]
    assert read_settings(None, texts) == read_settings(None, [*texts, *texts])


@pytest.mark.parametrize("assignment", ["seed", "seed=", "seed=one two", "=1", "seed=1\nepochs=2"])
def test_a_text_that_is_no_assignment_is_named(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set") as caught:
        read_settings(None, [assignment])
    assert repr(assignment) in str(caught.value)


def test_a_single_word_is_text_and_needs_no_quotes() -> None:
    assert read_settings(None, ["loss.kind=ipo", "precision = float32"]) == {
        "loss": {"kind": "ipo"},
        "precision": "float32",
    }
    assert read_settings(None, ["loss.wpo=true", "x=inf"]) == {
        "loss": {"wpo": True},
        "x": float("inf"),
    }


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "update.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"update\.toml"):
        read_settings(file, [])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2m", 120), ("12h", 43_200), ("1.5d", 129_600), ("1w", 604_800)],
)
def test_an_age_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_age(text, "--age") == seconds
    assert parse_since(text, 1_000_000.0, "--since") == 1_000_000.0 - seconds


@pytest.mark.parametrize("text", ["", "d", "1", "1y", "-1d", "nand", "1d2h", "9" * 400 + "d"])
def test_a_text_that_is_no_age_is_bad_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no age") as caught:
        parse_age(text, "--age")
    assert repr(text) in caught.value.message
    assert caught.value.param_hint == "--age"


@given(st.integers(0, 10**6), st.sampled_from(sorted(SECONDS)))
def test_every_unit_counts_in_seconds(number: int, unit: str) -> None:
    assert parse_age(f"{number}{unit}", "--age") == number * SECONDS[unit]


def test_a_date_is_local_midnight_unless_it_says_otherwise() -> None:
    assert _since("2026-11-19") == datetime(2026, 11, 19).timestamp()
    assert _since("2026-11-19T02:30") == datetime(2026, 11, 19, 2, 30).timestamp()
    greenwich = datetime(2026, 11, 19, 2, 30, tzinfo=timezone.utc).timestamp()
    assert _since("2026-11-19T02:30Z") == greenwich
    assert _since("2026-11-19T03:30+01:00") == greenwich


@pytest.mark.parametrize("text", ["yesterday", "19.11.2026", "2026-13-01", "soon d"])
def test_a_text_that_is_no_time_is_bad_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no time") as caught:
        _since(text)
    assert caught.value.param_hint == "--since"


def _since(text: str) -> float:
    return parse_since(text, 0, "--since")
