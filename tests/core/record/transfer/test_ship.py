"""Segments carry what homes logged through a folder or a bucket: nothing is lost or doubled."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import ConfigError, MissingDependency, NotKept, UpdateRunning
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget, forget_run
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.transfer import ship as module
from agentpref.record.transfer.backup import backup
from agentpref.record.transfer.merge import Merged, merge
from agentpref.record.transfer.places import Place
from agentpref.record.transfer.segments import ROWS, packed
from agentpref.record.transfer.ship import ship

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]

Make = Callable[[str], Log]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes homes that share a key."""
    logs: list[Log] = []
    key = os.urandom(32).hex() + "\n"

    def make(name: str) -> Log:
        path = tmp_path / name
        if not path.exists():
            with Log(path, namespace="shop") as log:
                log.home.user_keys.write_text(key)
        logs.append(Log(path, namespace="shop"))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    return str(tmp_path / "bucket")


def say(log: Log, number: int, user: str = "ada") -> None:
    run = log.record(
        ASK, f"answer {number}", user_id=user, model="m", thread_id="t", trace_id=f"x{number}",
        tools=[{"type": "function", "function": {"name": "look", "z": 1, "a": 2}}],
        params={"top_p": 0.1}, token_ids=[number], logprobs=[-0.5], tags=["weather"],
        metadata={"zeta": [None, {"ä": 1e-7}], "alpha": ""},
    )  # fmt: skip
    log.thumbs(run, up=number % 2 == 0, user_id=user, comment="so")
    log.correct(run, {"role": "assistant", "content": f"better {number}"}, source="model")
    log.feedback(run, key="k", value={"any": [0, "", None]})
    other = log.record(ASK, f"other {number}", tools=[
        {"type": "function", "function": {"name": "look", "z": 1, "a": 2}}])  # fmt: skip
    log.compare(run, other, winner="b", user_id=user)
    log.retract(other)
    log.flush()


def content(home: Home | Path) -> dict[str, list[Any]]:
    """What a home holds of what was said, whatever the order in which it came."""
    columns = {
        "run": "run_id, namespace, created_at, prompt, output, model, revision, thread_id, "
        "trace_id, user_id, params, token_ids, logprobs, tags, metadata",
        "feedback": "feedback_id, run_id, created_at, key, score, value, comment, source, user_id, "
        "correction, scale",
        "comparison": "comparison_id, created_at, run_a, run_b, winner, source, user_id, comment",
        "message": "id, parent, body",
        "forgotten": "user_id, at",
    }
    with closing(connect(Home.open(home), readonly=True)) as connection:
        assert examine(connection).problems == []
        return {
            table: sorted(connection.execute(f"SELECT {names} FROM {table}").fetchall(), key=repr)
            for table, names in columns.items()
        }


def names(bucket: str) -> list[str]:
    return sorted(os.listdir(bucket))


def lines(bucket: str) -> list[dict[str, Any]]:
    return [
        orjson.loads(line)
        for name in names(bucket)
        for line in gzip.decompress(Path(bucket, name).read_bytes()).splitlines()
    ]


def gathered(home: Home, bucket: str) -> Merged:
    (merged,) = merge(home, [bucket])
    return merged


def test_a_home_that_merges_the_segments_holds_what_the_others_hold(
    make: Make, bucket: str
) -> None:
    lyon, paris = make("lyon"), make("paris")
    for number in range(3):
        say(lyon, number)
        ship(lyon.home, bucket)
    merged = gathered(paris.home, bucket)
    assert content(paris.home) == content(lyon.home)
    assert merged.runs.added == 6
    assert merged.refused == {}
    assert gathered(paris.home, bucket).runs.known == 0  # the segments are not read again


def test_only_what_is_new_is_shipped(make: Make, bucket: str) -> None:
    lyon = make("lyon")
    say(lyon, 1)
    assert ship(lyon.home, bucket).runs == 2
    before = names(bucket)
    assert ship(lyon.home, bucket).segments == []
    assert names(bucket) == before
    say(lyon, 2)
    assert ship(lyon.home, bucket).runs == 2
    ids = [row["id"] for row in lines(bucket) if row["type"] == "run"]
    assert len(ids) == len({*ids}) == 4


def test_rows_that_take_the_place_of_forgotten_ones_are_shipped(make: Make, bucket: str) -> None:
    """SQLite gives the number of the last row again when that row is gone."""
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1, "bob")
    say(lyon, 2, "ada")
    ship(lyon.home, bucket)
    lyon.forget("ada")
    say(lyon, 3, "bob")
    ship(lyon.home, bucket)
    gathered(paris.home, bucket)
    assert content(paris.home) == content(lyon.home)


@settings(max_examples=5)
@given(order=st.permutations(range(6)), again=st.lists(st.integers(0, 5), max_size=4))
def test_segments_merge_in_any_order_and_any_number_of_times(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], again: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    bucket, arriving = folder / "bucket", folder / "arriving"
    with Log(folder / "lyon", namespace="shop") as lyon:
        run = lyon.record(ASK, "Yes.", user_id="ada")
        lyon.flush()
        ship(lyon.home, str(bucket))
        for number in range(5):
            lyon.feedback(run, key="k", score=number, user_id="ada")
            ship(lyon.home, str(bucket))
    with Log(folder / "paris") as paris:
        shutil.copy(folder / "lyon" / "user.keys", paris.home.user_keys)
    arriving.mkdir()
    there = sorted(bucket.iterdir())
    for number in [*order, *again]:
        shutil.copy(there[number], arriving)
        gathered(paris.home, str(arriving))
        if number in again:
            (paris.home.path / _memory(paris.home)).unlink()  # so that it reads all again
    gathered(paris.home, str(arriving))
    assert content(paris.home) == content(lyon.home)


def _memory(home: Home) -> str:
    (path,) = home.path.glob("segments-*.db")
    return path.name


def test_what_judges_a_run_that_is_not_there_yet_waits_for_it(make: Make, bucket: str) -> None:
    lyon, paris = make("lyon"), make("paris")
    run = lyon.record(ASK, "Yes.")
    lyon.flush()
    ship(lyon.home, bucket)
    lyon.thumbs(run, up=True)
    (late,) = ship(lyon.home, bucket).segments
    (first,) = {*names(bucket)} - {late}
    hidden = Path(bucket, first).rename(Path(bucket).parent / first)
    assert gathered(paris.home, bucket).waiting == [late]
    hidden.rename(Path(bucket, first))
    assert gathered(paris.home, bucket).waiting == []
    assert content(paris.home) == content(lyon.home)


_KILL = """
import os, sys
from agentpref.record.transfer import merge, places, ship, shipped

left = int(sys.argv[3])
def dying(call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return call(*args, **kwargs)
    return wrapped

for owner, name in [(places.Place, "write"), (places.Place, "read"), (places.Place, "remove"),
                    (shipped.Shipped, "plan"), (shipped.Shipped, "done"), (shipped.Shipped, "see"),
                    (shipped.Shipped, "keep")]:
    setattr(owner, name, dying(getattr(owner, name)))
ship.BATCH = 3
if sys.argv[4] == "ship":
    ship.ship(sys.argv[1], sys.argv[2])
else:
    merge.merge(sys.argv[1], [sys.argv[2]])
"""


def test_a_shipment_that_failed_is_completed_together_with_what_came_since(
    make: Make, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1)

    def full(*args: Any) -> None:
        raise NotKept("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Place, "write", full)
        with pytest.raises(NotKept):
            ship(lyon.home, bucket)
    say(lyon, 2)
    assert ship(lyon.home, bucket).runs == 4
    gathered(paris.home, bucket)
    assert content(paris.home) == content(lyon.home)


@pytest.mark.guarantee("record")
def test_shipping_and_merging_segments_lose_and_double_nothing_when_killed(
    make: Make, bucket: str
) -> None:
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1, "bob")
    say(lyon, 2, "ada")

    def killed(home: Home, what: str, step: int) -> bool:
        command = [sys.executable, "-c", _KILL, home.path, bucket, str(step), what]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode in (0, -9), done.stderr
        return done.returncode == -9

    for step in (2, 3, 4):
        killed(lyon.home, "ship", step)
    ship(lyon.home, bucket)
    ids = [f"{row['type']} {row['id']}" for row in lines(bucket) if "id" in row]
    assert len(ids) == len({*ids})
    for step in (2, 4):
        killed(paris.home, "merge", step)
    gathered(paris.home, bucket)
    assert content(paris.home) == content(lyon.home)
    lyon.forget("ada")
    for step in (2, 4, 6):
        killed(lyon.home, "ship", step)
    ship(lyon.home, bucket)
    gathered(paris.home, bucket)
    assert content(paris.home) == content(lyon.home)
    assert "answer 2" not in str(lines(bucket))


def test_two_shippers_of_one_home_write_each_row_once(make: Make, bucket: str) -> None:
    lyon = make("lyon")
    for number in range(4):
        say(lyon, number)
    busy: list[str] = []

    def run() -> None:
        try:
            for _ in range(3):
                ship(lyon.home, bucket)
        except UpdateRunning as error:
            busy.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ship(lyon.home, bucket)
    ids = [f"{row['type']} {row['id']}" for row in lines(bucket) if "id" in row]
    assert len(ids) == len({*ids}) == 4 * 7
    assert all("another shipment" in text for text in busy)


def test_a_restored_home_ships_what_it_logs_after(make: Make, bucket: str, tmp_path: Path) -> None:
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1)
    backup(lyon.home, tmp_path / "copy")
    say(lyon, 2)
    ship(lyon.home, bucket)
    before = content(lyon.home)
    lyon.close()
    shutil.rmtree(lyon.home.path)
    (tmp_path / "copy").rename(lyon.home.path)
    again = make("lyon")
    say(again, 3)
    ship(again.home, bucket)
    gathered(paris.home, bucket)
    held = content(paris.home)
    for table in ("run", "feedback", "comparison"):
        assert {*held[table]} == {*before[table]} | {*content(again.home)[table]}


# Forgetting


def test_whoever_is_forgotten_at_the_source_is_forgotten_where_it_was_merged(
    make: Make, bucket: str
) -> None:
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1, "ada")
    say(lyon, 2, "bob")
    ship(lyon.home, bucket)
    gathered(paris.home, bucket)
    lyon.forget("ada")
    shipment = ship(lyon.home, bucket)
    assert len(shipment.replaced) == 1
    assert "answer 1" not in str(lines(bucket))
    assert "answer 2" in str(lines(bucket))
    assert gathered(paris.home, bucket).tombstones == 1
    assert content(paris.home) == content(lyon.home)


def test_whoever_is_forgotten_where_it_was_merged_goes_from_the_segments(
    make: Make, bucket: str
) -> None:
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1, "ada")
    say(lyon, 2, "bob")
    ship(lyon.home, bucket)
    gathered(paris.home, bucket)
    forget(paris.home, "ada")
    assert len(gathered(paris.home, bucket).replaced) == 1
    assert "answer 1" not in str(lines(bucket))
    say(lyon, 3, "ada")  # who has come back
    ship(lyon.home, bucket)
    gathered(paris.home, bucket)
    said = [row["output"]["content"] for row in lines(bucket) if row["type"] == "run"]
    assert {"answer 2", "answer 3"} <= {*said}
    outputs = str(content(paris.home)["message"])
    assert "answer 3" in outputs
    assert "answer 1" not in outputs


def test_what_arrives_late_of_a_forgotten_user_stays_out_and_goes(make: Make, bucket: str) -> None:
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1, "ada")
    forget(paris.home, "ada")
    ship(lyon.home, bucket)
    merged = gathered(paris.home, bucket)
    assert merged.runs.forgotten == 1
    assert merged.replaced
    assert "answer 1" not in str(lines(bucket))


def test_a_run_that_was_forgotten_alone_goes_from_the_segments(make: Make, bucket: str) -> None:
    lyon = make("lyon")
    say(lyon, 1)
    ship(lyon.home, bucket)
    (run,) = [
        row["id"] for row in lines(bucket) if row.get("output", {}).get("content") == "answer 1"
    ]
    forget_run(lyon.home, run)
    ship(lyon.home, bucket)
    assert run not in str(lines(bucket))


def test_what_is_forgotten_between_plan_and_shipment_is_never_written(
    make: Make, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lyon = make("lyon")
    say(lyon, 1, "ada")
    write = Place.write

    def full(*args: Any) -> None:
        raise NotKept("the disk is full")

    monkeypatch.setattr(Place, "write", full)
    with pytest.raises(NotKept):
        ship(lyon.home, bucket)
    lyon.forget("ada")
    monkeypatch.setattr(Place, "write", write)
    ship(lyon.home, bucket)
    assert "answer 1" not in str(lines(bucket))


def test_a_run_that_is_forgotten_while_it_is_read_is_not_left_in_the_place(
    make: Make, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lyon = make("lyon")
    say(lyon, 1, "ada")
    say(lyon, 2, "bob")
    nodes, meanwhile = module._nodes, []

    def forgotten(*args: Any) -> Any:  # the row is read, and its messages are not yet
        if not meanwhile:
            meanwhile.append(threading.Thread(target=forget, args=(lyon.home, "ada")))
            meanwhile[0].start()
            meanwhile[0].join(2)
        return nodes(*args)

    monkeypatch.setattr(module, "_nodes", forgotten)
    write = Place.write

    def after(*args: Any) -> None:
        meanwhile[0].join()
        write(*args)

    monkeypatch.setattr(Place, "write", after)
    ship(lyon.home, bucket)
    assert "answer 1" not in str(lines(bucket))
    assert "answer 2" in str(lines(bucket))


def test_the_memory_of_a_place_holds_no_text(make: Make, bucket: str) -> None:
    lyon = make("lyon")
    say(lyon, 1)
    ship(lyon.home, bucket)
    memory = lyon.home.path / _memory(lyon.home)
    assert b"answer" not in memory.read_bytes()
    assert memory.stat().st_mode & 0o777 == 0o600


# Bad segments


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _swap(path: Path) -> None:
    path.write_bytes(gzip.compress(b'{"type":"segment","version":1,"keys":[]}\n'))


def _bomb(path: Path) -> None:
    path.write_bytes(gzip.compress(bytes(20_000_000)))


@pytest.mark.parametrize("harm", [_damage, _cut, _swap, _bomb])
def test_a_damaged_segment_is_refused_by_name_and_the_others_are_merged(
    make: Make, bucket: str, harm: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentpref.record.transfer.segments.MAX_BYTES", 10_000_000)
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1)
    (bad,) = ship(lyon.home, bucket).segments
    whole = Path(bucket, bad).read_bytes()
    say(lyon, 2)
    ship(lyon.home, bucket)
    harm(Path(bucket, bad))
    merged = gathered(paris.home, bucket)
    assert [*merged.refused] == [bad]
    assert merged.runs.added == 2
    Path(bucket, bad).write_bytes(whole)
    assert gathered(paris.home, bucket).refused == {}
    assert content(paris.home) == content(lyon.home)


RUN = {
    "type": "run", "id": "r", "namespace": "shop", "created_at": 1.0,
    "messages": [{"role": "user", "content": "hi"}],
    "output": {"role": "assistant", "content": "x"},
}  # fmt: skip


def forge(bucket: str, *rows: Any) -> str:
    """Write a segment that is whole, of any rows."""
    head = {"type": "segment", "version": 1, "keys": []}
    body = b"".join(orjson.dumps(each) + b"\n" for each in (head, *rows))
    name = f"rows-20260101T000000-{hashlib.sha256(body).hexdigest()[:32]}.jsonl.gz"
    Path(bucket).mkdir(exist_ok=True)
    Path(bucket, name).write_bytes(gzip.compress(body))
    return name


@pytest.mark.parametrize(
    "row",
    [
        None, 3, [], {}, "x", {"type": "segment"}, {"type": "forgotten", "user_id": "u", "at": 1.0},
        {**RUN, "namespace": None}, {**RUN, "namespace": "a\nb"}, {**RUN, "id": None},
        {**RUN, "messages": [{"role": "root", "content": ""}]}, {**RUN, "tags": 1},
        {**RUN, "created_at": None}, {"type": "feedback", "id": "f", "created_at": 1.0},
        {"type": "feedback", "id": "f", "created_at": 1.0, "run_id": "r", "key": "k", "score": "1"},
    ],
)  # fmt: skip
def test_a_segment_with_a_row_that_no_home_ships_is_refused_as_a_whole(
    make: Make, bucket: str, row: Any
) -> None:
    paris = make("paris")
    name = forge(bucket, RUN, row)
    merged = gathered(paris.home, bucket)
    assert "line 3" in merged.refused[name]
    assert content(paris.home)["run"] == []


@pytest.mark.parametrize("row", [None, {}, {"type": "run", "id": "r"}, {**RUN, "created_at": "1"}])
def test_a_segment_that_cannot_be_searched_for_the_forgotten_is_named_and_searched_again(
    make: Make, bucket: str, monkeypatch: pytest.MonkeyPatch, row: Any
) -> None:
    lyon = make("lyon")
    say(lyon, 1, "ada")
    say(lyon, 2, "bob")
    (sound,) = ship(lyon.home, bucket).segments
    lyon.forget("ada")
    bad = forge(bucket, row)
    done = ship(lyon.home, bucket)
    assert [*done.unreadable] == [bad]
    assert done.replaced == [sound]
    read, asked = Place.read, []

    def note(place: Place, name: str) -> bytes | None:
        asked.append(name)
        return read(place, name)

    monkeypatch.setattr(Place, "read", note)
    assert [*ship(lyon.home, bucket).unreadable] == [bad]
    assert asked == [bad]  # the others were searched
    assert bad in gathered(make("paris").home, bucket).refused
    Path(bucket, bad).unlink()
    assert ship(lyon.home, bucket).unreadable == {}


def test_what_hides_in_a_segment_that_was_unreadable_goes_when_it_is_whole_again(
    make: Make, bucket: str
) -> None:
    lyon = make("lyon")
    say(lyon, 1, "ada")
    (name,) = ship(lyon.home, bucket).segments
    whole = Path(bucket, name).read_bytes()
    _damage(Path(bucket, name))
    lyon.forget("ada")
    assert [*ship(lyon.home, bucket).unreadable] == [name]
    Path(bucket, name).write_bytes(whole)
    assert ship(lyon.home, bucket).replaced == [name]
    assert "answer 1" not in str(lines(bucket))


def test_a_merge_names_what_it_could_not_search_for_the_forgotten(make: Make, bucket: str) -> None:
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1, "ada")
    (name,) = ship(lyon.home, bucket).segments
    gathered(paris.home, bucket)
    _damage(Path(bucket, name))
    paris.forget("ada")
    assert "not searched" in gathered(paris.home, bucket).refused[name]


def test_a_segment_that_is_too_large_stops_neither_merging_nor_shipping(
    make: Make, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentpref.record.transfer.places.MAX_BYTES", 100_000)
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1, "ada")
    ship(lyon.home, bucket)
    bad = forge(bucket, RUN)
    Path(bucket, bad).write_bytes(os.urandom(200_000))
    merged = gathered(paris.home, bucket)
    assert "200,000 bytes" in merged.refused[bad]
    assert merged.runs.added == 2
    lyon.forget("ada")
    assert [*ship(lyon.home, bucket).unreadable] == [bad]


def test_a_conflict_is_named_and_the_row_that_was_here_first_stays(make: Make, bucket: str) -> None:
    lyon, paris = make("lyon"), make("paris")
    paris.record(ASK, "mine", run_id="same")
    lyon.record(ASK, "yours", run_id="same")
    paris.flush()
    lyon.flush()
    ship(lyon.home, bucket)
    before = content(paris.home)["run"]
    merged = gathered(paris.home, bucket)
    assert merged.conflicts == [{"table": "run", "key": "same"}]
    assert content(paris.home)["run"] == before


def test_users_under_another_key_are_refused_until_the_key_is_known(
    make: Make, bucket: str, tmp_path: Path
) -> None:
    paris = make("paris")
    with Log(tmp_path / "nice", namespace="shop") as nice:
        say(nice, 1)
        ship(nice.home, bucket)
    (why,) = gathered(paris.home, bucket).refused.values()
    assert "another key" in why
    merge(paris.home, [nice.home])
    assert gathered(paris.home, bucket).refused == {}


def test_other_files_in_the_folder_do_not_matter(make: Make, bucket: str) -> None:
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1)
    ship(lyon.home, bucket)
    Path(bucket, "README").write_text("hello")
    Path(bucket, "rows-x.jsonl.gz").write_text("hello")
    Path(bucket, "rows-20260101T000000-..%2f.jsonl.gz").write_text("hello")
    assert gathered(paris.home, bucket).refused == {}


# Places


def test_an_address_that_is_none_is_refused(make: Make) -> None:
    lyon = make("lyon")
    with pytest.raises(ConfigError, match="fsspec knows"):
        ship(lyon.home, "nowhere://bucket")


def test_a_missing_package_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lyon = make("lyon")
    with pytest.raises(MissingDependency, match="pip install gcsfs"):
        ship(lyon.home, "gs://bucket/prefix")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingDependency, match=r"agentpref\[ship\]"):
        ship(lyon.home, "s3://bucket/prefix")


def test_a_place_that_cannot_be_written_is_named(make: Make, tmp_path: Path) -> None:
    lyon = make("lyon")
    say(lyon, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotKept, match="cannot be used"):
        ship(lyon.home, str(tmp_path / "file" / "bucket"))
    ship(lyon.home, str(tmp_path / "bucket"))


def test_the_same_rows_make_the_same_segment() -> None:
    rows = [{"type": "run", "id": str(n), "created_at": float(n)} for n in range(3)]
    assert [*packed(ROWS, ["k"], rows)] == [*packed(ROWS, ["k"], rows)]
    ((name, _),) = packed(ROWS, ["k"], rows)
    assert name.startswith("rows-19700101T000002-")


def test_large_rows_make_several_segments(
    make: Make, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentpref.record.transfer.segments.FULL_BYTES", 1_000)
    lyon, paris = make("lyon"), make("paris")
    say(lyon, 1)
    assert len(ship(lyon.home, bucket).segments) > 1
    gathered(paris.home, bucket)
    assert content(paris.home) == content(lyon.home)
    assert module.BATCH > 1


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{os.urandom(4).hex()}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    yield f"s3://{bucket}/preferences"
    server.stop()


def test_a_bucket_of_s3_carries_homes_like_a_folder(make: Make, s3: str) -> None:
    lyon, nice, paris = make("lyon"), make("nice"), make("paris")
    for number, log in enumerate((lyon, nice, lyon)):
        say(log, number, f"user {number}")
        ship(log.home, s3)
    assert gathered(paris.home, s3).runs.added == 6
    lyon.forget("user 0")
    assert len(ship(lyon.home, s3).replaced) == 1
    gathered(paris.home, s3)
    held, parts = content(paris.home), (content(lyon.home), content(nice.home))
    for table in ("run", "feedback", "comparison", "message"):
        assert {*held[table]} == {*parts[0][table]} | {*parts[1][table]}


def test_a_bucket_that_is_not_there_is_named(make: Make, s3: str) -> None:
    lyon = make("lyon")
    say(lyon, 1)
    with pytest.raises(NotKept, match="s3://nobucket"):
        ship(lyon.home, "s3://nobucket/x")
