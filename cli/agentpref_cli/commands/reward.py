"""`reward`: a model of how much better people would find one answer than another."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from agentpref_cli.terminal import BAD, BOLD, GOOD, WARN, moment, print_result, progress, say, table

if TYPE_CHECKING:
    from agentpref.evaluation.frontier import Frontier
    from agentpref.reward import RewardReport, Score, Shelf

NOT_KEPT = {"insufficient": 5, "refused": 4}

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command("fit", short_help="Fit it on all that people have said, and prove it.")
def fit(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="`tiny`, a folder of safetensors, or a hub's name.")
    ],
    home: options.Home = None,
    namespace: options.Namespace = "default",
    heads: Annotated[
        int,
        typer.Option(min=2, max=32, metavar="N", help="Each on another sample of the prompts."),
    ] = 5,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Settings of the updates, as TOML."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated."),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Fit the reward model of a namespace on everything that people, and trusted judges, said.

    It reads the features of a frozen base, which are kept, so a fit takes seconds and costs what is
    new. It is made anew each time: it forgets nothing, and after `agentpref forget` nothing of what
    was forgotten is in it. Held-out prompts prove it.

    Exits 0 if it was kept, 5 if it is not shown to be right more often than a coin, 4 if it is
    proven worse than the one before, 1 if there is nothing to fit it on, 75 while an update or a
    removal runs.
    """
    from agentpref.config import UpdateConfig
    from agentpref.learn import process
    from agentpref.reward import fit_reward

    checked = UpdateConfig.from_mapping(options.read_settings(config, set_ or ()))
    with progress(quiet) as report:
        done = fit_reward(
            home,
            model=model,
            namespace=namespace,
            config=checked,
            heads=heads,
            progress=process.settling(report),
        )
    print_result(as_json, done.to_mapping(), lambda: _show(done))
    if done.verdict != "kept":
        raise typer.Exit(NOT_KEPT[done.verdict])


@app.command("list", short_help="List the reward models of a namespace.")
def list_(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """List the reward models that are kept, the newest last: that one counts."""
    from agentpref.home import Home
    from agentpref.reward import Shelf

    with options.reading(home, namespace) as connection:
        shelf = Shelf(Home.of(connection), namespace)
        found = [_listed(shelf, name) for name in shelf.names()]
    print_result(as_json, {"rewards": found}, lambda: _show_list(found))


def _listed(shelf: Shelf, name: str) -> dict[str, Any]:
    """What a model's fit reported, or what is wrong with its file."""
    from agentpref.errors import AgentprefError

    try:
        return {**shelf.read(name).about, "name": name}
    except AgentprefError as error:
        return {"name": name, "problem": str(error)}


@app.command("score", short_help="Score answers to a prompt.")
def score(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="JSON lines with `messages` (or `prompt`) and `answers` [default: standard "
            "input].",
            show_default=False,
        ),
    ] = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of `reward list` [default: the newest].", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Where its base is [default: as it was fitted with].",
            show_default=False,
        ),
    ] = None,
    length_controlled: Annotated[
        bool,
        typer.Option("--length-controlled", help="Leave out how scores go with length."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each prompt.")
    ] = False,
) -> None:
    """Score answers to prompts, each with how far the heads differ about it.

    Scores are in log-odds around their mean: σ of a difference is the probability that one answer
    is better. `lower` is a score less the variance over the heads, which best-of-N chooses by.
    """
    from agentpref.errors import RewardError
    from agentpref.reward import open_reward

    opened = open_reward(home, namespace=namespace, name=name, model=model)
    for number, (messages, answers, tools) in _asked(file):
        try:
            scores = opened.score(
                messages, answers, tools=tools, length_controlled=length_controlled
            )
        except RewardError as error:
            raise RewardError(f"line {number}: {error}") from error
        print_result(as_json, _plain(scores), lambda: _show_scores(answers, scores))  # noqa: B023
        sys.stdout.flush()


def _asked(file: Path | None) -> Iterator[tuple[int, tuple[list[Any], list[Any], list[Any]]]]:
    """The lines of a file, by number: messages, answers and tools."""
    lines = sys.stdin if file is None else file.open(encoding="utf-8")
    number = 0
    try:
        with lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _read(json.loads(line), number)
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"after line {number} it is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"line {number} is no JSON: {error}") from error


def _read(row: Any, number: int) -> tuple[list[Any], list[Any], list[Any]]:
    from agentpref.errors import InvalidMessage
    from agentpref.record.messages import check_shapes, check_tool_shapes

    given = row if isinstance(row, Mapping) else {}
    messages, answers = given.get("messages", given.get("prompt")), given.get("answers")
    tools = given.get("tools") or []
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    is_asked = isinstance(messages, list) and messages
    if not is_asked or not isinstance(answers, list) or not answers:
        raise typer.BadParameter(
            f"line {number} must have `messages` (or `prompt`) and a list `answers`"
        )
    said = [{"role": "assistant", "content": a} if isinstance(a, str) else a for a in answers]
    try:
        check_shapes(tuple(messages))
        check_shapes(tuple(said))
        check_tool_shapes(tuple(tools))
        json.dumps(row, ensure_ascii=False).encode()
    except (InvalidMessage, UnicodeEncodeError) as error:
        raise typer.BadParameter(f"line {number}: {error}") from error
    return messages, said, tools


@app.command("frontier", short_help="How far it can be followed before answers become worse.")
def frontier(
    revisions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REV]...", help="Shown beside [default: what serves].", show_default=False
        ),
    ] = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Where its base is [default: as it was fitted with].",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A judge that also scores [default: models of halves of what people said].",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=2, metavar="N", help="Held-out prompts to answer, at most.")
    ] = 40,
    samples: Annotated[
        int, typer.Option(min=2, max=256, metavar="N", help="Answers to each; the largest n.")
    ] = 16,
    temperature: Annotated[
        float, typer.Option(min=0.01, metavar="T", help="At which they are drawn.")
    ] = 0.8,
    answer_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of an answer, at most.")
    ] = 128,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Settings of the updates, as TOML."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw it, as .svg, .png or .pdf.", show_default=False),
    ] = None,
    concurrency: Concurrency = 8,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Show how far the reward model can be followed before answers become worse.

    The base answers held-out prompts many times. For each n: how often is the answer of n that the
    reward model likes best better than one answer, in its own eyes (proxy) and in those of another
    scorer (gold)? Where the two part, the reward model is mistaken about what it likes most. The
    other scorer is a judge; without one, models of halves of what people said choose and score in
    turn, which sees the errors of few and noisy labels, and not those that all of them share.

    What is found is kept: with gate.kl_budget=auto, updates go no further from the base.
    """
    from agentpref.config import UpdateConfig
    from agentpref.evaluation.overoptimisation import measure_frontier
    from agentpref.learn import process
    from agentpref_cli.page.frontier import draw, require_plots

    if plot is not None:
        require_plots(plot)
    with progress(quiet) as report:
        found = measure_frontier(
            home,
            answer=revisions_of(model),
            namespace=namespace,
            model=model,
            judge=judge,
            revisions=revisions or (),
            prompts=prompts,
            samples=samples,
            temperature=temperature,
            max_tokens=answer_tokens,
            config=UpdateConfig.from_mapping(options.read_settings(config, set_ or ())),
            asking=asking_of(concurrency, max_tokens, max_cost, None, process.settling(report)),
        )
    if plot is not None:
        draw(found, plot)
    print_result(as_json, found.to_mapping(), lambda: _show_frontier(found))


def _show_frontier(found: Frontier) -> None:
    say(
        f"{found.reward}, gold by {found.gold}: {found.prompts:,} prompts with {found.samples} "
        f"answers each, of {found.tokens:.0f} tokens in the mean",
        BOLD,
    )
    table(
        ("policy", "KL per answer", "proxy", "gold"),
        [
            (one.policy, f"{one.kl:.2f}", f"{one.proxy:.3f}", f"{one.gold:.3f}")
            for one in found.points
        ],
    )
    if found.turns:
        say(
            f"answers become worse beyond the best of {found.best_n}: draw no more, and "
            f"gate.kl_budget=auto is {found.kl_budget:.3f} nats a token",
            WARN,
        )
    else:
        say(
            f"up to the best of {found.best_n}, no answers are shown to become worse that it likes "
            "more; gate.kl_budget=auto is the default",
            GOOD,
        )
    for note in found.notes:
        say(note, WARN)
    if found.spending.asked or found.spending.known:
        show_spending(found.spending)


def _plain(scores: list[Score]) -> dict[str, Any]:
    best = max(range(len(scores)), key=lambda place: scores[place].lower)
    return {
        "scores": [one.mean for one in scores],
        "variances": [one.variance for one in scores],
        "lower": [one.lower for one in scores],
        "best": best,
    }


def _show_scores(answers: list[Any], scores: list[Score]) -> None:
    best = max(range(len(scores)), key=lambda place: scores[place].lower)
    rows = [
        (
            "best" if place == best else "", f"{one.mean:+.2f}", f"{one.variance:.2f}",
            f"{one.lower:+.2f}", str(answer.get("content"))[:60],
        )
        for place, (answer, one) in enumerate(zip(answers, scores, strict=True))
    ]  # fmt: skip
    table(("", "score", "variance", "lower", "answer"), rows)


def _show(done: RewardReport) -> None:
    own = done.quality
    said = f"{done.pairs:,} comparisons" + (f" and {done.thumbs:,} thumbs" if done.thumbs else "")
    if own.accuracy is None:
        right = "no pair is held out"
    else:
        right = (
            f"right about {own.right} of {own.pairs} held-out pairs "
            f"({own.accuracy.value:.2f}, {own.accuracy.low:.2f} to {own.accuracy.high:.2f})"
        )
    if done.verdict == "kept":
        say(f"{done.name} is fitted on {said}; {right}", GOOD)
    elif done.verdict == "insufficient":
        say(f"nothing is kept: fitted on {said}, {right}", WARN)
    else:
        say(f"refused: fitted on {said}, {right}", BAD)
    if done.before is not None and done.before.accuracy is not None:
        say(f"the one before is right about {done.before.right} of them")
    if own.calibration_error is not None:
        say(f"calibration error {own.calibration_error:.3f}, Brier {own.brier:.3f}")
    if own.longer is not None and own.shorter is not None:
        say(
            f"where the longer answer is better it is right in {own.longer.value:.2f}, where the "
            f"shorter one is in {own.shorter.value:.2f}"
        )
    table(
        ("tag", "held out", "right"),
        [(tag, n, f"{accuracy:.2f}") for tag, (n, accuracy) in own.strata.items()],
    )
    if done.left_out:
        reasons = (f"{why.replace('_', ' ')} {n}" for why, n in done.left_out.items())
        say(f"left out: {', '.join(reasons)}")
    for note in done.notes:
        say(note, WARN)


def _show_list(found: list[dict[str, Any]]) -> None:
    if not found:
        say("no reward model; `agentpref reward fit` fits one", WARN)
        return
    for one in found:
        if "problem" in one:
            say(one["problem"], BAD)
    table(
        ("name", "fitted", "base", "pairs", "thumbs", "held out", "right"),
        [
            (
                one["name"], moment(one["at"]), one["base"]["name"], one["pairs"], one["thumbs"],
                one["quality"]["pairs"], one["quality"]["right"],
            )
            for one in found
            if "problem" not in one
        ],
    )  # fmt: skip
