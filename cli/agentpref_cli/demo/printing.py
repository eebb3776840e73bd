"""How the demos print what happened: `story`'s three updates, and `real_story`'s two nights."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from agentpref_cli.terminal import BAD, BOLD, DIM, GOOD, one_line, say, table

if TYPE_CHECKING:
    from agentpref.types import UpdateReport
    from agentpref_cli.demo.real_people import Preference
    from agentpref_cli.demo.users import Round

_WIDTH, _LINES = 96, 4
_GAIN = "new preferences"


def show_update(number: int, asked: Round, report: UpdateReport, told: Mapping[str, Any]) -> None:
    """Print one update of the bundled model: the verdict, the swap, answers before and after."""
    counts = report.counts
    say(f"\nUpdate {number}: {asked.title} ({asked.tag})", BOLD)
    say(
        f"  {len(asked.questions)} answers logged -> {counts['new']} new pairs, "
        f"{counts['new_held_out']} held out; {counts.get('replayed', 0)} older pairs replayed"
    )
    _show_verdict(report, told["swap"])
    say(
        f"  answers as users like them, to {told['asked_again']} questions it never trained on: "
        f"{told['liked_before']:.0%} -> {told['liked_after']:.0%}"
    )
    say(f"  {len(told['shown'])} of them, drawn at random:")
    for shown in told["shown"]:
        say(f"    {one_line(shown['question'], 96)}", DIM)
        say(f"      users like: {one_line(shown['liked'], 80)}", DIM)
        for when in ("before", "after"):
            good = shown[when] == shown["liked"]
            say(f"      {when + ':':11} {one_line(shown[when], 80)}", GOOD if good else "")


def show_end(told: Mapping[str, Any]) -> None:
    """Print both arms' accuracies, the bad update, and the summary line."""
    _show_matrix("Held-out accuracy with agentpref (replay and KL penalty)", told["r_matrix"])
    _show_matrix("The same updates trained naively (neither)", told["naive_r_matrix"])
    verdict = told["bad_update_verdict"]
    say("\nAn update on shuffled labels", BOLD)
    is_live = verdict == "promoted"
    now = "it serves, which it should not" if is_live else "what served before still serves"
    say(f"  {verdict}; {now}", BAD if is_live else GOOD)
    for reason in told["bad_update_reasons"]:
        say(f"    {reason}")
    say(
        f"\nBWT {told['bwt']:+.3f} | naive forgetting F {told['naive_forgetting']:.3f} | "
        f"bad update {verdict} | {told['seconds']:.0f} s",
        BOLD,
    )


def show_night(
    number: int, night: Preference, report: UpdateReport, told: Mapping[str, Any]
) -> None:
    """Print one night of the real model: the verdict, what it writes now, and what it kept."""
    counts, before, after = report.counts, told["before"], told["after"]
    say(f"\nNight {number}: {night.title} ({night.tag})", BOLD)
    say(
        f"  {counts['new'] + counts['new_held_out']} comparisons of the model's own answers: "
        f"{counts['new']} to learn from, {counts['new_held_out']} held out; "
        f"{counts.get('replayed', 0)} older ones replayed"
    )
    _show_verdict(report, told["swap"])
    say(f"  {told['asked']} questions that it was never trained on, asked before and after:")
    say(f"    words of an answer, mean      {before['words']:.0f} -> {after['words']:.0f}")
    say(f"    lists                         {before['lists']} -> {after['lists']}")
    cut = f"cut off after {told['max_tokens']} tokens"
    say(f"    {cut:30}{before['cut_off']} -> {after['cut_off']}")
    say(
        f"    {night.better} than before, of two answers to one question (half if alike): "
        f"{told['win_rate']:.0%}"
    )
    for tag, kept in told["kept"].items():
        left, now = kept["left"], kept["now"]
        say(
            f"  what the night on {tag!r} taught, asked again: {left['words']:.0f} words and "
            f"{left['lists']} lists then, {now['words']:.0f} and {now['lists']} now"
        )
    say(f"  {len(told['shown'])} of the {told['asked']}, drawn at random (seed {told['seed']}):")
    for shown in told["shown"]:
        say(f"    {one_line(shown['question'], _WIDTH)}", BOLD)
        for when, style in (("before", ""), ("after", GOOD)):
            answer = shown[when]
            _show_text(f"{when}, {answer['words']} words: {answer['text']}", style)


def show_real_end(told: Mapping[str, Any]) -> None:
    """Print the summary line of both nights."""
    nights = " | ".join(
        f"{night['stratum']}: {night['verdict']}, accuracy {_share(night['accuracy_before'])} -> "
        f"{_share(night['accuracy_after'])}, win rate {night['win_rate']:.0%}"
        for night in told["nights"]
    )
    say(f"\n{nights} | {told['seconds']:.0f} s", BOLD)
    say(
        f"The model: {told['model']}; your own home learns with: agentpref update --model FOLDER",
        DIM,
    )


def _show_verdict(report: UpdateReport, swap: Mapping[str, int]) -> None:
    """Print the verdict, the gain, every check that failed, and the swap."""
    good = report.verdict == "promoted"
    say(f"  {report.verdict}: {report.revision or ''}", GOOD if good else BAD)
    for check in report.checks:
        if check["name"] == _GAIN or not check["passed"]:
            say(f"    {check['name']}: {check['message']}", "" if check["passed"] else BAD)
    failed = swap.get("failed", 0)
    by = ", ".join(f"{n} by {name}" for name, n in sorted(swap.items()) if name != "failed")
    say(f"  requests during the swap: {by}; {failed} failed", BAD if failed else "")


def _show_text(text: str, style: str) -> None:
    """Print an answer on a few lines; its own lines are kept apart by a slash."""
    lines = wrap(one_line(" / ".join(filter(None, map(str.strip, text.splitlines())))), _WIDTH - 6)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], lines[_LINES - 1][: _WIDTH - 8] + " …"]
    for line in lines:
        say(f"      {line}", style)


def _show_matrix(title: str, matrix: Mapping[str, Any]) -> None:
    say(f"\n{title}", BOLD)
    rows = [
        (f"after update {n}" if n else "before any update", *(f"{value:.2f}" for value in row))
        for n, row in enumerate(matrix["rows"])
    ]
    table(("", *matrix["strata"]), rows)
    say(f"  BWT {matrix['bwt']:+.3f}, forgetting F {matrix['forgetting']:.3f}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
