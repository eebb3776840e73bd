"""What an update's report says became of every example, and what is tried again, and when."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import agentpref
from agentpref.errors import ConfigError, WrongBase
from agentpref.home import Home
from agentpref.models.reasons import LEFT_OUT
from agentpref.record.database import connect
from agentpref.serve.registry import Registry
from tests.core.test_pipeline import CONFIG, NO, YES, learn, no_training, teach

USED = (
    "trained", "replayed", "new_evaluated", "old_evaluated", "not_drawn", "waiting",
    "set_aside", "aged_out", "still_aged_out",
)  # fmt: skip
THERE = ("new", "old", "new_held_out", "old_held_out")
# Writes the date, an argument, and no system message.
TEMPLATE = """\
{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{{- strftime_now('%d %b %Y') }}{% if polite %} Please.{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def base(random_base: Path, tmp_path: Path) -> Path:
    """The random base with a template of its own."""
    folder = shutil.copytree(random_base, tmp_path / "base")
    write(folder, TEMPLATE)
    return folder


def write(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def teach_with_system(home: Path, numbers: Any) -> None:
    with agentpref.Log(home) as log:
        for number in numbers:
            asked = [
                {"role": "system", "content": f"You are number {number}."},
                {"role": "user", "content": f"Is {number} a number?"},
            ]
            log.compare(log.record(asked, YES), log.record(asked, NO), winner="a")


class Later(datetime):
    """A clock that shows a later day."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime(2090, 1, 1, tzinfo=tz)


def scores(home: Path) -> int:
    """How many scores of the base the home keeps."""
    with closing(connect(Home.open(home))) as connection:
        query = "SELECT count(*) FROM logp WHERE policy LIKE '%:base'"
        return int(connection.execute(query).fetchone()[0])


def require_sums(report: Any) -> None:
    """Every example there is was used in one way, or is left out."""
    counts = Counter(report.counts)
    there = sum(counts[k] + counts[f"{k}_thumbs"] for k in THERE)
    used = sum(counts[k] + counts[f"{k}_thumbs"] for k in USED)
    left_out = sum(n for reason, n in report.left_out.items() if reason in LEFT_OUT)
    assert there == used + left_out, (report.counts, report.left_out)


def test_the_counts_of_every_update_add_up(home: Path, base: Path) -> None:
    teach(home, range(40))
    teach_with_system(home, range(100, 110))
    teach(home, range(200, 204), chosen="word " * 600)
    first = learn(home, base)
    assert first.verdict == "promoted"
    require_sums(first)
    teach(home, range(300, 320))
    with agentpref.Log(home) as log:
        for number in range(400, 404):
            asked = [{"role": "user", "content": f"Who is {number}?"}]
            log.thumbs(log.record(asked, f"{number} {YES}"), up=number % 2 == 0)
    second = learn(home, base, replace(CONFIG, replay=replace(CONFIG.replay, minimum=4)))
    require_sums(second)
    assert second.counts["not_drawn"] > 0
    assert second.counts["trained_thumbs"] > 0
    assert sum(second.left_out[reason] for reason in first.left_out) == 14, "and not learned"


def test_examples_that_were_left_out_are_never_learned(home: Path, base: Path) -> None:
    teach(home, range(40))
    teach_with_system(home, range(100, 110))
    first = learn(home, base)
    assert (first.verdict, first.left_out) == ("promoted", {"template_refuses": 10})
    assert any("template_refuses: the chat template raises" in note for note in first.notes)
    again = learn(home, base, progress=no_training)
    assert (again.verdict, again.left_out) == ("nothing_new", {"template_refuses": 10})
    assert (
        f"10 examples remain that update {first.update_id} (promoted) could not" in again.notes[-1]
    )
    assert "could not use (template refuses); the settings" in again.notes[-1]
    assert "tried" not in again.notes[-1]
    longer = learn(home, base, replace(CONFIG, max_length=500))
    assert longer.verdict == "nothing_usable"
    assert longer.left_out["template_refuses"] + longer.counts["waiting"] == 10
    require_sums(longer)


def test_a_mended_template_brings_left_out_examples_back(home: Path, base: Path) -> None:
    teach_with_system(home, range(40))
    report = learn(home, base)
    assert (report.verdict, report.left_out["template_refuses"] > 20) == ("nothing_usable", True)
    require_sums(report)
    assert learn(home, base, progress=no_training).verdict == "nothing_new"
    write(base, TEMPLATE.split("\n", 1)[1])
    mended = learn(home, base)
    assert (mended.verdict, mended.left_out) == ("promoted", {})
    assert mended.counts["trained"] + mended.counts["new_evaluated"] == 40


def test_a_raised_limit_brings_left_out_examples_back(home: Path, base: Path) -> None:
    teach(home, range(40), chosen="yes " * 60)
    narrow = replace(CONFIG, max_length=64)
    assert learn(home, base, narrow).verdict == "nothing_usable"
    assert learn(home, base, narrow, progress=no_training).verdict == "nothing_new"
    assert learn(home, base).counts["trained"] > 0


def test_a_date_in_the_template_rescores_nothing_the_next_day(
    home: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(home, range(40))
    learn(home, base)
    teach(home, range(100, 110))
    monkeypatch.setattr("agentpref.models.template.datetime", Later)
    before = scores(home)
    report = learn(home, base)
    assert report.counts["replayed"] + report.counts["old_evaluated"] > 10
    assert scores(home) - before == before / 40 * 10, "only new rows are scored, whatever the day"


def test_arguments_of_the_template_change_what_is_trained_and_what_it_serves(
    home: Path, base: Path
) -> None:
    teach(home, range(40))
    polite = replace(CONFIG, chat_template_kwargs={"polite": True})
    report = learn(home, base, polite)
    assert report.verdict == "promoted"
    assert report.base["chat_template_kwargs"] == {"polite": True}
    with agentpref.Log(home, namespace="other") as log:
        log.record([{"role": "user", "content": "Hello!"}], "Hi!")
    plain = learn(home, base, namespace="other")
    assert report.base["template_digest"] != plain.base.get("template_digest")
    teach(home, range(100, 110))
    with pytest.raises(WrongBase, match="chat_template_kwargs"):
        learn(home, base)
    live = Registry(home).live()
    assert live is not None
    assert json.loads((live.path / "manifest.json").read_text())["base"] == report.base
    with pytest.raises(ConfigError, match=r"chat_template_kwargs\.politely has no effect"):
        learn(home, base, replace(CONFIG, chat_template_kwargs={"politely": True}))


def test_runs_that_were_asked_with_other_arguments_are_other_prompts(
    home: Path, base: Path
) -> None:
    polite: Any = {"chat_template_kwargs": {"polite": True}}
    ways: list[Any] = [{}, polite, {"extra_body": polite}]
    with agentpref.Log(home) as log:
        for number in range(40):
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            params = ways[number % 3]
            a, b = (log.record(asked, text, params=params) for text in (YES, NO))
            log.compare(a, b, winner="a")
        asked = [{"role": "user", "content": "Is the sea a number?"}]
        log.compare(log.record(asked, YES), log.record(asked, NO, params=polite), winner="a")
    report = learn(home, base)
    assert report.left_out == {"different_prompts": 1}
    assert report.counts["trained"] + report.counts["new_evaluated"] == 40
