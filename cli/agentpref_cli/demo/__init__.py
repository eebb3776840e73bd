"""`agentpref demo`: three updates on real preferences with the bundled model, step by step.

This module has the command and prints what happens. ``users`` has the questions and the feedback;
``story`` asks, updates, swaps and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import (
    BAD,
    BOLD,
    DIM,
    GOOD,
    one_line,
    print_result,
    progress,
    say,
    table,
)

if TYPE_CHECKING:
    from agentpref.types import UpdateReport
    from agentpref_cli.demo.users import Round


def demo(
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the demo's home here [default: a temporary folder].",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")] = 0,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Run three updates on real preferences.

    Needs no network, and up to three minutes on two cores.
    """
    from importlib.util import find_spec

    from agentpref.errors import MissingDependency

    if missing := [name for name in ("torch", "peft", "langchain") if find_spec(name) is None]:
        raise MissingDependency(
            f"the demo needs {', '.join(missing)}; install with: pip install 'agentpref[demo]'"
        )
    from agentpref.learn.process import settle

    settle()
    run(home=home, json=as_json, seed=seed, quiet=quiet)


def run(*, home: Path | None, json: bool, seed: int, quiet: bool = False) -> None:
    """Run the demo in ``home``, or in a temporary folder, and print what happens."""
    from tempfile import TemporaryDirectory

    from agentpref_cli.demo import story

    with ExitStack() as stack:
        folder = home or Path(stack.enter_context(TemporaryDirectory()), "home")
        report = stack.enter_context(progress(quiet)) or (lambda stage, done, total: None)
        if not json:
            say("Three updates of the bundled model on real preferences, without a network.", BOLD)
            say(
                "A LangChain agent answers, users give feedback, and each update trains on it.", DIM
            )
        told = story.tell(folder, seed, report, (lambda *_: None) if json else _print_update)
    print_result(json, told, lambda: _print_end(told))


def _print_update(number: int, asked: Round, report: UpdateReport, told: Mapping[str, Any]) -> None:
    """Print one update: the verdict, the swap, and answers before and after."""
    counts = report.counts
    say(f"\nUpdate {number}: {asked.title} ({asked.tag})", BOLD)
    say(
        f"  {len(asked.questions)} answers logged -> {counts['new']} new pairs, "
        f"{counts['new_held_out']} held out; {counts.get('replayed', 0)} older pairs replayed"
    )
    style = GOOD if report.verdict == "promoted" else BAD
    say(f"  {report.verdict}: {report.revision or ''}", style)
    for check in report.checks:
        if check["name"] == "new preferences" or not check["passed"]:
            say(f"    {check['name']}: {check['message']}", "" if check["passed"] else BAD)
    failed = told["swap"].get("failed", 0)
    by = ", ".join(f"{n} by {name}" for name, n in sorted(told["swap"].items()) if name != "failed")
    say(f"  requests during the swap: {by}; {failed} failed", BAD if failed else "")
    say(f"  answers as users like them: {told['liked_before']:.0%} -> {told['liked_after']:.0%}")
    for shown in told["shown"]:
        say(f"    {one_line(shown['question'], 96)}", DIM)
        say(f"      before: {one_line(shown['before'], 84)}")
        say(f"      after:  {one_line(shown['after'], 84)}", GOOD)


def _print_end(told: Mapping[str, Any]) -> None:
    """Print both arms' accuracies, the bad update, and the summary line."""
    _print_matrix("Held-out accuracy with agentpref (replay and KL penalty)", told["r_matrix"])
    _print_matrix("The same updates trained naively (neither)", told["naive_r_matrix"])
    verdict = told["bad_update_verdict"]
    say("\nAn update on shuffled labels", BOLD)
    say(f"  {verdict}; what served before still serves", GOOD if verdict == "refused" else BAD)
    for reason in told["bad_update_reasons"]:
        say(f"    {reason}")
    say(
        f"\nBWT {told['bwt']:+.3f} | naive forgetting F {told['naive_forgetting']:.3f} | "
        f"bad update {verdict} | {told['seconds']:.0f} s",
        BOLD,
    )


def _print_matrix(title: str, matrix: Mapping[str, Any]) -> None:
    say(f"\n{title}", BOLD)
    rows = [
        (f"after update {n}" if n else "before any update", *(f"{value:.2f}" for value in row))
        for n, row in enumerate(matrix["rows"])
    ]
    table(("", *matrix["strata"]), rows)
    say(f"  BWT {matrix['bwt']:+.3f}, forgetting F {matrix['forgetting']:.3f}")
