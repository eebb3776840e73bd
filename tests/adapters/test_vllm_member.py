"""A server as a member of a fleet: for how long it is passed over."""

from __future__ import annotations

from contextlib import closing

import pytest

from agentpref_adapters import _vllm_member
from agentpref_adapters._vllm_member import LONGEST_PASS_SECONDS, Handling, Member
from agentpref_adapters._vllm_server import Server


def test_one_that_stays_silent_is_passed_over_for_longer_and_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_vllm_member.time, "monotonic", lambda: 100.0)
    with closing(Server("http://127.0.0.1:9", timeout=1)) as server:
        member = Member(server, Handling(*[lambda *_: None] * 4))
        waits = []
        for _ in range(7):
            member.pass_over()
            waits.append(member.passed_over_until - 100)
        assert waits == [1, 2, 4, 8, 16, LONGEST_PASS_SECONDS, LONGEST_PASS_SECONDS]
        member.praise()
        assert member.passed_over_until == 0
        member.pass_over()
        assert member.passed_over_until == 101
