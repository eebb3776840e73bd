"""`eval`: score any revisions on held-out examples or on a file, and compare them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from agentpref_cli import options
from agentpref_cli.asking import (
    Concurrency,
    MaxCost,
    MaxTokens,
    asking_of,
    revisions_of,
    show_spending,
)
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
    from pathlib import Path

    from agentpref.evaluation import Evaluation
    from agentpref.evaluation.duels import Duels
    from agentpref.judging import Asking
    from agentpref.prefer.judges.calibration import Estimate
    from agentpref.prove.comparing import Difference, Group, Interval

_FINDINGS = {"better": GOOD, "worse": BAD, "not told apart": WARN}


Revisions = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[REV]...",
        help="Revisions: ids, numbers, beginnings of ids, live, canary or base "
        "[default: base and what serves].",
        show_default=False,
    ),
]
BaseOf = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The base model [default: the one that the revisions name].",
        show_default=False,
    ),
]


def evaluate(
    revisions: Revisions = None,
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
    model: BaseOf = None,
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
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Let a judge compare what the revisions answer: win rates instead of accuracies.",
            show_default=False,
        ),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --judge: tokens of an answer, at most.")
    ] = 256,
    concurrency: Concurrency = 8,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Score revisions on held-out examples or on a file of preferences.

    Nothing is imported, and what serves stays. Accuracy is the share of examples on which a
    revision raises the better answer over the worse one, against the base. Later revisions are
    compared with earlier ones, prompt by prompt. Intervals are of 95 %. Prompts that trained one of
    them are left out.

    With --judge, the revisions answer the held-out prompts (at most --limit, else 100) and a judge
    compares the answers, in both orders. Beside the win rate stand the one that is corrected by
    what is known of the judge's errors, and the one at equal lengths.
    """
    from agentpref.evaluation import evaluate as run_evaluation
    from agentpref.learn import process

    if judge is not None:
        _refuse_beside_judge(since, with_trained)
        with progress(quiet) as report:
            asking = asking_of(concurrency, max_tokens, max_cost, None, process.settling(report))
            fought = _fight(
                judge, home, revisions or (), on, format, namespace, model, limit, answer_tokens,
                asking,
            )  # fmt: skip
        print_result(as_json, fought.to_mapping(), lambda: _show_duels(fought))
        return
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


def _refuse_beside_judge(since: str | None, with_trained: bool) -> None:
    from agentpref.errors import ConfigError

    for name, given in (("--since", since), ("--with-trained", with_trained)):
        if given:
            raise ConfigError(
                f"{name} chooses examples to score, and --judge asks prompts; leave it out"
            )


def _fight(
    judge: str,
    home: Path | None,
    revisions: Sequence[str],
    on: str | None,
    format: str | None,
    namespace: str,
    model: str | None,
    limit: int | None,
    answer_tokens: int,
    asking: Asking,
) -> Duels:
    """Let revisions answer in this process, and a judge compare the answers."""
    from agentpref.evaluation.duels import judge_revisions

    return judge_revisions(
        home,
        judge,
        revisions,
        answer=revisions_of(model),
        on=sys.stdin.buffer if on == "-" else on,
        format=format,
        namespace=namespace,
        prompts=100 if limit is None else limit,
        max_tokens=answer_tokens,
        asking=asking,
    )


def _show_duels(found: Duels) -> None:
    say(f"{found.judge} on {found.prompts:,} prompts of {found.on}", BOLD)
    rows = [
        (
            f"{_short(one.revision)} over {_short(one.against)}",
            one.wins,
            one.ties,
            one.losses,
            one.position,
            _estimate(one.rate.raw),
            _estimate(one.rate.corrected),
            _estimate(one.controlled.controlled),
        )
        for one in found.duels
    ]
    columns = ("", "wins", "ties", "losses", "by order", "win rate", "corrected", "at equal length")
    table(columns, rows)
    for reason in sorted({one.rate.why for one in found.duels if one.rate.why}):
        say(reason, WARN)
    if found.ratings:
        strengths = [(_short(name), strength) for name, strength in found.ratings.items()]
        table(("revision", "strength"), strengths)
    show_spending(found.spending)
    for note in found.notes:
        say(note)


def _estimate(one: Estimate | None) -> str:
    return "-" if one is None else f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


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
