"""`update`: train on the new preferences, and show the gate's verdict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import notify as notices
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
    show_checks,
    table,
)

if TYPE_CHECKING:
    from agentpref.types import Answered, UpdateReport

VERDICTS = {
    "promoted": (0, GOOD, "every check passed"),
    "passed": (0, WARN, "every check passed; published, and not made live"),
    "nothing_new": (3, BOLD, "no new feedback to learn from since the last update"),
    "nothing_to_gain": (3, BOLD, "what serves is right about the new feedback already"),
    "nothing_usable": (6, WARN, "none of the new feedback can be trained; the report says why"),
    "refused": (4, BAD, "a check failed; nothing was published"),
    "cut_short": (7, BAD, "max_minutes stopped the training, and a check failed"),
    "insufficient": (5, WARN, "too little evidence; published, and not promoted"),
    "failed": (1, BAD, "an error ended it; nothing was changed"),
    "interrupted": (130, WARN, "it was ended before its end; nothing was changed"),
    "busy": (75, WARN, "another update of the home, or a removal from it, was running"),
    "running": (0, BOLD, "it has not ended, or its process was killed just now"),
}
"""The exit code of each verdict, its colour, and what it means.

An update with one of the last four printed an error, or has printed nothing yet.
"""

ADOPTED = {
    "nothing_new": "there is no example to prove the adapter by",
    "nothing_usable": "no example can be evaluated; the report says why",
}
"""What a verdict on an adapter that was trained elsewhere means, where that is something else."""

ROUTES = {
    "shared": "shared prompts",
    "plain, fused head": "prompts repeated",
    "plain": "prompts repeated, the model's own logits",
    "plain, unmixed": "prompts repeated, the model's own logits, no float32 between products",
}
REASONS = {
    "too_long": "too long for max_length",
    "no_mismatch": "no other thumb to compare with",
    "thumbs_turned_off": "thumbs.weight is 0",
    "undeclared_key": "scores under keys that agentpref keys declare has not declared",
    "prompt_shortened": "its oldest turns do not fit",
    "foreign_token_ids": "logged tokens are not in the vocabulary",
    "ids_disagree": "logged tokens spell another text",
}
"""Reasons in plain words; others are printed as they are named."""

SERVES, CANARY, NEVER = "now serving", "now the canary", "never served"
NICE = 1
"""How far an update lowers its priority. Beside two busy processes, 2 took it about half as long
again as 1, in a few noisy runs (docs/training.md)."""

_CROWDED = 0.1  # the share of waiting from which on a report names it
_THUMBS, _DECISIONS = "_thumbs", "_decisions"
_SHOWN, _WIDTH = 3, 200  # answers that a report prints, and characters of each


def update(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="`tiny`, a folder of safetensors, or a hub's name.")
    ],
    home: options.Home = None,
    namespace: options.Namespace = "default",
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Settings, as TOML."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="One setting, e.g. loss.beta=0.2; may be repeated."
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="Time for the whole update; what does not fit waits."),
    ] = None,
    arm: Annotated[
        str | None,
        typer.Option(
            metavar="ARM",
            help="What to learn: an `adapter`; instructions (`prompt`); or an adapter, with a word "
            "on whether instructions do as well (`both`) [default: adapter].",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="With --arm prompt: a rule of your own to prove; may be repeated."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Learn from what whole conversations earned: iql, awr, cql, bcq, mopo, combo, "
            "airl, filtered-bc or trajectory-dpo [default: preferences].",
            show_default=False,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=WEIGHT]",
            help="With --method: a key of feedback whose scores are rewards; can be repeated "
            "[default: thumbs].",
            show_default=False,
        ),
    ] = None,
    no_promote: Annotated[
        bool, typer.Option("--no-promote", help="Leave what serves as it is; only publish.")
    ] = False,
    canary: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Let what passes serve a share of the threads, e.g. 0.1, instead of promoting it.",
            show_default=False,
        ),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Repeat the last update although nothing is new.")
    ] = False,
    nice: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=19,
            help="How far to lower the priority: others get the cores first; 0 does not.",
        ),
    ] = NICE,
    notify: notices.Notify = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Train on a Ray cluster: auto, host:port, or local to start Ray here.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Workers of --ray [default: 1].", show_default=False),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Train on new preferences, and serve the result if it is better.

    It is made live if that is proven, and tried on a tenth of the threads (gate.canary) if it is
    likely. What people rolled back or put into quarantine is not promoted again, and nothing is
    while `adapters hold` stands. --again repeats an update that was refused, cut short,
    insufficient or rolled back. `agentpref updates` lists what came of every update.

    Ctrl-C and SIGTERM end the update after the current step, and the next update resumes there, as
    it does after a crash. A second Ctrl-C ends it at once.

    Exits 0 if the candidate passed (and was promoted, if that was wanted), 3 if nothing is new or
    nothing is left to gain, 4 if the candidate was refused, 5 if there is too little evidence, 6 if
    none of the new feedback can be trained, 7 if the time was up and a check failed, 2 on bad
    usage, 1 on a failure, 75 while another update or a removal runs, 130 or 143 on a signal.
    """
    from agentpref.config import UpdateConfig
    from agentpref.errors import ConfigError
    from agentpref.home import Home
    from agentpref.learn import process, team
    from agentpref.pipeline import update as update_here

    settings = options.read_settings(config, set_ or ())
    if max_minutes is not None:
        settings["max_minutes"] = max_minutes
    if arm is not None:
        settings["arm"] = arm
    if rule:
        settings["rules"] = rule
    if method is not None:
        settings["method"] = method
    if reward:
        if "rewards" in settings.setdefault("offline", {}):
            raise ConfigError("--reward and offline.rewards are both given; leave one of them out")
        settings["offline"]["rewards"] = options.parse_rewards(reward)
    checked = UpdateConfig.from_mapping(settings)
    process.give_way(nice)
    run_update: Callable[..., UpdateReport] = update_here
    if ray is not None:
        from agentpref_adapters.ray import update as update_on_ray

        run_update = partial(update_on_ray, address=ray, workers=1 if workers is None else workers)
    elif workers is not None:
        raise ConfigError("--workers needs --ray, which says where they are")
    if team.shares():  # several processes need torch to connect, and followers get no progress
        process.settle()
    told = None if team.follows() else notify  # of several processes one tells
    # Ray prints what it has to say on standard output, which is the report's.
    prints = sys.stdout if ray is None else sys.stderr
    with notices.Notifier(told, Home.resolve(home), namespace) as notifier:
        with progress(quiet) as show_progress, redirect_stdout(prints):
            shown = process.settling(show_progress) if ray is None else show_progress
            done = run_update(
                home,
                model=model,
                config=checked,
                namespace=namespace,
                progress=shown,
                promote=not no_promote,
                canary=canary,
                again=again,
            )
        value, serving = show_end(done, home, as_json)
    notifier.report(value, serving)
    raise typer.Exit(VERDICTS[done.verdict][0])


def show_end(done: UpdateReport, home: Path | None, as_json: bool) -> tuple[dict[str, Any], str]:
    """Print how an update or an adoption ended; return that, and whether its revision serves."""
    from agentpref.home import Home
    from agentpref.serve.registry import Registry

    value = done.to_mapping()
    value["answers"] = plain_answers(Home.open(home).answers(done.update_id))
    canaries = (Registry(home, namespace=done.namespace).state().canary,) if done.revision else ()
    serving = SERVES if done.verdict == "promoted" else NEVER
    serving = CANARY if done.revision in canaries else serving
    print_result(as_json, value, lambda: show_report(value, serving))
    return value, serving


def plain_answers(answers: Sequence[Answered]) -> list[dict[str, Any]]:
    """Answers before and after as plain values."""
    return [
        {"prompt": one.prompt.messages, "before": one.before, "after": one.after} for one in answers
    ]


def show_report(report: Mapping[str, Any], serving: str) -> None:
    """Print a report: the verdict, how it was trained, accuracy, and the checks.

    ``serving`` says whether its revision serves.
    """
    say(headline(report, serving), VERDICTS[report["verdict"]][1])
    for line in (*identity(report, serving), *account(report), *report.get("notes", ())):
        say(line)
    if report["accuracy"]:
        rows = [{"held-out accuracy": tag, **found} for tag, found in report["accuracy"].items()]
        table(("held-out accuracy", "before", "after"), rows)
    if report["checks"]:
        show_checks(report["checks"])
    _show_answers(report.get("answers", ()))


def _show_answers(answers: Sequence[Mapping[str, Any]]) -> None:
    """Print some held-out prompts with the answers before and after, chosen at random."""
    if not answers:
        return
    say("")
    say(f"before and after, {min(_SHOWN, len(answers))} held-out prompts chosen at random:", BOLD)
    for one in answers[:_SHOWN]:
        said = one["prompt"][-1].get("content")
        for name, text in (("prompt", said), ("before", one["before"]), ("after", one["after"])):
            line = (" ".join(text.split()) or "(empty)") if isinstance(text, str) else ""
            say(f"{name:<7} {line[:_WIDTH]}{'…' if len(line) > _WIDTH else ''}")


def headline(report: Mapping[str, Any], serving: str) -> str:
    """The verdict and what it means, in one line."""
    verdict = report["verdict"]
    meaning = _meaning(verdict, report["accuracy"])
    if "adopted" in report["training"]:
        meaning = ADOPTED.get(verdict, meaning)
    if verdict == "promoted" or serving == CANARY:
        meaning = f"{meaning}; {serving}"
    return f"{verdict.replace('_', ' ')}: {meaning}"


def identity(report: Mapping[str, Any], serving: str) -> Iterator[str]:
    """Which update it was and when, and which revision it made."""
    seconds = report["seconds"]
    took = "" if seconds is None else f", {seconds:.0f} s"
    yield f"update {report['update_id']}, {moment(report['created_at'])}{took}"
    if report.get("times", 1) > 1:
        yield f"the last of {report['times']:,} that ended so, since {moment(report['first_at'])}"
    if report["revision"]:
        now = f"; {serving}" if report["verdict"] != "promoted" and serving != NEVER else ""
        yield f"revision {report['revision']}, from {report['parent'] or 'the base model'}{now}"


def account(report: Mapping[str, Any]) -> Iterator[str]:
    """What became of the examples, and how the candidate was trained."""
    yield from (*_counts(report), *_training(report), *_not_as_logged(report))


def _meaning(verdict: str, accuracy: Mapping[str, Mapping[str, float]]) -> str:
    """What a verdict means; of a candidate that passed, the accuracy on all held-out examples."""
    total = sum(found["pairs"] for found in accuracy.values())
    if verdict not in ("promoted", "passed") or not total:
        return VERDICTS[verdict][2]
    shares = (
        sum(found["pairs"] * found[when] for found in accuracy.values()) / total
        for when in ("before", "after")
    )
    before, after = (f"{share:.2f}".lstrip("0") for share in shares)
    live = "" if verdict == "promoted" else "; published, and not made live"
    return f"held-out accuracy {before} -> {after}{live}"


def _counts(report: Mapping[str, Any]) -> Iterator[str]:
    """The number of pairs of each kind, and of thumbs if there are any."""
    counts = report["counts"].items()
    made = {n.removesuffix(_DECISIONS): c for n, c in counts if n.endswith(_DECISIONS)}
    pairs = [
        f"{_plain(name)} {n}"
        for name, n in counts
        if not name.endswith((_THUMBS, _DECISIONS)) and (n or name not in made)
    ]
    thumbs = {name.removesuffix(_THUMBS): n for name, n in counts if name.endswith(_THUMBS)}
    if pairs:
        yield f"pairs: {', '.join(pairs)}"
    if any(thumbs.values()):
        yield "thumbs: " + ", ".join(f"{_plain(name)} {n}" for name, n in thumbs.items())
    if made:
        yield "decisions: " + ", ".join(f"{_plain(name)} {n}" for name, n in made.items())


def _training(report: Mapping[str, Any]) -> Iterator[str]:
    """How the candidate was trained. Reports of older versions have fewer of these fields."""
    from agentpref.types import INSTRUCTED

    training, counts = report["training"], report["counts"]
    if not training:
        return
    if training.get("start") == INSTRUCTED:
        yield f"nothing was trained; {_instructions(training)}"
        return
    if adopted := training.get("adopted"):
        name, digest = adopted["folder"], adopted["sha256"]
        yield f"adopted from {name} (sha256 {digest[:12]} of its weights); nothing was trained here"
        return
    if method := training.get("method"):
        done = f"{training['imitated']:,} of {training['valued']:,} decisions are imitated"
        if training.get("pairs") is not None:
            done = f"{training['imitated']:,} pairs of conversations are compared"
        yield (
            f"{method}: {done}, "
            f"of {training['conversations']:,} conversations; {training['held_out']:,} more are "
            "held out"
        )
    planned, resumed_at = training.get("planned_steps"), training.get("resumed_at")
    if resumed_at:
        waiting = f"{counts.get('waiting', 0)} pairs"
        if thumbs := counts.get("waiting_thumbs", 0):
            waiting += f" and {thumbs} thumbs"
        yield f"resumed at step {resumed_at} of {planned}; {waiting} wait for the next update"
    out_of_time = training.get("stopped") == "time"
    steps = f"{training['steps']} of {planned}" if out_of_time else training["steps"]
    tokens = training.get("tokens_per_pass")
    parts = (
        f"trained {steps} steps in {training['seconds']:.0f} s",
        training.get("precision"),
        ROUTES.get(training.get("route", "")),
        f"at most {tokens} tokens a pass" if tokens else None,
        "layers recomputed to save memory" if training.get("recomputes_layers") else None,
    )
    yield ", ".join(filter(None, parts)) + (": the time was up" if out_of_time else "")
    if training.get("first_lesson") is not None:
        before, after = training["first_lesson"], training["last_lesson"]
        taught = counts.get("taught", 0)
        yield (
            f"taught by {taught} comment{'s' * (taught != 1)}: KL from live, told what they say, "
            f"{before:.2g} -> {after:.2g} nats a token"
        )
    if (waited := training.get("waited", 0)) >= _CROWDED:
        whose = f"its {training['threads']} threads" if training["threads"] > 1 else "it"
        yield f"other work had the cores: {whose} waited {waited:.0%} of the time for one"
    yield from _route(training)


def _instructions(training: Mapping[str, Any]) -> str:
    """What the candidate of a prompt arm is told, and how its rules were chosen."""
    told = " ".join(" ".join(training["rules"]).split()) or "nothing more"
    if not training["tried"]:
        return f"told: {told}"
    found = f"{training['better']} of {training['pairs']} pairs better, {training['worse']} worse"
    return f"told: {told} ({found}; rules were tried {training['tried']} times)"


def _route(training: Mapping[str, Any]) -> Iterator[str]:
    """Why this layout of rows was chosen: the errors that were measured, and what spoke against."""
    route, errors = training.get("route"), training.get("route_errors", {})
    if errors:
        chosen_first = sorted(errors, key=lambda name: name != route)
        found = (f"{ROUTES[name]} {errors[name]:.2g}".replace(" 0.", " .") for name in chosen_first)
        yield f"rounding in nats a token: {'; '.join(found)}"
    if route != "shared" and training.get("route_reason"):
        yield f"prompts are not shared: {training['route_reason']}"


def _not_as_logged(report: Mapping[str, Any]) -> Iterator[str]:
    """Count, by reason, the rows that were left out or changed."""
    for name in ("left_out", "shortened", "retokenized"):
        for reason, count in report.get(name, {}).items():
            yield f"{_plain(name)}, {REASONS.get(reason, _plain(reason))}: {count}"


def _plain(name: str) -> str:
    return name.replace("_", " ")
