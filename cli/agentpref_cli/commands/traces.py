"""`traces`: conversations as decisions with rewards."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import WARN, facts, print_result, say, table

if TYPE_CHECKING:
    from agentpref.traces import Trace, Traces

_ODD = {
    "forks": "answers were asked for again, so that a conversation has several ends",
    "split": "conversations begin with what another one says: give all runs of one the same "
    "thread_id",
    "unconnected": "runs share a trace or thread and do not follow one another",
}


def traces(
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=WEIGHT]",
            help="A key of feedback whose scores are rewards; can be repeated [default: thumbs].",
            show_default=False,
        ),
    ] = None,
    cost: Annotated[
        float, typer.Option(metavar="X", help="What each step costs; a clarifying question, say.")
    ] = 0.0,
    tool_error: Annotated[
        float, typer.Option(metavar="X", help="What a step costs whose tool failed.")
    ] = 0.0,
    gamma: Annotated[
        float, typer.Option(metavar="G", help="The discount of each later step, at most 1.")
    ] = 1.0,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Only conversations that went on since: an age such as 30d, or a date.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="So many at most, the newest.", show_default=False),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show returns and coverage instead of the traces.")
    ] = False,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Read conversations as decisions: what the agent saw, said and earned, step by step.

    Without --stats, each conversation is one line of JSON on standard output, for other programs.
    Runs of one trace, or else of one thread, are its steps, where each begins with what came
    before. What users and tools said is state, and never an action.
    """
    import orjson

    from agentpref.traces import RewardSpec, read_traces
    from agentpref.types import THUMBS

    begin = None if since is None else options.parse_since(since, time.time(), "--since")
    keys = options.parse_rewards(reward) or {THUMBS: 1.0}
    spec = RewardSpec(keys, cost, tool_error, gamma)
    found = read_traces(home, spec, namespace=namespace, since=begin, limit=limit)
    if stats:
        print_result(as_json, found.stats(), lambda: _show(found))
        return
    for one in found.traces:
        sys.stdout.write(orjson.dumps(_plain(one, gamma)).decode() + "\n")


def _plain(trace: Trace, gamma: float) -> dict[str, Any]:
    return {
        "trace": trace.id,
        "return": trace.value(gamma),
        "steps": [
            {
                "run": step.run.run_id,
                "state": [*step.state],
                "action": step.action,
                "reward": step.reward,
                "done": step.done,
                "logp": step.logp,
                "revision": step.run.revision,
            }
            for step in trace.steps
        ],
    }


def _show(found: Traces) -> None:
    value = found.stats()
    shown = {
        "conversations": f"{value['traces']:,}, with {value['steps']:,} steps; the longest has "
        f"{value['longest']}",
        "with a reward": f"{value['with_reward']:,} conversations",
        "with log-probabilities": f"{value['with_logprobs']:,} steps",
    }
    if value["returns"] is not None:
        shown["returns"] = ", ".join(f"{k} {v:.3g}" for k, v in value["returns"].items())
    facts(shown)
    if value["revisions"]:
        table(("revision", "steps"), [*value["revisions"].items()])
    if value["traces"] and not value["with_reward"]:
        keys = ", ".join(found.spec.keys)
        say(f"no conversation has a score under {keys}: every return is 0 less costs", WARN)
    for name, count in value["odd"].items():
        if count:
            say(f"{count:,} {_ODD[name]}")
