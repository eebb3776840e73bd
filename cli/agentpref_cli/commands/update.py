"""`update` and `report`: train on what was liked, and read what the gate said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.options import read_settings, reading
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

EXIT_CODES = {"promoted": 0, "nothing_new": 3, "refused": 4, "insufficient": 5}
COLOURS = {"promoted": GOOD, "nothing_new": BOLD, "refused": BAD, "insufficient": WARN}
OUTCOMES = {
    "promoted": "it is better, and serves now",
    "nothing_new": "nothing to learn from has come in since the last update",
    "refused": "a check failed; what served before still does",
    "insufficient": "too little evidence; what served before still does",
}
ROUTES = {
    "shared": "shared prompts",
    "plain, fused head": "prompts repeated",
    "plain": "prompts repeated, the model's own logits",
}
REASONS = {
    "too_long": "too long for max_length",
    "no_mismatch": "no other thumb to compare with",
    "thumbs_turned_off": "thumbs.weight is 0",
    "prompt_shortened": "its oldest turns do not fit",
    "foreign_token_ids": "logged tokens are not in the vocabulary",
    "ids_disagree": "logged tokens spell another text",
}
"""In plain words; other reasons are plain enough."""

_THUMBS = "_thumbs"


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
        typer.Option(metavar="M", help="Time for the whole update; training stops early for it."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Train on what is new; serve it if it is better.

    Ctrl-C and SIGTERM end it after the step at hand; the next update resumes there, as it does
    after a kill. A second Ctrl-C does not wait for the step.

    Exits 0 when the candidate was promoted, 3 when there is nothing new, 4 when it was refused, 5
    when the evidence does not suffice, 2 on bad usage, 1 on a failure, 130 and 143 on a signal.
    """
    from dataclasses import replace

    from agentpref.config import UpdateConfig
    from agentpref.learn import process, team
    from agentpref.pipeline import update as learn

    settings = UpdateConfig.from_mapping(read_settings(config, set_ or ()))
    if max_minutes is not None:
        settings = replace(settings, max_minutes=max_minutes)
    if team.shares():  # it needs torch to come together, and followers are told of no progress
        process.settle()
    with progress(as_json) as reporter:
        told = process.settling(reporter)
        made = learn(home, model=model, config=settings, namespace=namespace, progress=told)
    print_result(as_json, made.to_mapping(), lambda: _show(made.to_mapping()))
    raise typer.Exit(EXIT_CODES[made.verdict])


def report(
    update_id: Annotated[
        str | None, typer.Argument(metavar="UPDATE", help="Its id [default: that of the last one].")
    ] = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Show an update and the gate's verdict on it."""
    from agentpref.record.updates import Updates

    with reading(home) as connection:
        found = Updates(connection).report(namespace, update_id)
    print_result(as_json, found, lambda: _show(found))


def _show(report: Mapping[str, Any]) -> None:
    """Print a report: the verdict first, then what it rests on."""
    verdict = report["verdict"]
    say(f"{verdict.replace('_', ' ')}: {OUTCOMES[verdict]}", COLOURS[verdict])
    say(f"update {report['update_id']}, {moment(report['created_at'])}, {report['seconds']:.0f} s")
    if report["revision"]:
        say(f"revision {report['revision']}, from {report['parent'] or 'the base model'}")
    notes = report.get("notes", ())
    for line in (*_counts(report), *_training(report), *_not_as_logged(report), *notes):
        say(line)
    if report["accuracy"]:
        rows = [(tag, found["before"], found["after"]) for tag, found in report["accuracy"].items()]
        table(("held-out accuracy", "before", "after"), rows)
    if report["checks"]:
        show_checks(report["checks"])


def _counts(report: Mapping[str, Any]) -> Iterator[str]:
    """Say how many pairs there are of each kind, and thumbs where there are any."""
    counts = report["counts"]
    thumbs = {name[: -len(_THUMBS)]: n for name, n in counts.items() if name.endswith(_THUMBS)}
    pairs = {name: n for name, n in counts.items() if not name.endswith(_THUMBS)}
    for kind, found in (("pairs", pairs), ("thumbs", thumbs)):
        if found and (kind == "pairs" or any(found.values())):
            yield f"{kind}: " + ", ".join(f"{_plain(name)} {n}" for name, n in found.items())


def _training(report: Mapping[str, Any]) -> Iterator[str]:
    """Say how it was trained, and what was not as planned; older reports tell less."""
    training = report["training"]
    planned, resumed_at = training.get("planned_steps"), training.get("resumed_at")
    if resumed_at:
        yield (
            f"resumed at step {resumed_at} of {planned}; {_waiting(report['counts'])} that came in "
            "since wait for the next update"
        )
    if training:
        in_time = training.get("stopped") != "time"
        steps = f"{training['steps']}" if in_time else f"{training['steps']} of {planned}"
        yield (
            f"trained {steps} steps in {training['seconds']:.0f} s{_means(training)}"
            + ("" if in_time else ": the time was up")
        )


def _means(training: Mapping[str, Any]) -> str:
    """Say by what means the machine and the model let it be trained."""
    parts = [training.get("precision"), ROUTES.get(training.get("route", ""))]
    if training.get("tokens_per_pass"):
        parts.append(f"at most {training['tokens_per_pass']} tokens a pass")
    if training.get("recomputes_layers"):
        parts.append("layers recomputed to save memory")
    return "".join(f", {part}" for part in parts if part)


def _waiting(counts: Mapping[str, int]) -> str:
    thumbs = counts.get("waiting_thumbs", 0)
    return f"{counts.get('waiting', 0)} pairs" + (f" and {thumbs} thumbs" if thumbs else "")


def _not_as_logged(report: Mapping[str, Any]) -> Iterator[str]:
    """Count by reason the rows that were not used, or not as they were logged."""
    for name in ("left_out", "shortened", "retokenised"):
        for reason, count in report.get(name, {}).items():
            yield f"{_plain(name)}, {REASONS.get(reason, _plain(reason))}: {count}"


def _plain(name: str) -> str:
    return name.replace("_", " ")
