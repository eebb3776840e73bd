"""`online`: what serves answers, a judge compares, and what that teaches goes through the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentpref_cli import options
from agentpref_cli.asking import Concurrency, MaxCost, MaxTokens, asking_of, show_spending
from agentpref_cli.terminal import BAD, BOLD, GOOD, WARN, print_result, progress, say, table

if TYPE_CHECKING:
    from agentpref.online import OnlineReport, Round
    from agentpref.online.report import Train

REFUSED = 4
BAD_ENDS = ("judges_disagree", "people_disagree")
_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def online(
    context: typer.Context,
    judge: Annotated[
        str, typer.Option(metavar="NAME", help="A calibrated judge of the home, or a rule.")
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="`tiny`, a folder of safetensors, or a hub's name.")
    ],
    check: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A second judge, which trains nothing and sees the first one being deceived.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="So many at most.")] = 3,
    prompts: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts of the log to train on in a round.")
    ] = 64,
    samples: Annotated[
        int, typer.Option(min=2, max=16, metavar="K", help="Answers to each, compared in pairs.")
    ] = 2,
    temperature: Annotated[
        float, typer.Option(min=0.01, metavar="T", help="At which they are drawn.")
    ] = 0.9,
    answer_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of an answer, at most.")
    ] = 256,
    probes: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Held-out prompts to compare with the base on."),
    ] = 48,
    method: Annotated[
        Literal["dpo", "grpo", "rloo"],
        typer.Option(help="Learn from pairs, or by TRL's reinforcement with the judge's wins."),
    ] = "dpo",
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="With grpo and rloo: steps in a round.")
    ] = 50,
    no_offline: Annotated[
        bool, typer.Option("--no-offline", help="Do not learn from what is logged first.")
    ] = False,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Settings of the updates, as TOML; a table [online] has those of this command. "
            "What is typed counts first.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated."),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, metavar="M", help="Begin no round after so long.", show_default=False),
    ] = None,
    concurrency: Concurrency = 8,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Let what serves learn from what a judge says of its own answers, round after round.

    Each round draws answers from live to prompts of the log, lets the judge compare them in both
    orders, and is one update, which the gate decides on. Held-out prompts prove, and never train.
    It ends by itself when the judged win rate over the base no longer rises, when two rounds bring
    nothing, when the KL budget is spent, or when an update loses what people said themselves. With
    --check it also ends when a second judge no longer
    agrees: then what the round brought is rolled back, and the report has the words that the first
    judge rewards.

    Exits 4 if the judges part, or if people contradict the judge, else 0.
    """
    from agentpref.config import UpdateConfig
    from agentpref.learn import process
    from agentpref.online import run_online
    from agentpref_adapters.transformers import TransformersBackend

    settings = options.read_settings(config, set_ or ())
    own: dict[str, Any] = {
        "judge": judge, "check": check, "rounds": rounds, "prompts": prompts, "samples": samples,
        "temperature": temperature, "max_tokens": answer_tokens, "probes": probes,
        "offline": not no_offline,
    }  # fmt: skip
    table_of_it = _own(settings.pop("online", {}), own)
    option_of = {"max_tokens": "answer_tokens", "offline": "no_offline"}
    typed = {
        name
        for name in own
        if str(context.get_parameter_source(option_of.get(name, name))).endswith("COMMANDLINE")
    }
    own |= {name: value for name, value in table_of_it.items() if name not in typed}
    checked = UpdateConfig.from_mapping(settings)
    train: Train | None = None
    if method != "dpo":
        from agentpref_adapters.trl import train_online

        train = partial(_reinforce, train_online, model, method, steps, checked.seed)
    with progress(quiet) as report:
        shown = process.settling(report)
        done = run_online(
            home,
            model=model,
            backend=TransformersBackend(model),
            namespace=namespace,
            config=checked,
            max_minutes=max_minutes,
            train=train,
            asking=asking_of(concurrency, max_tokens, max_cost, None, None),
            progress=shown,
            heard=None if as_json else _say_round,
            **own,
        )
    print_result(as_json, done.to_mapping(), lambda: _show(done))
    if done.ended in BAD_ENDS:
        raise typer.Exit(REFUSED)


def _own(given: Any, known: dict[str, Any]) -> dict[str, Any]:
    """The settings of a table [online], checked by name and kind."""
    from agentpref.errors import ConfigError
    from agentpref.plugins import suggest

    if not isinstance(given, dict):
        raise ConfigError(f"online is {given!r}, but must be a table of settings")
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"online.{name} is no setting; {suggest(name, known)}")
        kind = str if name in ("judge", "check") else type(known[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"online.{name} is {value!r}, but must be {_KINDS[kind]}")
    return given


def _reinforce(
    train_online: Callable[..., Any],
    model: str,
    method: str,
    steps: int,
    seed: int,
    folder: Path,
    start: Path | None,
    prompts: Sequence[Any],
    reward: Any,
) -> Path:
    """One round of TRL's trainer."""
    trained = train_online(
        folder / "adapter",
        model=model,
        start=start,
        prompts=prompts,
        reward=reward,
        method=method,
        steps=steps,
        seed=seed,
    )
    folder_of_it: Path = trained.folder
    return folder_of_it


def _say_round(one: Round) -> None:
    rate = "" if one.win_rate is None else f", win rate over base {one.win_rate:.2f}"
    if one.win_rate_interval is not None:
        low, high = one.win_rate_interval
        rate += f" [{low:.2f}, {high:.2f}]"
    if one.agreement is not None:
        rate += f", judges agree in {one.agreement:.2f}"
    say(
        f"round {one.number}: {one.decided} of {one.decided + one.ties} pairs decided, "
        f"{one.verdict}{rate}, {one.seconds:.0f} s",
        GOOD if one.revision else WARN,
    )


def _show(done: OnlineReport) -> None:
    ends = {
        "rounds": "all rounds are done",
        "time": "the time is over",
        "no_rise": "it no longer gets better",
        "nothing_promoted": "nothing better was found",
        "kl_budget": "the KL budget is spent: the next update refits from base",
        "judges_disagree": "the judges part: live has learned to please its judge",
        "people_disagree": "what the judge teaches loses what people said",
        "judge_spent": "the judge's budget is spent",
    }
    bad = done.ended in BAD_ENDS
    because = f" ({done.because})" if done.because else ""
    say(f"ended: {ends[done.ended]}{because}", BAD if bad else BOLD)
    if done.offline is not None:
        say(f"learned first from what was logged: {done.offline.replace('_', ' ')}")
    rows = [
        (r.number, r.verdict, r.revision, r.kl, r.win_rate, r.check_rate, r.agreement)
        for r in done.rounds
    ]
    table(("round", "update", "now serving", "KL", "win rate", "by the check", "agree"), rows)
    show_spending(done.spending)
    show_spending(done.check_spending)
    say(f"served before: {done.start}; serves now: {done.live}")
    for note in done.notes:
        say(note, WARN if bad else "")
