"""The spill returns each record exactly once, and drops lines that were cut off."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import threading
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentpref.errors import NotKept, UnknownRun
from agentpref.home import Home
from agentpref.record import spill as module
from agentpref.record.messages import RunRow, StoredRecord, new_id, prompt_of, run_row
from agentpref.record.spill import Drained, Spill, is_whole
from agentpref.types import Comparison, Feedback, Run


@pytest.fixture
def spill(home: Home) -> Spill:
    return Spill(home)


class Taker:
    """A store that remembers what it was handed, and refuses what it is told to."""

    def __init__(self, *refused: StoredRecord) -> None:
        self.refused = refused
        self.taken: list[StoredRecord] = []

    def __call__(self, entries: Sequence[StoredRecord]) -> list[UnknownRun | None]:
        self.taken += entries
        return [UnknownRun("no such run") if e in self.refused else None for e in entries]


def said(comment: str = "yes") -> Feedback:
    return Feedback(new_id(), "run", 1.0, "k", 1.0, comment=comment)


texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=5,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}
)
runs = st.builds(
    lambda asked, tools, output, **rest: Run(
        prompt=prompt_of(asked, tools), output={"role": "assistant", "content": output}, **rest
    ),
    st.lists(messages, min_size=1, max_size=3),
    st.lists(st.dictionaries(texts, values), max_size=1),
    texts,
    run_id=texts,
    namespace=texts,
    created_at=st.floats(0, 4e9),
    user_id=st.none() | texts,
    params=st.dictionaries(texts, values),
    token_ids=st.none() | st.lists(st.integers(0, 10**6)).map(tuple),
    logprobs=st.none() | st.lists(st.floats(-50, 0)).map(tuple),
    tags=st.lists(texts).map(tuple),
)
feedback = st.builds(
    Feedback,
    texts,
    texts,
    st.floats(0, 4e9),
    texts,
    score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    value=values,
    comment=st.none() | texts,
    correction=st.none() | messages,
)
comparisons = st.builds(
    Comparison, texts, st.floats(0, 4e9), texts, texts, st.sampled_from(["a", "b", "tie"])
)


@given(st.lists(runs.map(run_row) | feedback | comparisons, min_size=1, max_size=5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_spill_returns_the_records_it_took(spill: Spill, entries: list[StoredRecord]) -> None:
    spill.append(entries)
    taker = Taker()
    assert spill.drain(taker) == Drained(len(entries), 0, 0)
    assert taker.taken == entries
    assert not spill.waits()


def test_infinite_logprobs_survive_the_spill_as_null(spill: Spill) -> None:
    prompt = prompt_of([{"role": "user", "content": "x"}])
    output = {"role": "assistant", "content": "y"}
    spill.append([run_row(Run("r", "n", 1.0, prompt, output, logprobs=(-math.inf,)))])
    taker = Taker()
    spill.drain(taker)
    (row,) = taker.taken
    assert isinstance(row, RunRow)
    assert row.logprobs == "[null]"


def test_a_spill_drains_in_batches_and_in_order(
    spill: Spill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    entries = [said(str(n)) for n in range(5)]
    for entry in entries:
        spill.append([entry])
    taker = Taker()
    assert spill.drain(taker).stored == 5
    assert taker.taken == entries


@pytest.mark.parametrize("kept", [1, 20, 40, -2])
def test_a_torn_line_is_skipped_and_the_others_are_stored(
    home: Home, spill: Spill, kept: int
) -> None:
    first, cut, last = said(), said(), said()
    spill.append([first])
    whole = home.spill.read_bytes()
    spill.append([cut])
    line = home.spill.read_bytes()[len(whole) :]
    home.spill.write_bytes(whole + line[:kept])
    spill.append([last])
    assert [*map(is_whole, home.spill.read_bytes().splitlines(keepends=True))] == [
        True,
        False,
        True,
    ]
    taker = Taker()
    assert spill.drain(taker) == Drained(2, 0, 1)
    assert taker.taken == [first, last]


def test_a_line_that_lacks_only_its_newline_is_stored(home: Home, spill: Spill) -> None:
    spill.append([said()])
    home.spill.write_bytes(home.spill.read_bytes()[:-1])
    spill.append([said()])
    assert spill.drain(Taker()) == Drained(2, 0, 0)


def test_a_changed_line_is_not_stored(home: Home, spill: Spill) -> None:
    spill.append([said("yes")])
    home.spill.write_bytes(home.spill.read_bytes().replace(b"yes", b"no!"))
    assert spill.drain(Taker()) == Drained(0, 0, 1)


def test_refused_records_go_to_the_refused_file(home: Home, spill: Spill) -> None:
    good, bad = said("good"), said("bad")
    spill.append([good, bad])
    assert spill.drain(Taker(bad)) == Drained(1, 1, 0)
    assert not home.spill.exists()
    assert b"bad" in home.refused.read_bytes()
    assert b"good" not in home.refused.read_bytes()


@pytest.mark.parametrize(
    "body",
    [b"{}", b"[]", b"1", b'{"run":[1],"bodies":["{}"]}', b'{"feedback":{"of":"the future"}}'],
)
def test_a_line_of_another_version_goes_to_the_refused_file(
    home: Home, spill: Spill, body: bytes
) -> None:
    mark = hashlib.blake2b(body + b"\n", digest_size=16).hexdigest().encode()
    home.spill.write_bytes(mark + b" " + body + b"\n")
    known = said()
    spill.append([known])
    taker = Taker()
    assert spill.drain(taker) == Drained(1, 1, 0)
    assert taker.taken == [known]
    assert body in home.refused.read_bytes()


def test_the_spill_stays_when_the_store_fails(home: Home, spill: Spill) -> None:
    spill.append([said()])
    before = home.spill.read_bytes()

    def fail(_: object) -> list[None]:
        raise NotKept("locked")

    with pytest.raises(NotKept, match="locked"):
        spill.drain(fail)
    assert home.spill.read_bytes() == before


def test_a_full_disk_leaves_no_partial_line(
    home: Home, spill: Spill, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill.append([said()])
    before = home.spill.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NotKept, match="free space"):
            spill.append([said(), said()])
    assert home.spill.read_bytes() == before


def test_a_process_that_waits_too_long_for_the_spill_raises_not_kept(
    home: Home, spill: Spill, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)
    with (
        FileLock(home.path / "spill.lock"),
        pytest.raises(NotKept, match="is locked by another process"),
    ):
        spill.append([said()])
    spill.append([said()])


def test_threads_that_append_at_once_lose_nothing(home: Home) -> None:
    def work(name: int) -> None:
        mine = Spill(home)
        for n in range(10):
            mine.append([said(f"{name} {n}")])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taker = Taker()
    assert Spill(home).drain(taker) == Drained(40, 0, 0)
    assert len({entry.comment for entry in taker.taken if isinstance(entry, Feedback)}) == 40


def test_nothing_waits_without_a_spill_file(spill: Spill) -> None:
    assert not spill.waits()
    assert spill.drain(Taker()) == Drained(0, 0, 0)


def test_lines_that_are_not_whole_are_kept_for_the_operator(home: Home, spill: Spill) -> None:
    spill.append([said("kept"), said("edited"), said("cut")])
    data = home.spill.read_bytes().replace(b"edited", b"Edited")[:-20]
    home.spill.write_bytes(data)
    assert spill.drain(Taker()) == Drained(1, 0, 2)
    assert not home.spill.exists()
    assert home.refused.read_bytes() == b"".join(data.splitlines(keepends=True)[1:])
