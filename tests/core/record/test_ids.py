"""Ids sort by the time they were made and are UUIDs of version 7."""

from __future__ import annotations

import time
from uuid import UUID

import pytest

from agentpref.record.messages import new_id


def test_an_id_is_a_uuid_of_its_moment() -> None:
    before = time.time_ns() // 1_000_000
    made = UUID(new_id())
    after = time.time_ns() // 1_000_000
    assert made.version == 7
    assert made.variant == "specified in RFC 4122"
    assert before <= made.int >> 80 <= after


def test_ids_sort_within_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [1_700_000_000_000_000_000 + n * 1_000 for n in (0, 1, 500, 998, 999, 1_000, 2_000)]
    ticking = iter(moments)
    monkeypatch.setattr(time, "time_ns", lambda: next(ticking))
    ids = [new_id() for _ in moments]
    assert sorted(ids) == ids


def test_ids_made_at_one_moment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    assert len({new_id() for _ in range(1_000)}) == 1_000
