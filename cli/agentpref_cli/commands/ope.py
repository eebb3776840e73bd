"""`ope`: what would revisions have earned on the logged traffic?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentpref_cli import options
from agentpref_cli.commands.eval import BaseOf, Revisions
from agentpref_cli.terminal import BAD, BOLD, GOOD, WARN, print_result, progress, say, table

if TYPE_CHECKING:
    from agentpref.offpolicy import OffPolicy, Valued

UNSAID = 5
REASONS: Mapping[str, str] = {
    "greedy": "written at temperature 0, where nothing else could have been",
    "no_revision": "the log does not say which revision answered",
    "unknown_revision": "by a revision that is not in the home",
    "pruned_revision": "by a revision whose files were pruned",
    "no_tokens": "without the tokens that were sampled",
    "unknown_temperature": "without a temperature in their parameters",
    "truncated_sampling": "sampled with top_p, top_k or as the best of several",
    "broken_off": "broke off",
    "tokens_disagree": "their tokens spell another text",
    "too_long": "too long for the model",
    "unreadable_step": "an answer in them cannot be read as it was sampled",
}


def ope(
    revisions: Revisions = None,
    reward: Annotated[
        str, typer.Option(metavar="KEY", help="The key of the feedback whose scores are rewards.")
    ] = "thumbs",
    by: Annotated[
        Literal["answer", "length"],
        typer.Option(help="Weigh each answer, or each class of answers of about one length."),
    ] = "answer",
    whole: Annotated[
        bool,
        typer.Option(
            "--whole", help="Weigh whole conversations by what they earned, instead of answers."
        ),
    ] = False,
    cost: Annotated[
        float, typer.Option(metavar="C", help="With --whole: what each answer costs.")
    ] = 0.0,
    tool_error: Annotated[
        float,
        typer.Option(metavar="C", help="With --whole: what an answer costs whose tool failed."),
    ] = 0.0,
    gamma: Annotated[
        float, typer.Option(metavar="G", help="With --whole: the discount of each later answer.")
    ] = 1.0,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Only answers since: an age such as 30d, or a date.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, metavar="N", help="So many answers at most, the newest.")
    ] = 1000,
    model: BaseOf = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Estimate what revisions would have earned on the logged traffic, before they serve.

    Answers that were sampled at a temperature above 0, and got a score, are weighed by how much
    likelier a revision gives them than what served did. Where the log does not tell (too few
    answers of weight, one that decides alone, nothing like what the revision would say), no number
    is said, but why.

    With --whole, conversations are weighed by what all their answers earned, each by the answers up
    to it: the longer they are, the sooner a log says nothing.

    Exits 5 if nothing can be said of any revision.
    """
    from agentpref.errors import ConfigError
    from agentpref.offpolicy import off_policy
    from agentpref.offpolicy_traces import off_policy_of_traces
    from agentpref.traces import RewardSpec

    begin = None if since is None else options.parse_since(since, time.time(), "--since")
    spec = RewardSpec({reward: 1.0}, cost, tool_error, gamma)
    if not whole and spec != RewardSpec({reward: 1.0}):
        raise ConfigError(
            "--cost, --tool-error and --gamma are of whole conversations: add --whole"
        )
    if whole and by != "answer":
        raise ConfigError(f"--by {by} is of single answers; leave it out beside --whole")
    with progress(quiet) as report:
        where: dict[str, Any] = {
            "namespace": namespace,
            "model": model,
            "since": begin,
            "limit": limit,
        }
        if whole:
            found = off_policy_of_traces(home, revisions or (), spec=spec, progress=report, **where)
        else:
            found = off_policy(
                home, revisions or (), reward=reward, by=by, progress=report, **where
            )
    print_result(as_json, found.to_mapping(), lambda: _show(found))
    if all(one.refused for one in found.revisions):
        raise typer.Exit(UNSAID)


def _show(found: OffPolicy) -> None:
    earned = "" if found.earned is None else f"; they earned {found.earned:.3f} in the mean"
    things = "conversations" if found.by == "conversation" else "answers"
    say(f"{found.answers:,} {things} with {found.reward} can be weighed{earned}", BOLD)
    said = [one for one in found.revisions if one.value is not None]
    if said:
        columns = ("revision", "serves", "would earn", "interval", "less live's", "effective")
        styles = {"better": GOOD, "worse": BAD}
        table(columns, [_row(one) for one in said], styles=styles)
    for one in found.revisions:
        for why in one.refused:
            say(f"nothing is said of {one.revision}: {why}", WARN)
    for reason, count in found.left_out.items():
        say(f"left out, {REASONS.get(reason, reason.replace('_', ' '))}: {count:,}")
    for note in found.notes:
        say(note)


def _row(one: Valued) -> tuple[object, ...]:
    better = ""
    if one.better is not None:
        low, high = one.better
        word = "better" if low > 0 else "worse" if high < 0 else "not told apart"
        better = f"{low:+.3f} to {high:+.3f} ({word})"
    return (
        one.revision,
        one.serves,
        f"{one.value:.3f}",
        f"{one.low:.3f} to {one.high:.3f}",
        better,
        f"{one.effective:,.0f}",
    )
