"""The laws of a union: homes are merged in any order, twice, and before or after a forgetting."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.home import Home
from agentpref.record.database import connect, transaction
from agentpref.record.deletion.forget import adopt
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.integrity import examine
from agentpref.record.messages import prompt_of
from agentpref.record.seals import SEALED
from agentpref.record.store import Store
from agentpref.record.transfer.merge import merge
from agentpref.types import Comparison, Feedback, Run
from tests.core.record.rows import add

pytestmark = pytest.mark.slow

Said = Run | Feedback | Comparison
Log = list[Said]
Forgotten = Mapping[str, float]
Make = Callable[..., Home]
Example = Callable[[], AbstractContextManager[Make]]

HOMES = 3
LAW = settings(max_examples=20, deadline=None)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """Makes the homes of one example, which share their keys, and removes them after it."""
    blank = Home.create(tmp_path_factory.mktemp("blank") / "home")
    connect(blank).close()
    Pseudonyms.of(blank)

    @contextmanager
    def example() -> Iterator[Make]:
        with tempfile.TemporaryDirectory() as place:

            def make(said: Iterable[Said] = (), forgotten: Forgotten | None = None) -> Home:
                folder = Path(place, str(len([*Path(place).iterdir()])))
                home = Home.open(shutil.copytree(blank.path, folder))
                log(home, said)
                if forgotten:
                    forget(home, forgotten)
                return home

            yield make

    return example


def log(home: Home, said: Iterable[Said]) -> None:
    with closing(connect(home)) as connection, transaction(connection):
        add(Store(connection), *said)


def forget(home: Home, forgotten: Forgotten) -> None:
    adopt(home, forgotten)


def rows(home: Home) -> dict[str, set[Any]]:
    with closing(connect(home, readonly=True)) as connection:
        assert examine(connection).problems == []
        columns = {"message": ("*",), "forgotten": ("*",), **SEALED}  # seals say the order, too
        return {
            table: set(connection.execute(f"SELECT {', '.join(columns[table])} FROM {table}"))
            for table in ("message", "run", "feedback", "comparison", "forgotten")
        }


def text(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


ASK, GREET = ({"role": "user", "content": content} for content in ("Is it raining?", "Hello!"))
PROMPTS = [prompt_of(turns) for turns in ([ASK], [ASK, text("Yes."), ASK], [GREET])]
USERS = st.sampled_from([None, "u", "v"])
FORGOTTEN = st.dictionaries(st.sampled_from("uv"), st.sampled_from([2.0, 21.0, 50.0]))


@st.composite
def hosts(draw: st.DrawFn) -> tuple[Log, ...]:
    """What three hosts have logged between them: some of it at several of them."""
    logs: tuple[Log, ...] = tuple([] for _ in range(HOMES))
    runs = [draw(_run(n)) for n in range(draw(st.integers(0, 6)))]
    held = {run.run_id: draw(st.sets(st.integers(0, HOMES - 1), min_size=1)) for run in runs}
    said = [draw(_feedback(n, runs)) for n in range(draw(st.integers(0, 4)) if runs else 0)]
    pairs = [(a, b) for a in runs for b in runs if a.run_id < b.run_id and a.prompt == b.prompt]
    judged = [draw(_comparison(n, pairs)) for n in range(draw(st.integers(0, 3)) if pairs else 0)]
    for host, log in enumerate(logs):
        log += [run for run in runs if host in held[run.run_id]]
        log += [one for one in said if host in held[one.run_id] and draw(st.booleans())]
        log += [
            one
            for one in judged
            if host in held[one.run_a] & held[one.run_b] and draw(st.booleans())
        ]
    return logs


@st.composite
def _run(draw: st.DrawFn, n: int) -> Run:
    prompt, output = draw(st.sampled_from(PROMPTS)), text(draw(st.sampled_from("abc")))
    return Run(f"r{n}", "default", float(n), prompt, output, user_id=draw(USERS))


@st.composite
def _feedback(draw: st.DrawFn, n: int, runs: list[Run]) -> Feedback:
    about, fixed = draw(st.sampled_from(runs)), draw(st.sampled_from([None, text("fixed")]))
    return Feedback(
        f"f{n}", about.run_id, 20.0 + n, "k", 1.0, user_id=draw(USERS), correction=fixed
    )


@st.composite
def _comparison(draw: st.DrawFn, n: int, pairs: list[tuple[Run, Run]]) -> Comparison:
    a, b = draw(st.sampled_from(pairs))
    return Comparison(f"c{n}", 30.0 + n, a.run_id, b.run_id, "a", user_id=draw(USERS))


@given(logs=hosts(), gone=FORGOTTEN, gone_there=FORGOTTEN)
@LAW
def test_a_second_merge_adds_nothing(
    example: Example, logs: tuple[Log, ...], gone: Forgotten, gone_there: Forgotten
) -> None:
    with example() as make:
        home, other = make(logs[0], gone), make(logs[1], gone_there)
        merge(home, [other])
        before = rows(home)
        (again,) = merge(home, [other])
        assert rows(home) == before
        assert again.forgot is None


@given(logs=hosts(), gone=FORGOTTEN, gone_there=FORGOTTEN)
@LAW
def test_two_homes_give_the_same_result_in_either_order(
    example: Example, logs: tuple[Log, ...], gone: Forgotten, gone_there: Forgotten
) -> None:
    with example() as make:
        home, other = make(logs[0], gone), make(logs[1], gone_there)
        merge(home, [make(logs[1], gone_there)])
        merge(other, [make(logs[0], gone)])
        assert rows(home) == rows(other)


@given(logs=hosts(), gone=st.tuples(*[FORGOTTEN] * HOMES))
@LAW
def test_three_homes_give_the_same_result_whichever_are_merged_first(
    example: Example, logs: tuple[Log, ...], gone: tuple[Forgotten, ...]
) -> None:
    with example() as make:
        left, right, middle = (make(logs[n], gone[n]) for n in (0, 0, 1))
        merge(left, [make(logs[1], gone[1]), make(logs[2], gone[2])])
        merge(middle, [make(logs[2], gone[2])])
        merge(right, [middle])
        assert rows(left) == rows(right)


@given(logs=hosts())
@LAW
def test_merged_homes_equal_one_home_that_logged_everything(
    example: Example, logs: tuple[Log, ...]
) -> None:
    with example() as make:
        home = make(logs[0])
        merge(home, [make(logs[1]), make(logs[2])])
        order = (Run, Feedback, Comparison)
        together = sorted((one for log in logs for one in log), key=lambda s: order.index(type(s)))
        assert rows(home) == rows(make(together))


@given(logs=hosts(), gone=FORGOTTEN)
@LAW
def test_forgetting_before_a_merge_equals_forgetting_after_it(
    example: Example, logs: tuple[Log, ...], gone: Forgotten
) -> None:
    with example() as make:
        first, last = make(logs[0], gone), make(logs[0])
        merge(first, [make(logs[1])])
        merge(last, [make(logs[1])])
        forget(last, gone)
        assert rows(first) == rows(last)
