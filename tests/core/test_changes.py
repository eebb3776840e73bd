"""What comes back of what was set aside: what live agrees with now, if somebody can mean it."""

from __future__ import annotations

from contextlib import closing

import pytest

from agentpref.aside import with_aside
from agentpref.changes import find_changes
from agentpref.config import UpdateConfig
from agentpref.home import Home
from agentpref.learn.data import Available
from agentpref.learn.encode import EncodedExample
from agentpref.record.asides import Refusal, is_odd
from agentpref.record.database import connect
from agentpref.types import UpdateReport
from tests.core.learn.examples import make_pair

ASIDE = [make_pair(n, "Done.", "It is on.", tag="done") for n in range(40)]
OTHERS = [make_pair(100 + n, "Yes", "No", tag="care") for n in range(40)]
OLD_REPORT = {"failed": ["wishes: 40 of 40 chosen answers are one and the same text"]}


class Agrees:
    """A learner whose live revision agrees with every pair."""

    def measure(self, examples):
        return [EncodedExample(one, (9,), ((1, 2), (3,)), (None, None)) for one in examples]

    def ratios(self, policy, rows):
        return [(1.0, 0.0) for _ in rows]


@pytest.fixture
def connection(tmp_path):
    with closing(connect(Home.create(tmp_path / "home"))) as connection:
        yield connection


def back(connection, *attempts):
    names = frozenset(one.example_id for one in (*ASIDE, *OTHERS))
    refusal = Refusal("u-1", 0.0, "rev-0", {"attempts": [*attempts]}, names)
    available = Available(aside=(*ASIDE, *OTHERS))
    found = find_changes(Agrees(), available, connection, [refusal], "rev-1", UpdateConfig())
    return {
        tag
        for tag in ("done", "care")
        for one in (*ASIDE, *OTHERS)
        if one.tag == tag and one.example_id in found.back
    }


@pytest.mark.guarantee("learning")
def test_what_nobody_can_mean_does_not_come_back_because_live_agrees_with_it(
    connection,
):
    """80 times "Done." was refused, and taken in again by the update after the next one."""
    fine = {"odd": [], "failed": []}
    assert back(connection, fine) == {"done", "care"}
    assert back(connection, {"odd": ["done"], "failed": []}, fine) == {"care"}
    assert back(connection, OLD_REPORT) == set(), "older reports do not say in which tag"


def test_what_is_odd_is_kept_by_tag():
    assert is_odd({"attempts": [{"odd": ["done"]}]}, "done")
    assert not is_odd({"attempts": [{"odd": ["done"], **OLD_REPORT}]}, "care")
    assert not is_odd({}, "done")


def test_the_report_does_not_say_that_what_is_odd_comes_back_by_its_tag():
    attempt = {"odd": ["done"], "without": ["tag done (nobody can mean it)"]}
    report = UpdateReport(
        "u-1", "default", "tiny", 0.0, "refused", None, attempts=[attempt], checks=[]
    )
    groups = {"set_aside": ASIDE, "trained": OTHERS, "new_evaluated": []}
    odd, other = with_aside(report, [], Available(), groups).set_aside
    assert odd["back"].startswith("newer judgements that agree on the same prompts bring them back")
    assert "on the same prompts or in the same tag bring them back" in other["back"]
