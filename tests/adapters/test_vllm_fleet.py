"""A server of a fleet: for how long others are preferred to it."""

from __future__ import annotations

import math
import time
from contextlib import closing

import pytest

from agentpref.errors import ServerUnreachable
from agentpref.models.base_files import read_base
from agentpref_adapters import _vllm_fleet
from agentpref_adapters._vllm_fleet import LONGEST_PASS_SECONDS, PATIENCE_SECONDS, Fleet, Member
from agentpref_adapters._vllm_server import Piece, Server


def test_a_server_that_keeps_failing_is_passed_over_for_longer_and_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_vllm_fleet.time, "monotonic", lambda: 100.0)
    with closing(Server("http://127.0.0.1:9", timeout=1)) as server:
        member = Member(server, read_base("tiny"), lambda *_: Piece((), (), None))
        waits = []
        for _ in range(7):
            member.pass_over()
            waits.append(member.passed_over_until - 100)
        assert waits == [1, 2, 4, 8, 16, LONGEST_PASS_SECONDS, LONGEST_PASS_SECONDS]
        member.answered()
        assert member.passed_over_until == 0
        member.pass_over()
        assert member.passed_over_until == 101


def test_a_request_waits_for_a_restart_of_ninety_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    fleet = Fleet([], patience=PATIENCE_SECONDS)

    def restarting(ends: float) -> str:
        if now[0] < ends:
            raise ServerUnreachable("the server starts")
        return "answered"

    monkeypatch.setattr(fleet, "_round", lambda act: restarting(90.0))
    assert fleet.call(lambda member: None) == "answered"
    now[0] = 0.0
    monkeypatch.setattr(fleet, "_round", lambda act: restarting(math.inf))
    with pytest.raises(ServerUnreachable):
        fleet.call(lambda member: None)
    assert now[0] == pytest.approx(PATIENCE_SECONDS, abs=3)
    now[0] = 0.0
    monkeypatch.setattr(fleet, "everywhere", lambda act: restarting(math.inf))
    with pytest.raises(ServerUnreachable):
        fleet.connect()
    assert now[0] == pytest.approx(30, abs=3), "a wrong address is told soon"
