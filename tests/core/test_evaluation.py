"""`agentpref.evaluate`: real revisions of a small random model, scored on its home and on files."""

from __future__ import annotations

import shutil
import threading
from contextlib import closing
from datetime import timedelta

import orjson
import pytest

import agentpref
from agentpref.errors import (
    ConfigError,
    EvaluationError,
    ExchangeError,
    InvalidAdapter,
    NotAHome,
    RevisionError,
    UnknownNamespace,
    UnknownRevision,
    WrongBase,
)
from agentpref.home import Home
from agentpref.models import base as bases
from agentpref.prefer.trained import trained_points
from agentpref.record.database import connect
from agentpref.serve.registry import Registry
from tests.core.test_pipeline import NO, YES, learn, teach, teach_about_friends

TABLES = (
    "run",
    "feedback",
    "comparison",
    "updates",
    "update_pair",
    "revision",
    "serving",
    "example",
)


@pytest.fixture(scope="module")
def two_nights(tmp_path_factory, random_base):
    """A home with two revisions, the second live: numbers, then friends."""
    home = tmp_path_factory.mktemp("two_nights") / "home"
    teach(home, range(40))
    first = learn(home, random_base)
    teach_about_friends(home)
    second = learn(home, random_base)
    assert (first.verdict, second.verdict) == ("promoted", "promoted")
    return home, first, second


@pytest.fixture
def home(two_nights, tmp_path):
    return shutil.copytree(two_nights[0], tmp_path / "home")


@pytest.fixture
def revisions(two_nights):
    return [report.revision for report in two_nights[1:]]


def rows_of(file, questions, chosen=YES, rejected=NO):
    rows = [{"prompt": q, "chosen": chosen, "rejected": rejected, "tag": "file"} for q in questions]
    file.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return file


def held(home):
    """How many rows every table has, and what serves."""
    with closing(connect(Home.open(home), readonly=True)) as connection:
        counts = [connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in TABLES]
    return counts, Registry(home).state(), sorted(p.name for p in home.iterdir())


def accuracies(found):
    return {name: one.accuracy for name, one in found.groups[0].accuracy.items()}


def test_what_serves_is_compared_with_the_base_on_what_was_held_out(home, two_nights) -> None:
    before = held(home)
    found = agentpref.evaluate(home)
    last = two_nights[2]
    pairs = sum(tag["pairs"] for tag in last.accuracy.values())
    after = sum(tag["pairs"] * tag["after"] for tag in last.accuracy.values()) / pairs
    assert [one.revision for one in found.revisions] == ["base", last.revision]
    assert [one.serves for one in found.revisions] == [None, "live"]
    assert accuracies(found) == {"base": 0.5, last.revision: pytest.approx(after)}
    (change,) = found.groups[0].differences
    assert (change.against, change.revision, change.finding) == ("base", last.revision, "better")
    distance = next(check for check in last.checks if check["name"] == "KL budget")
    assert found.revisions[1].kl == pytest.approx(distance["value"], rel=0.3)
    assert found.revisions[0].kl == 0
    assert held(home) == before, "it looks, and changes nothing"


def test_revisions_are_scored_beside_one_another_as_they_are_alone(home, revisions, monkeypatch):
    loads, load = [], bases.load_base
    monkeypatch.setattr(bases, "load_base", lambda *a, **k: loads.append(a) or load(*a, **k))
    with closing(connect(Home.open(home))) as connection:
        connection.execute("DELETE FROM logp")
    together = agentpref.evaluate(home, [*revisions, "base"], on="untagged/comparison")
    assert len(loads) == 1, "the base is loaded once"
    with closing(connect(Home.open(home))) as connection:
        connection.execute("DELETE FROM logp")
    for number, name in enumerate(revisions):
        (alone,) = agentpref.evaluate(home, [name]).groups[0].accuracy.items()
        assert alone == (name, together.groups[0].accuracy[name])
        assert agentpref.evaluate(home, [name]).revisions[0].kl == together.revisions[number].kl
    pairs = [(one.revision, one.against) for one in together.groups[0].differences]
    first, second = revisions
    assert pairs == [(second, first), ("base", first), ("base", second)]


def test_an_older_revision_is_worse_at_what_came_after_it(home, revisions, tmp_path) -> None:
    file = rows_of(
        tmp_path / "f", [f"Who is {n}?" for n in range(100, 140)], "a friend", "an enemy"
    )
    found = agentpref.evaluate(home, revisions, on=file)
    assert accuracies(found)[revisions[0]] < accuracies(found)[revisions[1]] > 0.9
    assert found.groups[0].differences[0].finding == "better"
    assert found.on == f"the file {file}"
    assert "file" not in agentpref.evaluate(home).groups[0].name


def test_scores_are_computed_once(home) -> None:
    stages: list[str] = []
    for _ in range(2):
        stages.clear()
        found = agentpref.evaluate(
            home, ["1", "2"], progress=lambda stage, *_: stages.append(stage)
        )
    assert not [stage for stage in stages if stage.startswith("score ")]
    assert {stage for stage in stages if stage.startswith("KL of ")} == {
        f"KL of {one.revision}" for one in found.revisions
    }


def test_a_file_leaves_nothing_in_the_home(home, tmp_path) -> None:
    file = rows_of(tmp_path / "rows.jsonl", [f"Is {n} a number?" for n in range(100, 110)])
    before = held(home)
    with closing(connect(Home.open(home))) as connection:
        scores = connection.execute("SELECT count(*) FROM logp").fetchone()
        agentpref.evaluate(home, on=file)
        assert connection.execute("SELECT count(*) FROM logp").fetchone() == scores
    assert held(home) == before


def test_prompts_of_a_file_that_trained_are_left_out_and_can_be_scored_apart(
    home, revisions, tmp_path
) -> None:
    """Also in other words: another answer to the question, and a system message before it."""
    with closing(connect(Home.open(home), readonly=True)) as connection:
        first, second = (len(trained_points(connection, "default", one)) for one in revisions)
    assert 0 < first < second
    questions = [f"Is {n} a number?" for n in range(60)]
    file = rows_of(tmp_path / "rows.jsonl", questions, chosen="yes, it is")
    text = file.read_text().replace(
        '"prompt":"Is 0 a number?"',
        '"prompt":[{"role":"system","content":"Hi."},{"role":"user","content":"Is 0 a number?"}]',
    )
    file.write_text(text)
    found = agentpref.evaluate(home, revisions, on=file)
    assert found.left_out == {"trained": first}
    assert [one.trained_on for one in found.revisions] == [first, first]
    assert found.groups[0].examples == 60 - first
    both = agentpref.evaluate(home, revisions, on=file, with_trained=True)
    assert both.left_out == {}
    assert [(group.trained, group.examples) for group in both.groups] == [
        (False, 60 - first),
        (True, first),
    ]
    only = rows_of(tmp_path / "only.jsonl", ["Is 0 a number?"])
    with closing(connect(Home.open(home), readonly=True)) as connection:
        trained = trained_points(connection, "default", revisions[0])
    from agentpref.prefer.examples import split_point

    number = next(n for n in range(40) if split_point(asked(n)) in trained)
    rows_of(only, [f"Is {number} a number?"])
    with pytest.raises(EvaluationError, match="--with-trained"):
        agentpref.evaluate(home, on=only)


def asked(number):
    return [{"role": "user", "content": f"Is {number} a number?"}]


def test_a_question_that_was_judged_anew_since_it_trained_is_still_known(home, revisions) -> None:
    from agentpref.prefer.catalog import Catalog

    with closing(connect(Home.open(home))) as connection:
        before = trained_points(connection, "default", revisions[0])
    teach(home, range(40), chosen=NO, rejected=YES)
    with closing(connect(Home.open(home))) as connection:
        Catalog(connection, "default", held_out=0.4).refresh()
        assert trained_points(connection, "default", revisions[0]) == before


def test_a_tag_a_stratum_and_a_time_choose_examples(
    home, two_nights, tmp_path, monkeypatch
) -> None:
    everything = agentpref.evaluate(home).groups[0].examples
    age = agentpref.evaluate(home, on="default/untagged/comparison/old").groups[0].examples
    assert 0 < age < everything
    assert agentpref.evaluate(home, on="untagged").groups[0].examples == everything
    assert agentpref.evaluate(home, limit=5).groups[0].examples == 5
    assert "5 of" in agentpref.evaluate(home, limit=5).notes[0]
    day = timedelta(days=1)
    assert agentpref.evaluate(home, since=day).groups[0].examples == everything
    with pytest.raises(EvaluationError, match="one prompt in five is held out"):
        agentpref.evaluate(home, since="2100-01-01")
    with pytest.raises(EvaluationError, match="by tag: 'untagged' "):
        agentpref.evaluate(home, on="untaged")
    monkeypatch.chdir(tmp_path)
    rows_of(tmp_path / "untagged", [f"Is {n} a number?" for n in range(100, 103)])
    both = agentpref.evaluate(home, on="untagged")
    assert both.groups[0].examples == everything
    assert "./untagged" in both.notes[0]
    assert agentpref.evaluate(home, on="./untagged").groups[0].examples == 3
    with pytest.raises(ConfigError, match="leave it out"):
        agentpref.evaluate(home, on="./untagged", since=day)


def test_names_of_revisions(home, revisions) -> None:
    first, second = revisions

    def names(*given):
        return [one.revision for one in agentpref.evaluate(home, given, limit=2).revisions]

    assert names("1", "live", second, second[:12]) == [first, second]
    for name, words in [
        ("3", "no revision '3'; `agentpref adapters list`"),
        ("rev-00000", "2 revisions begin with"),
        ("", "no revision ''"),
        ("canary", "has no canary"),
    ]:
        with pytest.raises(UnknownRevision, match=words):
            names(name)
    with pytest.raises(EvaluationError, match="about half by definition"):
        names("base")
    with pytest.raises(ConfigError, match="pass a list"):
        agentpref.evaluate(home, "live")


def test_a_canary_is_scored_by_default_and_base_alone_is_nothing_to_ask(home, revisions) -> None:
    registry = Registry(home)
    registry.canary(revisions[0], 0.1)
    found = agentpref.evaluate(home, limit=2)
    assert [one.serves for one in found.revisions] == [None, "live", "canary"]
    registry.promote("base")
    with pytest.raises(EvaluationError, match=revisions[1]):
        agentpref.evaluate(home)
    assert agentpref.evaluate(home, ["live", "2"], limit=2).revisions[0].serves == "live"


def test_a_home_or_a_namespace_that_is_not_there_and_an_empty_home(home, tmp_path) -> None:
    with pytest.raises(NotAHome):
        agentpref.evaluate(tmp_path / "nothing")
    with pytest.raises(UnknownNamespace):
        agentpref.evaluate(home, namespace="shop")
    agentpref.Log(tmp_path / "empty").close()
    with pytest.raises(EvaluationError, match="run `agentpref update` first"):
        agentpref.evaluate(tmp_path / "empty")


def test_another_base_and_broken_or_pruned_revisions_are_refused(
    home, revisions, narrow_base
) -> None:
    with pytest.raises(WrongBase, match="--model"):
        agentpref.evaluate(home, model=str(narrow_base))
    weights = home / "adapters" / revisions[0] / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(InvalidAdapter):
        agentpref.evaluate(home, ["1"])
    with closing(connect(Home.open(home))) as connection:
        connection.execute("UPDATE revision SET pruned_at = 1 WHERE revision_id = ?", revisions[:1])
    with pytest.raises(RevisionError, match="was pruned"):
        agentpref.evaluate(home, ["1"])


def test_lone_thumbs_of_a_file_count_evenly(home, tmp_path) -> None:
    rows = [
        {"prompt": f"Is {n} a number?", "completion": YES if n % 2 else NO, "label": bool(n % 2)}
        for n in range(100, 120)
    ]
    rows += [
        {"prompt": f"Is {n} a number?", "completion": f"yes {n}", "label": True}
        for n in range(200, 205)
    ]
    file = tmp_path / "thumbs.jsonl"
    file.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    found = agentpref.evaluate(home, on=file)
    assert (found.groups[0].examples, found.groups[0].thumbs) == (20, 20)
    assert "20 of 25 lone thumbs count" in found.notes[0]
    assert found.groups[0].differences[0].finding == "better"
    file.write_bytes(b"\n".join(orjson.dumps(row) for row in rows if row["label"]))
    with pytest.raises(EvaluationError, match="thumbs of one kind only"):
        agentpref.evaluate(home, on=file)


def test_a_file_that_is_none_of_preferences(home, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "hello"}\n')
    with pytest.raises(ExchangeError, match="line 1"):
        agentpref.evaluate(home, on=file)
    with pytest.raises(ExchangeError, match="cannot be read"):
        agentpref.evaluate(home, on=tmp_path / "nowhere.jsonl")


def test_it_runs_beside_an_update_that_has_locked_the_home(home) -> None:
    from agentpref.record.database import exclusive

    with exclusive(Home.open(home)):
        assert agentpref.evaluate(home, limit=2).groups


def test_an_evaluation_in_a_thread_ends_as_plain_values(home) -> None:
    found = []
    worker = threading.Thread(target=lambda: found.append(agentpref.evaluate(home, limit=4)))
    worker.start()
    worker.join(timeout=120)
    value = orjson.loads(orjson.dumps(found[0].to_mapping()))
    assert value["groups"][0]["accuracy"]["base"]["accuracy"] == 0.5
    assert [*value] == [
        "namespace", "on", "model", "confidence", "revisions", "groups", "left_out", "notes",
        "since",
    ]  # fmt: skip


def test_a_home_that_can_only_be_read_is_evaluated_and_keeps_no_scores(home, monkeypatch) -> None:
    from agentpref import evaluation
    from agentpref.errors import NotKept

    def only_read(place, *, readonly=False):
        if not readonly:
            raise NotKept("read-only")
        return connect(place, readonly=True)

    with closing(connect(Home.open(home))) as connection:
        connection.execute("DELETE FROM logp")
    expected = agentpref.evaluate(home, limit=6)
    with closing(connect(Home.open(home))) as connection:
        connection.execute("DELETE FROM logp")
        monkeypatch.setattr(evaluation, "connect", only_read)
        assert agentpref.evaluate(home, limit=6) == expected
        assert connection.execute("SELECT count(*) FROM logp").fetchone() == (0,)
