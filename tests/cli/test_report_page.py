"""The page and the mail of `report`: whole, harmless whatever people wrote, and for every home."""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import orjson
import pytest

import agentpref
from agentpref.home import Home
from agentpref.printable import escaped
from agentpref.record.database import connect
from agentpref_cli.page import mail
from tests.core.test_overview import STRICT
from tests.core.test_pipeline import NO, YES, learn, teach

HOSTILE = '<script>alert("1")</script> $\\frac{1}{0}$ [x](javascript:alert(1)) \u202e& 😀'
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The elements, the texts and the ids of a page; every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def nights(tmp_path_factory, random_base) -> Path:
    """A home with two promoted revisions, of which the second learned under a hostile tag."""
    home = tmp_path_factory.mktemp("nights") / "home"
    teach(home, range(30))
    assert learn(home, random_base).verdict == "promoted"
    with agentpref.Log(home) as log:
        for number in range(30):
            asked = [{"role": "user", "content": f"{HOSTILE} {number}?"}]
            runs = (log.record(asked, text, tags=[HOSTILE]) for text in ("a friend", "an enemy"))
            log.compare(*runs, winner="a")
    assert learn(home, random_base).verdict == "promoted"
    return home


@pytest.fixture
def served(nights, home) -> Path:
    return shutil.copytree(nights, home)


@pytest.fixture
def page(run, tmp_path):
    """Call ``page(*arguments)`` to write a page and read it."""

    def call(*arguments: object) -> Page:
        file = tmp_path / "report.html"
        assert run("report", *arguments, "--html", file).out == f"wrote {file}\n"
        assert file.stat().st_mode & 0o077 == 0, "it has people's words"
        return Page(file.read_text(encoding="utf-8"))

    return call


def test_a_page_tells_why_from_what_how_well_and_what_next(served, page) -> None:
    found = page()
    for words in (
        "promoted: held-out accuracy", "now serving", "Why: promoted", "checks passed.",
        "Better or not, by tag", "What it learned from", "who judged", "All revisions",
        "What to label next", "Where it comes from", "KL budget",
        "What it writes, before and after",
    ):  # fmt: skip
        assert words in found.text, words
    assert found.elements.count("svg") == 3, "bars, heat map, KL"
    assert found.elements.count("table") == found.elements.count("caption")
    first = page("rev-000001")
    assert "served until" in first.text
    assert first.elements.count("svg") == 3


def test_a_page_needs_nothing_else_and_runs_nothing(served, page) -> None:
    found = page()
    assert not {"script", "img", "link", "iframe", "object", "image", "a"} & {*found.elements}
    links = [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    policy = next(value for _, value in found.attributes if value.startswith("default-src"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert len(found.ids) == len(set(found.ids))
    for reference in links:
        assert reference[1:] in found.ids


def test_words_of_people_are_shown_as_they_are_and_reorder_nothing(served, page, tmp_path) -> None:
    found = page()
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert shown in found.text
    assert "\u202e" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_chart_is_xml_with_words_and_the_colours_of_the_page(served, page, tmp_path) -> None:
    page()
    charts = re.findall(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(), re.DOTALL)
    for chart in charts:
        tree = ElementTree.fromstring(chart)
        first, second = [child.tag.rpartition("}")[2] for child in tree][:2]
        assert (first, second) == ("title", "desc")
        assert tree.get("role") == "img"
        assert "var(--ink)" in chart
        assert not re.search(r"#0[1-5]0[1-5]0[1-5]", chart)


def test_the_same_home_gives_the_same_page(run, served, tmp_path) -> None:
    one, other = tmp_path / "one.html", tmp_path / "other.html"
    for file in (one, other):
        run("report", "--html", file)
    assert one.read_bytes() == other.read_bytes()
    assert run("report", "--html", "-").out == one.read_text(encoding="utf-8")


def test_answers_to_held_out_prompts_are_shown_until_they_are_forgotten(run, served, page) -> None:
    found = page()
    answers = Home.open(served).answers(run("report", "--json").json["update_id"])
    assert len(answers) == 10
    for one in answers:
        shown = f"prompt {one.prompt.messages[-1]['content']} before {one.before} after {one.after}"
        assert " ".join(escaped(shown, keep="\n\t").split()) in found.text
    with closing(connect(Home.open(served))) as connection:
        connection.execute("DELETE FROM answers")
    found = page()
    assert "What it writes" not in found.text
    assert "What it learned from" in found.text


def test_answers_with_mark_up_are_shown_as_they_are(served, run) -> None:
    from agentpref_cli.page import render

    value = run("report", "--json").json
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": [{"type": "text", "text": "<b>When?</b>"}]}
    answers = {"before": "In 2010, it is said.", "after": "</div>In 2010."}
    shown = [{"prompt": [question], **answers}, {"prompt": [system, question], **answers}]
    found = Page(render(value | {"answers": shown}, "now serving"))
    assert "What it writes, before and after" in found.text
    for text in ("<b>When?</b>", "system: Be brief. user: <b>When?</b>", *answers.values()):
        assert text in found.text


def test_a_home_of_refused_updates_only(run, filled, page, random_base) -> None:
    run("update", "--model", random_base, "--set", "gate.kl_budget=1e-9", exits=4)
    found = page()
    assert "Why: refused" in found.text
    assert "checks did not pass." in found.text
    assert "Where it comes from" in found.text
    assert "What it tried It learned nothing of it, and set it aside" in found.text
    assert "Nothing:" not in found.text
    assert "tried and set aside, by source: human 45" in run("report").out
    assert found.elements.count("svg") == 2, "bars and KL: there is no revision to compare"
    out = run("report", "--since", "1d", "--markdown").out
    assert out.startswith("1 refused since yesterday\n")
    assert "- **KL budget**: " in out


@pytest.mark.parametrize(
    ("rows", "verdict", "heading", "sentence", "columns"),
    [
        (None, "nothing_new", "What it learned from", "Nothing: no new feedback to learn", []),
        ([], "nothing_usable", "What it learned from", "Nothing: none of the new feedback", []),
        ([{"known": 3}], "nothing_to_gain", "What it tried", "What serves is right", ["known"]),
        ([{"set_aside": 3}], "refused", "What it tried", "It learned nothing", ["set_aside"]),
        ([{"trained": 3}, {"set_aside": 1}], "promoted", "What it learned from", "",
         ["trained", "set_aside"]),
    ],
)  # fmt: skip
def test_a_page_says_what_became_of_the_new_feedback(
    rows, verdict, heading, sentence, columns
) -> None:
    from agentpref_cli.page import tried

    nothing = dict.fromkeys(("trained", "held_out", "set_aside", "known"), 0)
    found = None if rows is None else {"source": [nothing | row for row in rows]}
    told = tried(found, verdict)
    assert (told["heading"], [*told["columns"]]) == (heading, columns)
    assert told["sentence"].startswith(sentence)
    assert bool(told["sentence"]) is bool(sentence)


def test_a_home_without_updates_has_no_page_and_an_empty_mail(run, home, tmp_path) -> None:
    run("init")
    assert "has no update yet" in run("report", "--html", tmp_path / "page.html", exits=1).err
    assert not (tmp_path / "page.html").exists()
    assert run("report", "--since", "1d", "--markdown").out == "no update since yesterday\n"
    assert run("report", "--since", "1d", "--json").json["updates"] == []


def test_a_night_that_failed_is_on_the_page_with_the_one_before(run, served, page, tmp_path):
    run("update", "--model", tmp_path / "nowhere", exits=1)
    run("import", _more(tmp_path))
    found = page()
    assert found.text.count("failed: an error ended it") == 2, "the title and the heading"
    assert "the last update that trained something: promoted" in found.text
    assert "Why: promoted" in found.text


def _more(folder: Path) -> Path:
    file = folder / "more.jsonl"
    file.write_text('{"prompt": "Who?", "chosen": "A friend.", "rejected": "Nobody."}\n')
    return file


def test_a_page_that_cannot_be_written_is_one_line(run, served, tmp_path) -> None:
    err = run("report", "--html", tmp_path / "no" / "page.html", exits=1).err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("package", ["matplotlib", "jinja2", "scipy"])
def test_what_is_missing_for_a_page_is_named_with_the_command(
    run, served, tmp_path, monkeypatch, package
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    err = run("report", "--html", tmp_path / "page.html", exits=1).err
    assert f"a page needs {package}; install it with: pip install 'agentpref[report]'" in err


# In the terminal


def test_the_terminal_tells_what_it_learned_from_the_line_and_all_revisions(run, served) -> None:
    out = run("report").out
    assert "learned from, by source: human 30" in out
    assert "line: base -> rev-000001 (" in out
    assert "label next: the fewer held-out prompts a tag has, " in out
    assert re.search(r"untagged has \d+ \(0\.\d\d; about \d+ more judged prompts halve it\)", out)
    rows = [line.split("\t") for line in out.splitlines() if line.startswith("rev-")]
    assert [row[0] for row in rows] == ["rev-000001", "rev-000002"]
    value = run("report", "--json").json["overview"]
    assert [row["revision"][:10] for row in value["history"]] == ["rev-000001", "rev-000002"]


def test_losses_and_changes_of_mind_are_told_apart() -> None:
    from agentpref_cli.commands.report import changes

    rows = [
        {"tag": "care", "lost": 0.1, "best_revision": "rev-000002-abc", "last": 0.8},
        {"tag": "style", "lost": 0.0, "best_revision": "rev-000003-abc", "last": 1.0},
    ]
    history = [
        {"revision": "rev-000003-abc", "turned": ["music"]},
        {"revision": None, "turned": ["bots"]},
    ]
    assert [*changes({"forgetting": rows, "history": history})] == [
        "care: 0.10 lost since rev-000002, on the same pairs; 0.80 now",
        "music: people changed their minds; from rev-000003 on, what they say now counts",
    ]


def test_options_that_would_have_no_effect_are_refused(run, served, tmp_path) -> None:
    for arguments in (
        ("--since", "1d", "--html", tmp_path / "page.html"),
        ("rev-000001", "--since", "1d"),
        ("--markdown", "--json"),
        ("--markdown", "--html", tmp_path / "page.html"),
        ("--html", "-", "--json"),
        ("--since", "soon"),
    ):
        run("report", *arguments, exits=2)


# The mail


def test_the_mail_has_all_updates_since_then_under_one_line(run, served, tmp_path) -> None:
    run("update", "--model", tmp_path / "nowhere", exits=1)
    lines = run("report", "--since", "1d", "--markdown").out.splitlines()
    assert lines[0] == "2 promoted, 1 failed since yesterday"
    headings = [line for line in lines if line.startswith("## ")]
    assert [line.split(":")[0] for line in headings] == ["## promoted", "## promoted", "## failed"]
    assert run("report", "--since", "2100-01-01", "--markdown").out.startswith("no update since 21")
    assert run("report", "--since", "1d").out.splitlines()[0] == lines[0]
    value = run("report", "--since", "1d", "--json").json
    assert (value["subject"], len(value["updates"])) == (lines[0], 3)
    assert orjson.dumps(value)


def test_a_mail_of_several_namespaces_names_them(run, served, rows, random_base) -> None:
    run("import", rows, "--namespace", "shop")
    run("update", "--model", random_base, "--namespace", "shop", "--set", "gate.kl_budget=1e-9",
        exits=4)  # fmt: skip
    out = run("report", "--since", "1d", "--markdown").out
    assert "## default, promoted: " in out
    assert "## shop, refused: " in out
    only = run("report", "--since", "1d", "--markdown", "--namespace", "shop").out
    assert only.startswith("1 refused since yesterday\n")
    assert "shop, refused" not in only


def test_one_update_as_markdown(run, served) -> None:
    out = run("report", "rev-000001", "--markdown").out
    assert out.startswith("## promoted: held-out accuracy ")


def test_words_of_people_make_no_link_no_picture_and_no_html_of_a_mail(run, served) -> None:
    out = run("report", "--markdown").out
    line = next(line for line in out.splitlines() if "alert" in line)
    assert "&lt;script>" in line
    assert "\\[x\\](" in line
    assert "\u202e" not in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("run `agentpref update --again` now", "run `agentpref update --again` now"),
        ("``<b>``", "\\`\\`&lt;b>\\`\\`"),
        ("\\`[x](u)`", "\\\\`[x](u)`"),
        ("![x](http://x)", "!\\[x\\](http://x)"),
        ("snake_case *stars* _under_", "snake_case \\*stars\\* \\_under\\_"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("> quoted\n# heading", "\\> quoted # heading"),
    ],
)
def test_a_text_in_markdown_shows_as_it_is(text: str, shown: str) -> None:
    assert mail.plain(text) == shown


def test_a_strict_night_is_refused_whatever_is_asked(run, served, random_base) -> None:
    """And its candidate is on the chart of KL as not published."""
    teach(served, range(200, 230), chosen=NO, rejected=YES, question="Which colour is {}?")
    assert learn(served, random_base, STRICT).verdict == "refused"
    from agentpref_cli.page import charts

    history = run("report", "--json").json["overview"]["history"]
    assert "not published" in (charts.divergence(history) or "")
