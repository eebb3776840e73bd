"""`judge`: models and rules that compare answers; how right they are; and letting them do it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.asking import (
    AnswerModel,
    Concurrency,
    MaxCost,
    MaxMinutes,
    MaxTokens,
    Recheck,
    asking_of,
    sampler,
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
    from agentpref.judging import Calibrating, JudgeRun, RevisionRun
    from agentpref.prefer.judges.calibration import Estimate, Reliability

app = typer.Typer(
    help="Let a model compare answers, and measure by people's comparisons how right it is.",
    no_args_is_help=True,
)

_Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The judge: judges/NAME.md in the home.")
]


@app.command("new", short_help="Write the commented template of a rubric.")
def new(
    name: _Name,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The model that judges.")
    ] = "gpt-4o-mini",
    base_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A server that speaks OpenAI's API.", show_default=False),
    ] = None,
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Write the commented template of a rubric to the home, to be edited."""
    from agentpref.home import Home
    from agentpref.prefer.judges import rubric

    place = Home.open(home)
    server = "" if base_url is None else f"base_url: {_quoted(base_url)}\n"
    text = rubric.TEMPLATE.format(model=_quoted(model), base_url=server)
    made = rubric.write(place, name, text)
    path = place.judges / f"{name}.md"
    say_next = f"edit it, then run `agentpref judge calibrate {name}`"
    value = {"judge": name, "file": str(path), "digest": made.digest}
    print_result(as_json, value, lambda: say(f"wrote {path}; {say_next}", GOOD))


@app.command("list", short_help="List the judges, and where each is trusted.")
def list_(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """List the judges of the home, and the strata in which each is trusted, with its noise."""
    from agentpref.errors import JudgeError
    from agentpref.home import Home
    from agentpref.judging.opened import rubric_of
    from agentpref.prefer.judges import rubric
    from agentpref.prefer.judges.calibration import calibrate as calibrate_by
    from agentpref.record.judges import Judges
    from agentpref.reward.judge import NAME as REWARD
    from agentpref.reward.judge import held_out_verdicts
    from agentpref.reward.kept import Shelf

    place = Home.open(home)
    with options.reading(home, namespace) as connection:
        known = Judges(connection)
        calibrated = known.calibrated(namespace)
        rows: list[dict[str, Any]] = []
        for name in rubric.names(place):
            try:
                found, digest = rubric_of(place, name)
            except JudgeError as error:
                rows.append({"judge": name, "wrong": str(error)})
                continue
            voter = known.find(name, digest)
            mine = None if voter is None else known.calibration(namespace, voter)
            rows.append(
                {
                    "judge": name,
                    "engine": found.engine,
                    "model": found.model or ", ".join(found.members) or None,
                    "calibrated": None if mine is None else mine.at,
                    "trusted": {} if mine is None else dict(mine.noise),
                    "changed": mine is None and name in calibrated,
                }
            )
    listed = {row["judge"] for row in rows}
    if REWARD not in listed and (kept := Shelf(place, namespace).names()):
        about = Shelf(place, namespace).read().about
        measured = calibrate_by([*held_out_verdicts(about)])
        noise = {tag: e for tag in measured.strata if (e := measured.noise(tag)) is not None}
        more = {"engine": "reward model", "model": kept[-1], "calibrated": about["at"]}
        rows.append({"judge": REWARD, **more, "changed": False, "trusted": noise})
        listed.add(REWARD)
    for name, (version, one) in calibrated.items():
        if name not in listed:
            engine = "in the app" if not version.rubric else "its rubric is gone"
            more = {"engine": engine, "model": None, "calibrated": one.at, "changed": False}
            rows.append({"judge": name, **more, "trusted": dict(one.noise)})
    print_result(as_json, {"judges": rows}, lambda: _show_list(rows))


@app.command("calibrate", short_help="Measure how right a judge is, by what people said.")
def calibrate(
    name: _Name,
    gold: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A file of preferences, as import reads it; - reads standard input "
            "[default: what people compared in the home].",
            show_default=False,
        ),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(
            metavar="TAG", help="The tag of a file's rows without one.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, metavar="N", help="So many comparisons by people at most.")
    ] = 200,
    concurrency: Concurrency = 8,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    max_minutes: MaxMinutes = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Put comparisons that people decided to a judge, and keep how right it is in each tag.

    What it says trains and proves in the tags in which it is shown to be better than a coin, with
    its measured noise, and nowhere else. NAME may also be the user id under which an app logs the
    verdicts of a judge of its own: then nothing is asked.

    Exits 4 if it is trusted nowhere.
    """
    from agentpref.judging import calibrate_judge

    with progress(quiet) as report:
        found = calibrate_judge(
            home,
            name,
            namespace=namespace,
            gold=sys.stdin.buffer if gold == "-" else gold,
            tag=tag,
            limit=limit,
            asking=asking_of(concurrency, max_tokens, max_cost, max_minutes, report),
        )
    print_result(as_json, found.to_mapping(), lambda: _show_calibration(found))
    if not found.trusted:
        raise typer.Exit(REFUSED)


@app.command("run", short_help="Let a judge compare answers that nobody compared.")
def run(
    name: _Name,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="So many pairs at most.", show_default=False),
    ] = None,
    answers: Annotated[
        int, typer.Option(min=2, max=16, metavar="N", help="Answers to one prompt, at most.")
    ] = 4,
    sample: Annotated[
        int,
        typer.Option(
            min=0, max=16, metavar="K", help="First draw K more answers from what serves."
        ),
    ] = 0,
    prompts: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --sample: to so many prompts.")
    ] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.01, metavar="T", help="With --sample: at which they are drawn.")
    ] = 0.8,
    model: AnswerModel = None,
    recheck: Recheck = 10,
    concurrency: Concurrency = 8,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    max_minutes: MaxMinutes = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Let a calibrated judge compare answers to the same prompts that nobody compared.

    Each pair is asked in both orders; a verdict that follows the order makes no pair, and is
    counted. Nothing is asked twice: the same command goes on where it was ended.
    """
    from agentpref.judging import judge_runs

    with (
        progress(quiet) as report,
        sampler(home, namespace, model) if sample else nullcontext() as generate,
    ):
        done = judge_runs(
            home,
            name,
            namespace=namespace,
            limit=limit,
            answers=answers,
            recheck=recheck,
            sample=sample,
            prompts=prompts,
            temperature=temperature,
            generate=generate,
            asking=asking_of(concurrency, max_tokens, max_cost, max_minutes, report),
        )
    print_result(as_json, done.to_mapping(), lambda: _show_run(done))


@app.command("revise", short_help="Let the model revise answers by what people said of them.")
def revise(
    name: _Name,
    by: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="What criticises the answers: people's `comments`, the judge's `principles`, or "
            "`both`.",
        ),
    ] = "comments",
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="Revise so many answers at most.")
    ] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="At which revisions are drawn.")
    ] = 0.7,
    answer_tokens: Annotated[
        int,
        typer.Option(
            min=1, max=4096, metavar="N", help="Of a revision, where the log has no limit."
        ),
    ] = 256,
    model: AnswerModel = None,
    recheck: Recheck = 10,
    concurrency: Concurrency = 8,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    max_minutes: MaxMinutes = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Let the model that serves write criticised answers again, and a calibrated judge compare.

    A comment that somebody left on an answer is the criticism; with `--by principles`, the model
    first criticises its answer by a principle of the judge. Where the judge prefers the revision in
    both orders, the next update learns from it. Nothing is revised twice by the same words.

    `--max-tokens`, `--max-cost` and `--max-minutes` limit the judge.
    """
    from agentpref.judging import revise
    from agentpref.judging.revising import BY

    if by not in BY:
        raise typer.BadParameter(f"{by!r} is none of {', '.join(BY)}", param_hint="--by")
    with (
        progress(quiet) as report,
        sampler(home, namespace, model) as generate,
    ):
        done = revise(
            home,
            name,
            namespace=namespace,
            generate=generate,
            source=by,
            limit=limit,
            temperature=temperature,
            max_tokens=answer_tokens,
            recheck=recheck,
            asking=asking_of(concurrency, max_tokens, max_cost, max_minutes, report),
        )
    print_result(as_json, done.to_mapping(), lambda: _show_revisions(done))


REFUSED = 4


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)  # a JSON text is one of YAML


def _show_list(rows: list[dict[str, Any]]) -> None:
    if not rows:
        say("no judges; `agentpref judge new NAME` writes a template")
    right = [row for row in rows if "wrong" not in row]
    shown = [
        (
            row["judge"],
            row["engine"],
            row["model"],
            "never" if row["calibrated"] is None else moment(row["calibrated"]),
            "calibrate it again: it was changed" if row["changed"] else _noises(row["trusted"]),
        )
        for row in right
    ]
    if right:
        table(("judge", "engine", "model", "calibrated", "trusted in, with noise"), shown)
    for row in rows:
        if "wrong" in row:
            say(row["wrong"], BAD)


def _noises(trusted: Mapping[str, float]) -> str:
    return ", ".join(f"{tag} {noise:.2f}" for tag, noise in trusted.items()) or "nothing"


def _show_calibration(found: Calibrating) -> None:
    say(f"{found.judge}: {found.gold}", BOLD)
    strata = found.calibration.strata
    rows = []
    for tag in sorted(strata):
        one = strata[tag]
        decided = one.right + one.wrong
        noise = found.trusted.get(tag)
        rows.append(
            (
                tag,
                one.n,
                f"{one.right} of {decided}",
                "-" if one.accuracy is None else f"{one.accuracy.value:.2f}",
                f"{one.lower:.2f}",
                one.ties,
                "-" if noise is None else f"{noise:.2f}",
                "trusted" if noise is not None else "not trusted",
            )
        )
    columns = ("tag", "gold", "right", "accuracy", "at least", "ties", "noise", "so")
    table(columns, rows, styles={"trusted": GOOD, "not trusted": WARN})
    for line in _biases(found.calibration.pooled):
        say(line)
    for tag, why in found.untrusted.items():
        say(f"makes no pairs in {tag}: {why}", WARN)
    for member, weight in found.weights.items():
        say(f"weight of {member}: {weight:.2f}")
    for line in _people(found.people):
        say(line)
    show_spending(found.spending)
    for note in found.notes:
        say(note)


def _biases(one: Reliability) -> Iterator[str]:
    """In words, what is wrong with a judge over all strata."""
    if one.consistency is not None:
        yield f"says the same in both orders: {_interval(one.consistency)}"
    if one.position_bias is not None:
        yield f"names the first answer beyond half of the time: {_interval(one.position_bias)}"
    if one.length_bias is not None and one.sensitivity and one.specificity:
        yield (
            f"right where the longer answer is better: {_interval(one.sensitivity)}; where the "
            f"shorter one is: {_interval(one.specificity)}"
        )
    if one.brier is not None:
        yield (
            f"its confidence is off by {one.calibration_error:.2f} in the mean (Brier score "
            f"{one.brier:.2f})"
        )


def _interval(one: Estimate) -> str:
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _people(people: Mapping[str, Any]) -> Iterator[str]:
    """In words, how far people agree: more cannot be asked of a judge."""
    if people.get("repeats"):
        yield (
            f"people who judged the same answers again said the same in "
            f"{people['self_agreement']:.2f} of {people['repeats']}"
        )
    if people.get("pairs"):
        alpha = people.get("alpha")
        yield (
            f"two people agree about the same answers in {people['agreement']:.2f} of "
            f"{people['pairs']}{'' if alpha is None else f' (Krippendorff α {alpha:.2f})'}"
        )


def _show_run(done: JudgeRun) -> None:
    from agentpref.judging.running import explain

    if done.sampled:
        say(f"drew {done.sampled:,} answers from what serves")
    if not done.questions:
        say(
            "there is nothing to compare: no prompt has two answers that nobody compared; "
            "--sample 2 draws second answers from what serves",
            WARN,
        )
        show_spending(done.spending)
        return
    say(
        f"{done.judge} decided {done.decided:,} of {done.asked:,} pairs of answers; "
        f"{done.ties:,} are ties, {done.position:,} of them because the verdict followed the order",
        GOOD if done.decided else WARN,
    )
    if done.steered:
        say(f"in {done.steered:,} the answer that won spoke to its judge, so it did not win", WARN)
    if done.principles:
        table(("principle", "decided"), [*done.principles.most_common()])
    if done.untrusted:
        say(
            f"{sum(done.untrusted.values()):,} pairs were not asked: {explain(done.untrusted)}",
            WARN,
        )
    if done.forgotten:
        say(f"{done.forgotten:,} of them were removed meanwhile; nothing of them is written")
    if done.waiting:
        say(f"{done.waiting:,} more pairs wait; the same command goes on")
    show_spending(done.spending)
    for note in done.notes:
        say(note)


def _show_revisions(done: RevisionRun) -> None:
    from agentpref.judging.running import explain

    if not done.criticisms:
        say("there is nothing to revise: no criticism is without a revision", WARN)
    counts = {
        "broke off": done.incomplete,
        "say the same again": done.unchanged,
        "are unusable": done.unusable,
    }
    told = "".join(f"; {count:,} {what}" for what, count in counts.items() if count)
    if done.revised:
        say(f"revised {done.revised:,} answers{told}")
    if done.asked:
        say(
            f"{done.judge} prefers {done.better:,} of {done.asked:,} revisions; {done.worse:,} are "
            f"worse; {done.ties:,} are ties, {done.position:,} of them because the verdict "
            "followed the order",
            GOOD if done.better else WARN,
        )
    left = {
        f"comments praise the answer: {done.praise:,}": done.praise,
        f"comments are on answers that broke off or call tools: {done.unfit:,}": done.unfit,
    }
    for line, count in left.items():
        if count:
            say(line)
    if done.untrusted:
        count = sum(done.untrusted.values())
        say(f"{count:,} comments were not followed: {explain(done.untrusted)}", WARN)
    if done.not_revised:
        say("more answers wait to be revised; the same command goes on")
    show_spending(done.spending)
    for note in done.notes:
        say(note)
