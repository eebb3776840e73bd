"""Runs the README and the guides, and compares the output with what they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sessions import ROOT, Fence, fences, normal, play

README = ROOT / "README.md"
# Their own tests run these: test_langchain_guide.py, test_openai_guide.py, tests/vllm_server and
# tests/apps.
ELSEWHERE = {"chat-apps.md", "langchain.md", "openai.md", "vllm.md"}
GUIDES = [README, *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in ELSEWHERE)]
PLAYED = [guide for guide in GUIDES if "```python" in guide.read_text(encoding="utf-8")]


@pytest.fixture(autouse=True)
def _no_home_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTPREF_HOME", raising=False)


@pytest.mark.parametrize(
    "guide",
    [pytest.param(p, id=p.name, marks=[] if p == README else [pytest.mark.slow]) for p in PLAYED],
)
def test_a_guide_shows_the_real_output(guide: Path, tmp_path: Path) -> None:
    document = guide.read_text(encoding="utf-8")
    for fence, written in play(document, tmp_path.resolve()):
        assert normal(written) == normal(fence.text)


def test_the_readme_has_an_example_of_ten_lines_that_ends_in_a_promotion() -> None:
    shown = fences(README.read_text(encoding="utf-8"))
    at = next(i for i, fence in enumerate(shown) if fence.language == "python")
    story, printed = shown[at : at + 2]
    assert len([line for line in story.text.splitlines() if line]) == 10
    assert printed.text.startswith("promoted")


def test_every_guide_is_listed_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    guides = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md", "LOG.md"}
    assert {name for name in guides if f"({name})" not in index} == set()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_every_file_that_a_guide_links_to_exists(guide: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", guide.read_text(encoding="utf-8"))
    assert [path for path in links if not (guide.parent / path).exists()] == []


def test_a_stale_output_is_detected(tmp_path: Path) -> None:
    document = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n\n```console\n$ echo a\nb\n```\n"
    played = list(play(document, tmp_path))
    assert [written for _, written in played] == ["2\n", "$ echo a\na\n"]
    assert all(normal(written) != normal(fence.text) for fence, written in played)


def test_a_text_fence_after_no_program_is_not_compared(tmp_path: Path) -> None:
    document = "```python\nprint(1)\n```\n\nSome words.\n\n```text\nanything\n```\n"
    assert list(play(document, tmp_path)) == []


def test_a_session_runs_on_a_terminal_with_agentpref_and_without_the_home_of_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTPREF_HOME", str(tmp_path / "elsewhere"))
    document = "```console\n$ test -t 1 && pwd\n$ agentpref init; agentpref stats; echo $?\n```\n"
    [(_, written)] = play(document, tmp_path.resolve())
    assert written == (
        "$ test -t 1 && pwd\n/home/you/app\n"
        "$ agentpref init; agentpref stats; echo $?\n"
        "made a home: /home/you/app/.agentpref\nnothing is logged yet\n0\n"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rev-000001-0123456789ab  live", "rev-000001-ba9876543210 live"),
        ("at 2026-01-02 03:04:05, 8 s", "at 2027-12-31 23:59:59, 112 s"),
        (".50 -> .88, +.38, × 1.00", ".50 -> 1.00, -.12, × .99"),
        (
            "update 01a1fa19-92dd-7eab-8b9b-dfc8e3d45514",
            "update 0000aaaa-0000-0000-0000-000000000000",
        ),
        (" a\n ────\n b\n", " a\n ───────\n b"),
        ("in 4 s, bfloat16\nrounding in nats a token: shared prompts .01\n", "in 9 s, float32"),
    ],
)
def test_ids_times_and_figures_are_not_compared(one: str, other: str) -> None:
    assert normal(one) == normal(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("promoted", "refused"), ("added 602", "added 601"), ("rev-000001-0123456789ab", "base")],
)
def test_words_and_counts_are_compared(one: str, other: str) -> None:
    assert normal(one) != normal(other)


def test_fences_are_found_with_their_positions() -> None:
    document = "Words.\n```python\nx = 1\n```\n```\nplain\n```\n"
    found = fences(document)
    assert [(fence.language, fence.text) for fence in found] == [
        ("python", "x = 1\n"),
        ("", "plain\n"),
    ]
    assert all(isinstance(f, Fence) and document[f.start : f.end] == f.text for f in found)
