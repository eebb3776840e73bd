"""A remote log has a log's face, and loses and doubles nothing, whatever is down or killed."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from collector import Collector

from agentpref.errors import ConfigError, InvalidFeedback, InvalidMessage, LogClosed
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run
from agentpref_adapters.remote import RemoteLog

ASK = [{"role": "user", "content": "Is it raining?"}]


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    collector = Collector(tmp_path / "home").start()
    yield collector
    collector.stop()


@pytest.fixture
def open_log(tmp_path: Path, collector: Collector) -> Iterator[Callable[..., RemoteLog]]:
    opened: list[RemoteLog] = []

    def make(key: str = "ap-shop", outbox: str = "outbox", **settings: object) -> RemoteLog:
        opened.append(RemoteLog(collector.url, key, outbox=tmp_path / outbox, **settings))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for log in opened:
        log.close()


def kept(
    folder: Path, namespace: str = "shop"
) -> tuple[list[Run], list[Feedback], list[Comparison]]:
    with closing(connect(Home.open(folder), readonly=True)) as connection:
        store = Store(connection)
        return (
            [*store.runs(namespace)],
            [*store.feedback(namespace)],
            [*store.comparisons(namespace)],
        )


def waiting(log: RemoteLog) -> int:
    return sum(path.stat().st_size for path in log.home.path.glob("*.jsonl"))


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def test_everything_that_a_log_takes_arrives_as_a_log_would_have_kept_it(
    collector: Collector, open_log: Callable[..., RemoteLog], tmp_path: Path
) -> None:
    def use(log: Log) -> None:
        tool = {"type": "function", "function": {"name": "look"}}
        first = log.record(
            ASK, "Yes.", model="m", revision="rev-1", thread_id="t", trace_id="x", user_id="ada",
            tools=[tool], params={"top_p": 0.5}, token_ids=[1, 2], logprobs=[-0.5, -1.0],
            tags=["weather"], metadata={"finish_reason": "stop"},
        )  # fmt: skip
        second = log.record(ASK, "No.", tools=[tool], run_id="of my own")
        log.thumbs(first, up=True, user_id="ada", comment="thanks")
        log.thumbs(trace_id="x", up=False)
        log.feedback(second, key="words", value={"a": [1]})
        log.correct(second, "It is.", source="model")
        log.compare(first, second, winner="tie")
        log.retract(second, "correction", source="model")
        assert log.flush(30)

    remote = open_log()
    use(remote)
    with Log(tmp_path / "plain") as log:
        keys = log.home.user_keys
    keys.write_bytes(Home(collector.home).user_keys.read_bytes())
    with Log(tmp_path / "plain", namespace="shop") as log:
        use(log)

    def plain(rows: object) -> str:  # without what is another in each home: ids and times
        text = repr(rows)
        ids = {run.run_id for run in [*kept(collector.home)[0], *kept(tmp_path / "plain")[0]]}
        for run_id in ids - {"of my own"}:
            text = text.replace(run_id, "RUN")
        return re.sub(r"(feedback_id|comparison_id|created_at)=[^,]*", "", text)

    assert plain(kept(collector.home)) == plain(kept(tmp_path / "plain"))
    assert remote.dropped == remote.altered == {}
    assert waiting(remote) == 0
    assert collector.logs["shop"].verify() == []


def test_what_is_recorded_while_the_collector_is_down_arrives_when_it_is_up(
    collector: Collector, open_log: Callable[..., RemoteLog], caplog: pytest.LogCaptureFixture
) -> None:
    collector.stop()
    log = open_log()
    run = log.record(ASK, "Yes.")
    log.thumbs(run, up=True)
    assert waiting(log) > 0  # a judgement is on this disk when its call returns
    assert not log.flush()
    assert "ConnectError" in str(log.trouble)
    collector.start()
    assert log.flush(30)
    assert log.trouble is None
    assert [len(rows) for rows in kept(collector.home)] == [1, 1, 0]
    assert "wait in" in caplog.text
    assert "again" in caplog.text


def test_what_a_process_left_is_sent_by_the_next_one(
    collector: Collector, open_log: Callable[..., RemoteLog], tmp_path: Path
) -> None:
    collector.stop()
    code = f"""if True:
        import os
        from agentpref_adapters.remote import RemoteLog
        log = RemoteLog({collector.url!r}, "ap-shop", outbox={str(tmp_path / "outbox")!r})
        log.thumbs(log.record({ASK!r}, "Yes."), up=True)
        os.kill(os.getpid(), 9)"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    collector.start()
    assert open_log().flush(30)
    assert [len(rows) for rows in kept(collector.home)] == [1, 1, 0]


def test_an_answer_that_was_lost_on_the_way_doubles_nothing(
    collector: Collector, open_log: Callable[..., RemoteLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    post, calls = httpx.Client.post, []

    def lose(client: httpx.Client, *args: object, **kwargs: object) -> httpx.Response:
        response = post(client, *args, **kwargs)  # type: ignore[arg-type]
        calls.append(response.status_code)
        if len(calls) < 3:
            raise httpx.ReadError("the connection broke")
        return response

    monkeypatch.setattr(httpx.Client, "post", lose)
    log = open_log()
    run = log.record(ASK, "Yes.")
    log.thumbs(run, up=True)
    assert log.flush(30)
    assert calls[:3] == [200, 200, 200]
    assert [len(rows) for rows in kept(collector.home)] == [1, 1, 0]


@pytest.mark.guarantee("record")
def test_a_remote_log_loses_and_doubles_nothing_when_its_collector_is_killed(
    tmp_path: Path, collector: Collector
) -> None:
    home, script = tmp_path / "killed", Path(__file__).parent / "collector.py"
    command = [sys.executable, str(script), str(home), str(collector.port)]
    collector.stop()
    said: list[str] = []
    with RemoteLog(collector.url, "ap-shop", outbox=tmp_path / "outbox") as log:
        for turn in range(2):
            server = subprocess.Popen(command)
            until = len(kept(home)[1]) + 5 if turn else 5
            end = time.monotonic() + 60
            while not (home / "agentpref.db").exists() or len(kept(home)[1]) < until:
                assert time.monotonic() < end
                said.append(log.thumbs(log.record(ASK, f"answer {len(said)}"), up=True))
                time.sleep(0.01)
            server.kill()
            server.wait()
        server = subprocess.Popen(command)
        assert log.flush(60)
        server.terminate()
        server.wait()
    runs, feedback, _ = kept(home)
    assert sorted(one.feedback_id for one in feedback) == sorted(said)
    assert len(runs) == len(said) == len({run.run_id for run in runs})
    collector.start()


def _say(url: str, outbox: Path, count: int) -> None:
    with RemoteLog(url, "ap-shop", outbox=outbox) as log:
        for number in range(count):
            log.record(ASK, f"{os.getpid()} {number}")


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_processes_that_share_an_outbox_lose_nothing(
    collector: Collector, open_log: Callable[..., RemoteLog], method: str
) -> None:
    log = open_log()
    log.record(ASK, "before")
    context = multiprocessing.get_context(method)
    others = [
        context.Process(target=_say, args=(collector.url, log.home.path, 20)) for _ in range(3)
    ]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert log.flush(30)
    assert len(kept(collector.home)[0]) == 61


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_goes_on_with_its_parents_log(
    collector: Collector, open_log: Callable[..., RemoteLog]
) -> None:
    log = open_log()
    run = log.record(ASK, "before")
    assert log.flush(30)
    if (child := os.fork()) == 0:
        log.thumbs(run, up=True)
        os._exit(0 if log._outbox.claim() is False else 1)  # the parent goes on to send
    assert os.waitpid(child, 0)[1] == 0
    log.thumbs(run, up=False)
    assert log.flush(30)
    assert [len(rows) for rows in kept(collector.home)] == [1, 2, 0]


def test_a_wrong_key_loses_nothing_and_is_said(
    open_log: Callable[..., RemoteLog], collector: Collector
) -> None:
    log = open_log("wrong")
    log.record(ASK, "Yes.")
    assert not log.flush()
    assert "refuses the key (401)" in str(log.trouble)
    log.close()
    with pytest.raises(ConfigError, match="another url or key wait") as refused:
        open_log("ap-shop")
    note = log.home.path / "target"
    assert str(note) in str(refused.value)
    note.unlink()
    assert open_log("ap-shop").flush(30)
    assert len(kept(collector.home)[0]) == 1


def test_logs_with_two_keys_never_share_an_outbox(
    open_log: Callable[..., RemoteLog], collector: Collector
) -> None:
    shop, again = open_log("ap-shop"), open_log("ap-shop")
    with pytest.raises(ConfigError, match=r"has .* open; give each key"):
        open_log("ap-bank")
    shop.close()
    with pytest.raises(ConfigError, match=r"has .* open"):
        open_log("ap-bank")
    again.record(ASK, "Yes.")
    assert again.flush(30)
    again.close()
    bank = open_log("ap-bank")  # nothing waits, and nobody has it open
    bank.record(ASK, "No.")
    assert bank.flush(30)
    assert [run.output["content"] for run in kept(collector.home, "shop")[0]] == ["Yes."]
    assert [run.output["content"] for run in kept(collector.home, "bank")[0]] == ["No."]


def test_a_closed_log_sends_nothing_of_the_next_one(
    open_log: Callable[..., RemoteLog], collector: Collector
) -> None:
    shop = open_log("ap-shop")
    shop.close()
    collector.stop()
    bank = open_log("ap-bank")
    bank.thumbs("a run", up=True)
    bank.close()
    assert not shop._sender.flush(1)  # as of a thread that was in it while the log was closed
    assert "another url or key" in str(shop.trouble)
    collector.start()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_that_ends_leaves_the_outbox_to_its_parent(
    open_log: Callable[..., RemoteLog], collector: Collector
) -> None:
    log = open_log()
    if (child := os.fork()) == 0:
        log.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(ConfigError, match=r"has .* open"):
        open_log("ap-bank")


def test_a_judgement_waits_for_the_run_of_another_host(
    open_log: Callable[..., RemoteLog], collector: Collector
) -> None:
    here, there = open_log(outbox="here"), open_log(outbox="there")
    here.thumbs("of the other host", up=True)
    assert here.flush(30)
    assert kept(collector.home)[1] == []
    there.record(ASK, "Yes.", run_id="of the other host")
    assert there.flush(30)
    assert eventually(lambda: len(kept(collector.home)[1]) == 1)
    assert here.dropped == {}


def test_a_judgement_whose_run_never_came_is_refused_by_name(
    open_log: Callable[..., RemoteLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentpref_adapters._remote_sender.PATIENCE_SECONDS", 0.0)
    log = open_log()
    log.thumbs("nowhere", up=True)
    assert log.flush(30)
    assert log.dropped == {"UnknownRun": 1}
    refused = (log.home.path / "refused.jsonl").read_text()
    assert "no run 'nowhere'" in refused


def test_a_row_that_the_collector_refuses_is_named_and_the_others_are_kept(
    open_log: Callable[..., RemoteLog], collector: Collector
) -> None:
    log = open_log()
    log.record(ASK, "Yes.", run_id="same")
    log.record(ASK, "No.", run_id="same")
    log.record(ASK, "Perhaps.")
    assert log.flush(30)
    assert log.dropped == {"RunExists": 1}
    assert [run.output["content"] for run in kept(collector.home)[0]] == ["Yes.", "Perhaps."]
    assert "RunExists: run 'same' exists" in (log.home.path / "refused.jsonl").read_text()


def test_refused_rows_take_bounded_room_and_the_newest_are_kept(
    open_log: Callable[..., RemoteLog],
    collector: Collector,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = open_log(outbox_bytes=80_000)
    log.record(ASK, "Yes.", run_id="same")
    for number in range(12):
        log.record(ASK, f"{number} {os.urandom(2_500).hex()}", run_id="same")
        assert log.flush(30)
    newest, older = (log.home.path / name for name in ("refused.jsonl", "refused-older.jsonl"))
    assert log.dropped == {"RunExists": 12}
    assert "11 " in newest.read_text()
    sizes = newest.stat().st_size, older.stat().st_size
    assert max(sizes) < 20_000
    assert log._outbox.size() == sum(sizes)
    assert f"{older} is removed" in caplog.text
    log.close()
    assert open_log("ap-bank").flush(30)  # what was refused waits for nobody


def test_a_body_that_is_too_large_is_sent_in_parts(tmp_path: Path) -> None:
    collector = Collector(tmp_path / "home", max_bytes=5_000).start()
    try:
        with RemoteLog(collector.url, "ap-shop", outbox=tmp_path / "outbox") as log:
            for number in range(20):
                log.record([{"role": "user", "content": os.urandom(400).hex()}], str(number))
            log.record([{"role": "user", "content": os.urandom(9_000).hex()}], "far too large")
            assert log.flush(30)
            assert log.dropped == {"TooLarge": 1}
        assert len(kept(collector.home)[0]) == 20
    finally:
        collector.stop()


def test_what_a_user_said_before_being_forgotten_does_not_arrive_later(
    collector: Collector, open_log: Callable[..., RemoteLog]
) -> None:
    log = open_log()
    log.record(ASK, "Yes.", user_id="ada")
    assert log.flush(30)
    collector.stop()
    log.record(ASK, "ada's secret", user_id="ada")
    log.record(ASK, "No.", user_id="bob")
    assert not log.flush()
    forget(collector.home, "ada")
    collector.start()
    log.record(ASK, "She is back.", user_id="ada")
    assert log.flush(30)
    outputs = [run.output["content"] for run in kept(collector.home)[0]]
    assert outputs == ["No.", "She is back."]
    assert log.dropped == {}  # that is as it shall be
    assert b"secret" not in b"".join(p.read_bytes() for p in log.home.path.iterdir())


def test_the_text_is_redacted_before_it_is_on_this_disk(
    collector: Collector, open_log: Callable[..., RemoteLog]
) -> None:
    collector.stop()
    log = open_log(redact=lambda text: text.replace("raining", "[weather]"))
    log.correct(log.record(ASK, "It is raining."), "It is raining hard.")
    log.close()  # whose thread renames files
    assert b"raining" not in b"".join(p.read_bytes() for p in log.home.path.iterdir())
    collector.start()
    assert open_log().flush(30)
    assert kept(collector.home)[0][0].output["content"] == "It is [weather]."


def test_users_get_the_names_of_the_home(
    collector: Collector, open_log: Callable[..., RemoteLog]
) -> None:
    log = open_log()
    log.record(ASK, "Yes.", user_id="ada")
    collector.logs["shop"].record(ASK, "No.", user_id="ada")
    assert log.flush(30)
    assert collector.logs["shop"].flush(30)
    (user,) = {run.user_id for run in kept(collector.home)[0]}
    assert user is not None
    assert user != "ada"


def test_the_outbox_is_not_for_others_to_read(
    collector: Collector, open_log: Callable[..., RemoteLog]
) -> None:
    collector.stop()
    log = open_log()
    log.thumbs(log.record(ASK, "Yes."), up=True)
    log.close()  # whose thread renames files
    assert log.home.path.stat().st_mode & 0o777 == 0o700
    modes = {path.stat().st_mode & 0o777 for path in log.home.path.iterdir()}
    assert modes == {0o600}
    assert b"ap-shop" not in b"".join(p.read_bytes() for p in log.home.path.iterdir())
    collector.start()


def test_a_line_that_is_torn_is_kept_apart_and_the_others_are_sent(
    collector: Collector, open_log: Callable[..., RemoteLog]
) -> None:
    collector.stop()
    log = open_log()
    log.thumbs(log.record(ASK, "Yes."), up=True)
    log.close()
    (path,) = [*log.home.path.glob("outbox.jsonl"), *log.home.path.glob("sending-*.jsonl")]
    with open(path, "ab") as file:
        file.write(b'0123456789abcdef {"type": "ru')
    assert [problem.table for problem in open_log().verify()] == [path.name]
    collector.start()
    again = open_log()
    assert again.flush(30)
    assert eventually(lambda: again.home.path.joinpath("refused.jsonl").exists())
    assert [len(rows) for rows in kept(collector.home)] == [1, 1, 0]


def test_a_full_outbox_drops_runs_and_keeps_judgements(
    collector: Collector, open_log: Callable[..., RemoteLog]
) -> None:
    collector.stop()
    log = open_log(outbox_bytes=1)
    run = log.record(ASK, "Yes.")
    log.thumbs(run, up=True)
    lost = log.record(ASK, "No.")
    log.thumbs(lost, up=True)
    assert log.dropped == {"NotKept": 1}
    collector.start()
    assert log.flush(30)
    runs, feedback, _ = kept(collector.home)
    assert len(runs) == len(feedback) == 1


def test_arguments_that_are_wrong_are_refused_here(open_log: Callable[..., RemoteLog]) -> None:
    log = open_log(strict=True)
    run = log.record(ASK, "Yes.")
    with pytest.raises(InvalidMessage):
        log.record([], "Yes.")
    with pytest.raises(InvalidMessage, match="tags"):
        log.record(ASK, "Yes.", tags="weather")  # type: ignore[arg-type]
    with pytest.raises(InvalidFeedback):
        log.thumbs(run, up=None)
    with pytest.raises(InvalidFeedback):
        log.compare(run, run, winner="a")
    for call, command in (
        (lambda: log.forget("ada"), "agentpref forget"),
        (lambda: log.declare("stars", low=1, high=5), "agentpref keys declare stars --low 1"),
        (lambda: log.undeclare("stars"), "agentpref keys undeclare stars"),
    ):
        with pytest.raises(ConfigError, match=command):
            call()
    log.close()
    with pytest.raises(LogClosed):
        log.thumbs(run, up=True)
    log.strict = False
    assert log.record(ASK, "Yes.")  # an app that logs after the end goes on


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("collector", "k"),
        ("ftp://host", "k"),
        ("http://", "k"),
        ("http://me:secret@host", "k"),
        ("http://host", ""),
        ("http://host", "a\nb"),
        ("http://host", "schlüssel"),
    ],
)
def test_what_is_no_address_or_key_is_refused(url: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        RemoteLog(url, key, outbox=tmp_path / "outbox")
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "outbox").exists()


@pytest.mark.parametrize("text", [None, "", "no certificate"])
def test_certificates_that_cannot_be_read_are_named_at_once(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"own\.pem"):
        RemoteLog("https://host", "k", outbox=tmp_path / "outbox", verify_tls=str(path))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(ConfigError, match=r"own\.pem"):
        RemoteLog("https://host", "k", outbox=tmp_path / "outbox")
    with pytest.raises(ConfigError, match="''"):
        RemoteLog("https://host", "k", outbox=tmp_path / "outbox", verify_tls="")
    assert not (tmp_path / "outbox").exists()


def test_an_error_that_nobody_foresaw_is_said_and_the_sender_goes_on(
    open_log: Callable[..., RemoteLog],
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    post, client = httpx.Client.post, httpx.Client.__init__

    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("of the proxy")

    for name, whole in (("post", post), ("__init__", client)):
        with monkeypatch.context() as broken:
            broken.setattr(httpx.Client, name, fail)
            log = open_log()
            log.record(ASK, "Yes.")
            assert not log.flush()  # at the first failure, and not after a minute
            assert "ZeroDivisionError (of the proxy)" in str(log.trouble)
        assert getattr(httpx.Client, name) is whole
        assert log.flush(30)
        assert log.trouble is None
        log.close()
    assert len(kept(collector.home)[0]) == 2
    assert "until it is over, runs and feedback wait" in caplog.text


def test_an_answer_that_is_none_of_a_collector_loses_nothing(
    open_log: Callable[..., RemoteLog], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(
        [
            httpx.Response(200, text="<html>"),
            httpx.Response(200, json={"kept": [], "refused": []}),
            httpx.Response(302, headers={"location": "http://elsewhere"}),
            httpx.Response(404, text="no such page"),
            httpx.Response(502, text="bad gateway"),
        ]
    )
    post = httpx.Client.post
    monkeypatch.setattr(
        httpx.Client, "post", lambda self, *a, **k: next(answers, None) or post(self, *a, **k)
    )
    log = open_log()
    log.record(ASK, "Yes.")
    assert log.flush(30)
    assert len(kept(collector.home)[0]) == 1
    assert next(answers, None) is None


def test_a_collector_without_the_package_names_the_command() -> None:
    code = "import sys; sys.modules['httpx'] = None; import agentpref_adapters.remote"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'agentpref[remote]'" in done.stderr
