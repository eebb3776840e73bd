"""Rubrics: what is read from a file, what makes a new version, what is refused and how."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import JudgeError
from agentpref.home import Home
from agentpref.prefer.judges import rubric
from agentpref.prefer.judges.rubric import TEMPLATE, parse


def front(*lines: str, text: str = "") -> str:
    return "\n".join(("---", *lines, "---", text))


GOOD = ("model: m", "principles: [be brief]")


def test_the_template_is_a_rubric() -> None:
    made = parse("brief", TEMPLATE.format(model='"m"', base_url='base_url: "http://h"\n'))
    assert (made.model, made.base_url, len(made.principles)) == ("m", "http://h", 2)
    assert made.text.startswith("Anything else")


def test_principles_may_be_plain_lines_and_then_have_numbers_as_names() -> None:
    found = parse("x", front("model: m", "principles: [be brief, {text: be kind, name: kind}]"))
    assert [one.name for one in found.principles] == ["principle 1", "kind"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no front matter", "begin the file with a line ---"),
        (front("model: m"), "nothing to judge by; write one under principles"),
        (front("- a list"), "must be settings"),
        (front("principles: ["), "is not YAML"),
        (front(*GOOD, "modle: x"), "'modle' is no setting; known: text, engine, model"),
        (front(*GOOD, "temperature: hot"), "temperature is 'hot'"),
        (front(*GOOD, "temperature: -1"), "temperature is '-1'"),
        (front(*GOOD, "samples: 3"), "samples is 3 with temperature 0"),
        (front(*GOOD, "draw: 2"), "draw is 2, but there are 1 principles"),
        (front(*GOOD, "name: other"), "'name' is no setting"),
        (front("model: m", f"principles: [{'x' * 4001}]"), "principles.0.text is 'xxx"),
        (front("model: m", f"principles: [{'x' * 100_000}]"), "but may have 40,000"),
        (front("model: m", "principles: ['']"), "principles.0.text is ''"),
        (front("model: m", "principles: [{text: a, weight: 0}]"), "principles.0.weight is '0'"),
        (front(*GOOD, "price: [.nan, 1]"), "price.0 is 'nan'"),
        (front(*GOOD, "price: [-1, 1]"), "price.0 is '-1'"),
        (front("model: m", "principles: be brief"), "Input should be a list"),
        (front("engine: panel", "members: [a]"), "members must name two judges or more"),
    ],
)
def test_what_is_no_rubric_is_refused_with_the_value_and_the_cure(text: str, why: str) -> None:
    with pytest.raises(JudgeError) as raised:
        parse("x", text)
    assert why in str(raised.value)


def test_a_tag_of_yaml_that_makes_objects_is_refused() -> None:
    with pytest.raises(JudgeError, match="is not YAML"):
        parse("x", front("model: !!python/object/apply:os.system ['true']"))


CHANGES = ("model: n", "temperature: .5", "base_url: http://h", "scale: 2", "max_tokens: 99",
           "min_confidence: .7", "draw: 1")  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_each_setting_that_may_change_a_verdict_makes_another_version(change: str) -> None:
    kept = [line for line in GOOD if line.partition(":")[0] != change.partition(":")[0]]
    assert parse("x", front(*kept, change)).digest != parse("x", front(*GOOD)).digest


def test_the_text_makes_another_version_and_a_comment_or_a_price_does_not() -> None:
    first = parse("x", front(*GOOD)).digest
    assert parse("x", front(*GOOD, text="Users are nurses.")).digest != first
    same = front("# a comment", *GOOD, "timeout: 5", "price: [1, 2]", "api_key_env: OTHER")
    assert parse("x", same).digest == first


@given(st.text(min_size=1), st.integers(1, 5))
def test_both_orders_draw_the_same_principles_and_so_many(seed: str, count: int) -> None:
    lines = [f"  - {{text: p{n}, weight: {n + 1}}}" for n in range(5)]
    found = parse("x", front("model: m", f"draw: {count}", "principles:", *lines))
    assert found.drawn(seed) == found.drawn(seed)
    assert len(set(found.drawn(seed))) == count


def test_a_heavier_principle_is_drawn_more_often() -> None:
    lines = ("  - {text: often, weight: 3}", "  - {text: seldom, weight: 1}")
    found = parse("x", front("model: m", "draw: 1", "principles:", *lines))
    drawn = [found.drawn(str(n))[0].text for n in range(4000)]
    assert 0.70 < drawn.count("often") / len(drawn) < 0.80  # 3 of 4


def test_a_rubric_is_written_once_and_for_its_owner_alone(home: Home) -> None:
    rubric.write(home, "brief", front(*GOOD))
    assert rubric.read(home, "brief").principles[0].text == "be brief"
    assert rubric.names(home) == ["brief"]
    assert (home.judges / "brief.md").stat().st_mode & 0o077 == 0
    with pytest.raises(JudgeError, match="is there already"):
        rubric.write(home, "brief", front(*GOOD))


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", ".hidden", "x" * 65, "a b"])
def test_a_name_that_is_no_file_of_the_folder_is_refused(home: Home, name: str) -> None:
    with pytest.raises(JudgeError, match="is no name of a judge"):
        rubric.read(home, name)


def test_a_judge_that_is_not_there_names_those_that_are(home: Home) -> None:
    rubric.write(home, "brief", front(*GOOD))
    with pytest.raises(JudgeError, match=r"no judge 'bref' .* there are: brief"):
        rubric.read(home, "bref")


def test_a_byte_order_mark_and_a_folder_harm_nothing(home: Home) -> None:
    rubric.write(home, "brief", front(*GOOD))
    file = home.judges / "brief.md"
    file.write_text(front(*GOOD), encoding="utf-8-sig")
    (home.judges / "folder.md").mkdir()
    assert rubric.read(home, "brief").model == "m"
    assert rubric.names(home) == ["brief"]


def test_a_setting_that_is_given_twice_is_refused() -> None:
    text = "---\nengine: openai\nmodel: a\nmodel: b\n---\nJudge.\n"
    with pytest.raises(JudgeError, match="'model' is twice"):
        parse("brief", text)
    nested = "---\nengine: openai\nprinciples:\n  - {name: x, text: y, text: z}\n---\nJudge.\n"
    with pytest.raises(JudgeError, match="'text' is twice"):
        parse("brief", nested)
