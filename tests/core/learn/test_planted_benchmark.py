"""Planted nights end to end on next to nothing, and how their verdicts are counted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from benchmarks.planted import __main__ as command
from benchmarks.planted import cases
from benchmarks.planted.cases import BAD, GOOD
from benchmarks.streams import measure, subjects
from benchmarks.streams.catalogue import Sizes
from benchmarks.streams.rows import Rows
from benchmarks.streams.rules import text_of

pytestmark = pytest.mark.slow


@pytest.fixture
def run(random_base, tmp_path, monkeypatch, capsys):
    subject = subjects.subject_of("tiny")
    small = replace(subject, max_tokens=6, probes=subject.probes[:2], general=subject.general[:2])
    monkeypatch.setattr(measure, "subject_of", lambda model: small)
    monkeypatch.setattr(cases, "SIZES", Sizes(6, 3, 3))
    monkeypatch.setattr(command, "MODEL", str(random_base))
    monkeypatch.setattr(command, "REQUESTS", 2)
    monkeypatch.setattr(command.os, "nice", lambda more: None)

    def call(*arguments):
        fixed = ["--work", str(tmp_path / "work"), "--rows", str(tmp_path / "rows.jsonl")]
        monkeypatch.setattr(sys, "argv", ["planted", "--each", "1", *fixed, *arguments])
        command.main()
        said = capsys.readouterr().out.splitlines()
        return json.loads(said[-1]), said[:-1], list(Rows(tmp_path / "rows.jsonl"))

    return call


def test_a_night_that_is_kept_out_is_followed_by_a_good_one_and_none_is_run_again(run, monkeypatch):
    last, table, rows = run("--kinds", "empty,shorter")
    roles = [(row["kind"], row["role"]) for row in rows]
    assert roles[0] == ("empty", "planted")
    assert roles[-1] == ("shorter", "planted")
    kept_out = rows[0]["verdict"] not in command.SERVES
    assert (("empty", "next") in roles) is kept_out
    assert {row["bad"] for row in rows if row["role"] == "planted"} == {True, False}
    assert any(line.startswith("| bad: empty | 1 |") for line in table)
    assert len(last["targets"]) == 2 + kept_out

    monkeypatch.setattr(command.agentpref, "update", lambda *_, **__: pytest.fail("again"))
    assert run("--kinds", "empty,shorter")[2] == rows


def test_every_kind_of_night_has_its_judgements_and_the_measured_ones_are_apart():
    for name, kind in {**BAD, **GOOD}.items():
        for seed in (0, 1):
            night = kind.night(seed)
            assert len(night.logged) == cases.SIZES.new + cases.SIZES.proving, name
            assert all(text_of(i.chosen) != text_of(i.rejected) for i in night.logged), name
            logged = {json.dumps(item.messages) for item in night.logged}
            assert logged.isdisjoint(json.dumps(item.messages) for item in night.measured), name


def test_bad_judgements_are_what_they_are_named_after():
    texts = {name: [text_of(i.chosen) for i in BAD[name].night(0).logged] for name in BAD}
    assert {text.strip() for text in texts["empty"]} == {""}
    assert set(texts["constant"]) == {"Yes"}
    assert len(set(texts["canned"])) == 1
    assert all(len(set(text.split())) * 11 < len(text.split()) for text in texts["repetition"])
    assert all(i.rejected["content"].startswith(i.chosen["content"])
               for i in BAD["truncated"].night(0).logged)  # fmt: skip
    flipped = sum(item.flipped for item in BAD["shuffled"].night(0).logged)
    assert 70 <= flipped <= 130


@pytest.mark.parametrize(
    ("kind", "change", "harmless"),
    [
        ("inverted", {"ranking": [0.6, 0.9]}, False),
        ("inverted", {}, True),
        ("over-budget", {"kl": 9.0}, False),
        ("over-budget", {}, True),
        ("not-written", {}, False),
        ("not-written", {"behaviour": [0.9, 0.9]}, True),
        ("damage", {"capability": 0.5}, False),
        ("damage", {}, True),
        ("shuffled", {}, False),
    ],
)
def test_a_promoted_night_is_harmless_where_its_harm_is_not_in_what_serves(kind, change, harmless):
    before = {"ranking": [0.9, 0.5], "behaviour": [0.9, 0.5], "kl": 0.0, "capability": 1.0}
    row = {"kind": kind, "verdict": "promoted", "before": before, "after": before | change}
    assert command.is_harmless(row) is harmless
    assert not command.is_harmless({"kind": kind, "verdict": "refused"})


def test_the_faults_of_training_do_what_they_say(random_base):
    from agentpref.config import UpdateConfig
    from agentpref.learn.learner import Learner
    from agentpref.models.base import load_base

    learner = Learner(load_base(str(random_base)), None, UpdateConfig())
    old = learner.encode(cases.learned(0).pairs()[:3])
    new = learner.encode(BAD["not-written"].night(0).pairs()[:3])
    turned = cases._inverted(learner, [*new, *old])
    assert turned[:3] == new
    assert [row.own for row in turned[3:6]] == [row.own[::-1] for row in old]
    late = cases._not_written(learner, [*old, *new])
    assert late[:3] == old
    assert all(not any(mask[:3]) and mask[-1] for row in late[3:] for mask in row.masks)
    extra = cases._damaging(learner, new)[3:]
    assert len(extra) > 100
    assert {text_of(row.example.completions[0].message) for row in extra} == {"Yes"}
