"""How the demo looks. Prints what the story found and computes nothing of its own."""

from __future__ import annotations

from agentpref.prove.metrics import RMatrix
from agentpref_cli.demo.story import NightResult, Story
from agentpref_cli.terminal import BAD, BOLD, DIM, GOOD, one_line, say, table


def open_story() -> None:
    """Say what is about to happen."""
    say("Three nights with the bundled model, on real preferences, without a network.", BOLD)
    say("By day a LangChain agent answers and people react; by night it learns from them.", DIM)


def show_night(number: int, night: NightResult) -> None:
    """Print one night: the verdict, the swap, and answers before and after."""
    say("")
    say(f"Night {number}: {night.title} ({night.stratum})", BOLD)
    report = night.report
    pairs = report.counts
    say(
        f"  {night.answers} answers logged -> {pairs['new']} pairs to learn, "
        f"{pairs['new_held_out']} held out; {pairs.get('replayed', 0)} older pairs replayed"
    )
    good = report.verdict == "promoted"
    say(f"  {report.verdict}: {report.revision or ''}", GOOD if good else BAD)
    for check in report.checks:
        if check["name"] == "new preferences" or not check["holds"]:
            say(f"    {check['name']}: {check['words']}", "" if check["holds"] else BAD)
    failed = night.swap.get("failed", 0)
    by = ", ".join(f"{n} by {name}" for name, n in sorted(night.swap.items()) if name != "failed")
    say(f"  swapped under load: {by}; {failed} failed")
    say(f"  answers as users like them: {night.liked_before:.0%} -> {night.liked_after:.0%}")
    for shown in night.shown:
        say(f"    {one_line(shown.question, 96)}", DIM)
        say(f"      before: {one_line(shown.before, 84)}")
        say(f"      after:  {one_line(shown.after, 84)}", GOOD)


def close_story(story: Story) -> None:
    """Print what was kept, what a naive arm forgot, and what the gate did with a bad update."""
    _matrix("Held-out accuracy with agentpref (replay and KL penalty)", story.matrix)
    _matrix("The same nights trained naively (neither)", story.naive)
    say("")
    say("A night of shuffled labels", BOLD)
    refused = story.bad.verdict == "refused"
    say(f"  {story.bad.verdict}; what served before still serves", GOOD if refused else BAD)
    for reason in story.bad.reasons:
        say(f"    {reason}")
    say("")
    say(
        f"BWT {story.matrix.bwt:+.3f} | naive forgetting F {story.naive.forgetting:.3f} | "
        f"bad update {story.bad.verdict} | {story.seconds:.0f} s",
        BOLD,
    )


def _matrix(title: str, matrix: RMatrix) -> None:
    say("")
    say(title, BOLD)
    after = ["before any night", *(f"after night {n}" for n in range(1, len(matrix.rows)))]
    rows = [
        (name, *(f"{value:.2f}" for value in row))
        for name, row in zip(after, matrix.rows, strict=True)
    ]
    table(("", *matrix.strata), rows)
    say(f"  BWT {matrix.bwt:+.3f}, forgetting F {matrix.forgetting:.3f}")
