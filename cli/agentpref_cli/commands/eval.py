"""`eval`: score any revisions on held-out examples or on a file, and compare them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from agentpref_cli import options
from agentpref_cli.terminal import (
    BAD,
    BOLD,
    GOOD,
    WARN,
    moment,
    print_result,
    progress,
    say,
    table,
)

if TYPE_CHECKING:
    from agentpref.evaluation import Evaluation
    from agentpref.prove.comparing import Difference, Group, Interval

_FINDINGS = {"better": GOOD, "worse": BAD, "not told apart": WARN}


def evaluate(
    revisions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REV]...",
            help="Revisions: ids, numbers, beginnings of ids, live, canary or base "
            "[default: base and what serves].",
            show_default=False,
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="TAG|FILE",
            help="A tag, a stratum, or a file of preferences; - reads standard input "
            "[default: all held-out examples].",
            show_default=False,
        ),
    ] = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The base model [default: the one that the revisions name].",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Format of a file's rows, as in import [default: each row's keys tell].",
            show_default=False,
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Only what was judged since: an age such as 30d, or a date.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Score so many examples at most.", show_default=False
        ),
    ] = None,
    with_trained: Annotated[
        bool,
        typer.Option("--with-trained", help="Also score prompts that trained a revision, apart."),
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Score revisions on held-out examples or on a file of preferences.

    Nothing is imported, and what serves stays. Accuracy is the share of examples on which a
    revision raises the better answer over the worse one, against the base. Later revisions are
    compared with earlier ones, prompt by prompt. Intervals are of 95 %. Prompts that trained one of
    them are left out.
    """
    from agentpref.evaluation import evaluate as run_evaluation
    from agentpref.learn import process

    begin = None if since is None else options.parse_since(since, time.time(), "--since")
    with progress(quiet) as report:
        found = run_evaluation(
            home,
            revisions or (),
            on=sys.stdin.buffer if on == "-" else on,
            format=format,
            namespace=namespace,
            model=model,
            since=begin,
            limit=limit,
            with_trained=with_trained,
            progress=process.settling(report),
        )
    print_result(as_json, found.to_mapping(), lambda: _show(found))


def _show(found: Evaluation) -> None:
    everything = found.groups[0]
    prompts = f"{everything.prompts:,} prompt{'s' if everything.prompts != 1 else ''}"
    since = "" if found.since is None else f" judged since {moment(found.since)}"
    say(f"{found.on}{since}: {everything.examples:,} examples on {prompts}", BOLD)
    names = {one.revision: _short(one.revision) for one in found.revisions}
    columns = ["revision", "serves", "KL from base", "examples trained on"]
    table(columns, [(r.revision, r.serves, r.kl, r.trained_on) for r in found.revisions])
    headings = ("accuracy", "examples", *names.values())
    table(headings, [[*_accuracies(group)] for group in found.groups])
    for number, pair in enumerate(everything.differences):
        heading = f"{names[pair.revision]} against {names[pair.against]}"
        changes = [[_name(group), *_numbers(group.differences[number])] for group in found.groups]
        columns = [heading, "change", "interval", "better", "worse", "sign test", "so"]
        table(columns, changes, styles=_FINDINGS)
    for reason, count in found.left_out.items():
        why = "their prompts trained a revision (--with-trained scores them, apart)"
        say(f"left out: {count:,}, {why if reason == 'trained' else reason.replace('_', ' ')}")
    for note in found.notes:
        say(note)


def _accuracies(group: Group) -> Iterator[object]:
    yield _name(group)
    thumbs = f", {group.thumbs:,} thumbs" if group.thumbs and group.thumbs < group.examples else ""
    yield f"{group.examples:,}{thumbs}"
    yield from map(_interval, group.accuracy.values())


def _name(group: Group) -> str:
    return f"{group.name}, trained" if group.trained else group.name


def _interval(found: Interval) -> str:
    shown = f"{found.accuracy:.2f}"
    return shown if found.lower is None else f"{shown} [{found.lower:.2f}, {found.upper:.2f}]"


def _numbers(one: Difference) -> tuple[object, ...]:
    interval = f"{one.lower:+.2f} to {one.upper:+.2f}"
    p = f"p = {one.p:.3f}" if one.p >= 0.001 else "p < 0.001"
    return (f"{one.change:+.2f}", interval, one.wins, one.losses, p, one.finding)


def _short(revision: str) -> str:
    """A revision without the hash: its number is its own within a home."""
    return revision.rpartition("-")[0] or revision
