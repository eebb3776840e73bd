"""Ages and dates as people write them."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref_cli.moments import SECONDS, age, since


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2m", 120), ("12h", 43_200), ("1.5d", 129_600), ("1w", 604_800)],
)
def test_an_age_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert age(text) == seconds
    assert since(text, 1_000_000.0) == 1_000_000.0 - seconds


@pytest.mark.parametrize("text", ["", "d", "1", "1y", "-1d", "nand", "1d2h", "9" * 400 + "d"])
def test_what_is_no_age(text: str) -> None:
    assert age(text) is None


@given(st.integers(0, 10**6), st.sampled_from(sorted(SECONDS)))
def test_every_unit_counts_in_seconds(number: int, unit: str) -> None:
    assert age(f"{number}{unit}") == number * SECONDS[unit]


def test_a_date_is_local_midnight_unless_it_says_otherwise() -> None:
    assert since("2026-11-19", 0) == datetime(2026, 11, 19).timestamp()
    assert since("2026-11-19T02:30", 0) == datetime(2026, 11, 19, 2, 30).timestamp()
    greenwich = datetime(2026, 11, 19, 2, 30, tzinfo=timezone.utc).timestamp()
    assert since("2026-11-19T02:30Z", 0) == greenwich
    assert since("2026-11-19T03:30+01:00", 0) == greenwich


@pytest.mark.parametrize("text", ["yesterday", "19.11.2026", "2026-13-01", "soon d"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match=r"isoformat|month"):
        since(text, 0)
