"""When the next update may begin."""

from __future__ import annotations

from datetime import datetime

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from agentpref_cli.pace import Pace, Window


class Clock:
    """A clock that somebody sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(50, clock=clock)


def test_failures_rest_twice_as_long_each_time_up_to_an_hour(pace: Pace, clock: Clock) -> None:
    for minutes in (1, 2, 4, 8, 16, 32, 60, 60):
        assert not pace.rests
        assert f"tried again in {minutes} min" in pace.ended(1)
        assert pace.resumes
        clock.now += 60 * minutes - 1
        assert pace.rests
        clock.now += 1
    pace.ended(0)
    assert not pace.resumes
    assert "in 1 min" in pace.ended(1), "an update that ended well begins anew"


@pytest.mark.parametrize("code", [4, 5, 6, 7])
def test_updates_in_vain_wait_for_twice_as_many_pairs(pace: Pace, code: int) -> None:
    wanted = [pace.wanted]
    for _ in range(5):
        pace.ended(code)
        wanted.append(pace.wanted)
        assert not pace.rests
    assert wanted == [50, 100, 200, 400, 400, 400]
    assert pace.ended(0) == "the next update waits for 50 new pairs"


def test_a_busy_home_is_tried_again_without_a_grudge(pace: Pace, clock: Clock) -> None:
    for _ in range(3):
        assert "in 1 min" in pace.ended(75)
        assert pace.rests
        clock.now += 60
        assert not pace.rests
    assert not pace.resumes
    assert pace.wanted == 50


@pytest.mark.parametrize("code", [130, 137, 143])
def test_what_was_ended_from_outside_is_resumed(pace: Pace, code: int) -> None:
    pace.ended(code)
    assert pace.resumes


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_a_window_and_the_rest_of_the_day_share_no_minute(start: int, end: int, at: int) -> None:
    if start == end:
        return
    moment = datetime(2026, 11, 29, at // 60, at % 60)
    one, other = Window(start, end), Window(end, start)
    assert one.has(moment) != other.has(moment)
    assert one.has(datetime(2026, 11, 29, start // 60, start % 60))
    assert Window.parse(str(one)) == one


@pytest.mark.parametrize("text", ["", "22-6", "22:00", "24:00-06:00", "22:60-6:00", "6:00-06:00"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="no part of a day"):
        Window.parse(text)
