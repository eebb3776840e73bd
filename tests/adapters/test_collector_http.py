"""The collector keeps each row once, on disk before it answers, and refuses bad ones by name."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from collector import KEYS, app
from starlette.testclient import TestClient

from agentpref.errors import NotKept
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store

RUN = {
    "type": "run",
    "id": "r",
    "created_at": 1.0,
    "messages": [{"role": "user", "content": "hi"}],
    "output": "yo",
}
THUMB = {
    "type": "feedback",
    "id": "f",
    "created_at": 2.0,
    "run_id": "r",
    "key": "thumbs",
    "score": 1,
}


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[dict[str, Log]]:
    logs = {name: Log(tmp_path / "home", namespace=name) for name in KEYS.values()}
    yield logs
    for log in logs.values():
        log.close()


@pytest.fixture
def client(logs: dict[str, Log]) -> Iterator[TestClient]:
    with TestClient(app(logs, max_bytes=100_000, max_rows=5)) as client:
        client.headers["authorization"] = "Bearer ap-shop"
        yield client


def post(client: TestClient, *rows: Any, **batch: Any) -> dict[str, Any]:
    response = client.post("/v1/log", json={"rows": [*rows], **batch})
    assert response.status_code == 200, response.text
    return response.json()


def counts(logs: dict[str, Log], namespace: str = "shop") -> tuple[int, int]:
    connection = connect(logs[namespace].home, readonly=True)
    try:
        stats = Store(connection).stats(namespace)
        return stats["runs"], stats["feedback"]
    finally:
        connection.close()


def test_what_is_answered_as_kept_is_on_disk(client: TestClient, logs: dict[str, Log]) -> None:
    assert post(client, RUN, THUMB) == {"kept": ["r", "f"], "refused": []}
    assert counts(logs) == (1, 1)


def test_a_batch_that_comes_again_changes_nothing(client: TestClient, logs: dict[str, Log]) -> None:
    assert post(client, RUN, THUMB) == post(client, RUN, THUMB)
    assert counts(logs) == (1, 1)
    assert logs["shop"].verify() == []


@pytest.mark.parametrize(
    ("row", "error", "word"),
    [
        (None, "InvalidMessage", "row"),
        ([], "InvalidMessage", "row"),
        ({}, "InvalidMessage", "type"),
        ({**RUN, "type": "update"}, "InvalidMessage", "type"),
        ({**RUN, "id": ""}, "InvalidMessage", "id"),
        ({**RUN, "id": 3}, "InvalidMessage", "id"),
        ({**RUN, "created_at": "now"}, "InvalidMessage", "created_at"),
        ({**RUN, "created_at": True}, "InvalidMessage", "created_at"),
        ({**RUN, "messages": []}, "InvalidMessage", "messages"),
        ({**RUN, "messages": "hi"}, "InvalidMessage", "messages"),
        ({**RUN, "output": None}, "InvalidMessage", "output"),
        ({**RUN, "output": {"role": "user", "content": "x"}}, "InvalidMessage", "output"),
        ({**RUN, "tags": {"a": 1}}, "InvalidMessage", "tags"),
        ({**RUN, "logprobs": ["a"]}, "InvalidMessage", "logprobs"),
        ({**RUN, "user_id": {}}, "InvalidMessage", "user_id"),
        ({**RUN, "tools": {"a": 1}}, "InvalidMessage", "tools"),
        ({**THUMB, "run_id": "nowhere"}, "UnknownRun", "nowhere"),
        ({**THUMB, "run_id": "\nbank\nt"}, "InvalidFeedback", "run_id"),
        ({**THUMB, "trace_id": "t"}, "InvalidFeedback", "run_id or trace_id"),
        ({**THUMB, "score": 0.5}, "InvalidFeedback", "score"),
        ({**THUMB, "score": {}}, "InvalidFeedback", "score"),
        ({**THUMB, "source": "me"}, "InvalidFeedback", "source"),
        ({**THUMB, "scale": [1, 0]}, "InvalidFeedback", "scale"),
        ({**THUMB, "scale": ["a", 0]}, "InvalidFeedback", "f"),
        ({**THUMB, "correction": "", "score": None}, "InvalidFeedback", "correction"),
        ({**THUMB, "correction": [1]}, "InvalidMessage", "output"),
        (
            {"type": "comparison", "id": "c", "created_at": 1, "run_a": "r", "run_b": "r",
             "winner": "a"},
            "InvalidFeedback", "itself",
        ),
        ({"type": "comparison", "id": "c", "created_at": 1}, "InvalidFeedback", "run_"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_by_name_and_the_others_are_kept(
    client: TestClient, logs: dict[str, Log], row: Any, error: str, word: str
) -> None:
    answer = post(client, {**RUN, "id": "good"}, row, THUMB | {"run_id": "good", "id": "liked"})
    (refused,) = answer["refused"]
    assert answer["kept"] == ["good", "liked"]
    assert (refused["row"], refused["error"]) == (1, error)
    assert word in refused["message"]
    assert counts(logs) == (1, 1)
    assert logs["shop"].verify() == []


def test_a_key_reaches_its_own_namespace_only(client: TestClient, logs: dict[str, Log]) -> None:
    other = {"authorization": "Bearer ap-bank"}
    response = client.post("/v1/log", json={"rows": [RUN]}, headers=other)
    assert response.json()["kept"] == ["r"]
    answer = post(
        client,
        RUN,
        THUMB,
        {**THUMB, "id": "g", "trace_id": "r", "run_id": None},
        {"type": "comparison", "id": "c", "created_at": 1, "run_a": "r", "run_b": "q",
         "winner": "a"},
    )  # fmt: skip
    errors = [refused["error"] for refused in answer["refused"]]
    assert errors == ["RunExists", "UnknownRun", "UnknownRun", "UnknownRun"]
    assert counts(logs) == (0, 0)
    assert counts(logs, "bank") == (1, 0)


def test_a_namespace_in_a_row_is_not_believed(client: TestClient, logs: dict[str, Log]) -> None:
    post(client, {**RUN, "namespace": "bank"})
    assert counts(logs) == (1, 0)


@pytest.mark.parametrize("ahead", [-5_000.0, 5_000.0])
def test_times_are_moved_to_the_clock_of_the_home(
    client: TestClient, logs: dict[str, Log], ahead: float
) -> None:
    now = time.time()
    post(client, {**RUN, "created_at": now + ahead - 10}, sent_at=now + ahead)
    connection = connect(Home(logs["shop"].home.path), readonly=True)
    (run,) = Store(connection).runs("shop")
    connection.close()
    assert abs(run.created_at - (now - 10)) < 5


def test_no_row_is_later_than_the_present(client: TestClient, logs: dict[str, Log]) -> None:
    post(client, {**RUN, "created_at": 9e12})
    connection = connect(logs["shop"].home, readonly=True)
    (run,) = Store(connection).runs("shop")
    connection.close()
    assert run.created_at <= time.time()


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"rows": 3}', {}, 400),
        (b'{"rows": [], "sent_at": "x"}', {}, 400),
        (b'{"rows": [1, 2, 3, 4, 5, 6]}', {}, 413),
        (b"x" * 100_001, {}, 413),
        (gzip.compress(b"x" * 100_000_000, mtime=0), {"content-encoding": "gzip"}, 413),
        (b"no gzip", {"content-encoding": "gzip"}, 400),
        (gzip.compress(b'{"rows": []}', mtime=0)[:-4], {"content-encoding": "gzip"}, 400),
        (gzip.compress(b'{"rows": []}', mtime=0) + b"rest", {"content-encoding": "gzip"}, 400),
        (b'{"rows": []}', {"content-encoding": "br"}, 415),
        (b'{"rows": []}', {"authorization": "Bearer wrong"}, 401),
    ],
)
def test_what_is_no_batch_gets_a_status_and_a_message(
    client: TestClient, body: bytes, headers: dict[str, str], status: int
) -> None:
    response = client.post("/v1/log", content=body, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_packed_batch_is_read(client: TestClient, logs: dict[str, Log]) -> None:
    body = gzip.compress(orjson.dumps({"rows": [RUN]}))
    response = client.post("/v1/log", content=body, headers={"content-encoding": "gzip"})
    assert response.json()["kept"] == ["r"]


def test_a_disk_that_takes_nothing_is_said_so_that_the_batch_comes_again(
    client: TestClient, logs: dict[str, Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise NotKept("no space is left")

    monkeypatch.setattr(logs["shop"]._writer._durable, "write", full)
    response = client.post("/v1/log", json={"rows": [RUN]})
    assert response.status_code == 503
    assert "no space" in response.json()["error"]["message"]
