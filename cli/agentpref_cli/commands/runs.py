"""`runs` and `show`: find model calls, and see everything that is known of one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import BOLD, DIM, WARN, moment, one_line, print_result, say, table

if TYPE_CHECKING:
    import sqlite3

    from agentpref.prefer.lineage import Lineage
    from agentpref.types import Comparison, Message, Run

_SHOWN = 40


def runs(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    thread: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only of this conversation.", show_default=False),
    ] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="ID", help="Only of this task.", show_default=False)
    ] = None,
    tag: Annotated[
        str | None, typer.Option(metavar="TAG", help="Only with this tag.", show_default=False)
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Only of this user, by the id that your app logs.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Only with this in the answer, or in the last message of the prompt.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="How many to show.")] = 20,
    as_json: options.AsJson = False,
) -> None:
    """List model calls, newest first."""
    from agentpref.record.finding import Wanted, shortest
    from agentpref.record.store import Store

    with options.reading(home, namespace) as connection:
        users = None if user is None else _names(connection, user)
        wanted = Wanted(namespace, thread, trace, tag, users, text)
        found = [*Store(connection).newest_runs(wanted, limit + 1)]
        more, found = len(found) > limit, found[:limit]
        listed = [_listed(connection, run) for run in found]
        short = [shortest(connection, run.run_id) for run in found]
    value = {"runs": listed, "more": more}
    print_result(as_json, value, lambda: _show_runs(listed, short, more))


def _names(connection: sqlite3.Connection, user: str) -> tuple[str, ...]:
    """The names that the home may have given to a user."""
    from agentpref.home import Home
    from agentpref.record.ingest.pseudonyms import Pseudonyms
    from agentpref.record.keys import KeysLost, keys_problem

    keys = Home.of(connection).user_keys
    problem = keys_problem(connection)
    if problem is not None:
        raise KeysLost(f"{keys}: {problem}")
    name = user.encode(errors="replace").decode()  # a command line may hold any bytes
    return Pseudonyms.of(Home.of(connection)).names(name) if keys.exists() else ()


def _listed(connection: sqlite3.Connection, run: Run) -> dict[str, Any]:
    query = """SELECT (SELECT count(*) FROM feedback WHERE run_id = ?1)
        + (SELECT count(*) FROM comparison WHERE ?1 IN (run_a, run_b))"""
    (judgements,) = connection.execute(query, (run.run_id,)).fetchone()
    names = ("run_id", "namespace", "created_at", "thread_id", "trace_id", "user_id", "revision")
    return {
        **{name: getattr(run, name) for name in names},
        "tags": list(run.tags),
        "prompt": _text(run.prompt.messages[-1]),
        "answer": _text(run.output),
        "judgements": judgements,
    }


def _text(message: Message) -> str:
    """The text of a message; other parts by their type, and tool calls as JSON."""
    import orjson

    content = message.get("content") or ""
    if not isinstance(content, str):
        parts = [part if isinstance(part, Mapping) else {"text": part} for part in content]
        content = "\n".join(str(part.get("text", f"[{part.get('type')}]")) for part in parts)
    calls = message.get("tool_calls")
    return "\n".join(filter(None, (content, orjson.dumps(calls).decode() if calls else "")))


def _show_runs(listed: Sequence[Mapping[str, Any]], short: Sequence[str], more: bool) -> None:
    if not listed:
        return say("no such runs", WARN)
    names = short if sys.stdout.isatty() else [run["run_id"] for run in listed]
    rows = [
        (
            name,
            moment(run["created_at"]),
            run["thread_id"],
            one_line(run["prompt"], _SHOWN),
            one_line(run["answer"], _SHOWN),
            run["judgements"],
        )
        for name, run in zip(names, listed, strict=True)
    ]
    table(("run", "time", "thread", "prompt", "answer", "judged"), rows)
    if more and sys.stdout.isatty():
        say("there are more; see them with --limit", DIM)
    return None


def show(
    run_id: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Its id, or a beginning of it that is its own."),
    ],
    home: options.Home = None,
    held_out: options.HeldOut = None,
    as_json: options.AsJson = False,
) -> None:
    """Show a model call: its messages, what was said of it, and what learned from that.

    Lineage runs both ways: which revision answered, and which updates and revisions were trained on
    the judgements of the answer.
    """
    from agentpref.prefer.lineage import lineage
    from agentpref.record.finding import find_prefix, shortest
    from agentpref.record.store import Store

    with options.reading(home) as connection:
        name = find_prefix(connection, run_id)
        namespace = Store(connection).run(name).namespace
        share = options.held_out_share(connection, namespace, held_out)
        found = lineage(connection, name, held_out=share)
        others = {run_id for row in found.comparisons for run_id in (row.run_a, row.run_b)}
        short = {run_id: shortest(connection, run_id) for run_id in others}
    print_result(as_json, found.to_mapping(), lambda: _show_lineage(found, short))


def _show_lineage(found: Lineage, short: Mapping[str, str]) -> None:
    run = found.run
    say(f"run {run.run_id}, {moment(run.created_at)}", BOLD)
    about = {
        "namespace": run.namespace,
        "thread": run.thread_id,
        "trace": run.trace_id,
        "user": run.user_id,
        "tags": ", ".join(run.tags) or None,
        "model": run.model,
        "revision": run.revision,
        "made by update": found.made_by,
    }
    say(", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    for message in (*run.prompt.messages, run.output):
        say(f"\n[{message['role']}]", DIM)
        say(_text(message))
    say("")
    if found.feedback:
        rows = [
            (
                moment(row.created_at),
                row.key,
                row.score if row.score is not None else _value(row.correction, row.value),
                row.source,
                _brief(row.user_id),
                row.comment,
                found.left_out.get(row.feedback_id, "yes"),
            )
            for row in found.feedback
        ]
        _show_said(("time", "key", "said", "source", "user", "comment", "counts"), rows)
    if found.comparisons:
        compared = [
            (
                moment(row.created_at),
                _brief(other := _other(row, run.run_id), short[other]),
                _verdict(row, run.run_id),
                row.source,
                _brief(row.user_id),
                row.comment,
                found.left_out.get(row.comparison_id, "yes"),
            )
            for row in found.comparisons
        ]
        columns = ("time", "compared with", "verdict", "source", "user", "comment", "counts")
        _show_said(columns, compared)
    if not (found.feedback or found.comparisons):
        say("nobody has judged it; to judge it, use agentpref thumbs")
    if found.examples:
        made = [
            (
                _brief(one.example_id),
                one.origin,
                found.side(one),
                "held out" if one.held_out else "train",
            )
            for one in found.examples
        ]
        table(("example", "made of", "this answer", "split"), made)
    if found.uses:
        used = [
            (
                use.update_id,
                moment(use.created_at),
                use.verdict,
                ", ".join(sorted({*use.roles.values()})),
                use.revision,
            )
            for use in found.uses
        ]
        table(("update", "time", "verdict", "used as", "revision"), used)
    if found.learned:
        say(f"revisions that learned from it: {', '.join(found.learned)}")


def _show_said(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print judgements; a terminal has no room for columns in which nothing was said."""
    kept = [
        index
        for index in range(len(columns))
        if not sys.stdout.isatty() or any(row[index] is not None for row in rows)
    ]
    table([columns[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _brief(text: str | None, short: str | None = None) -> str | None:
    """The beginning of an id on a terminal, which has little room; all of it elsewhere."""
    if text is None or not sys.stdout.isatty():
        return text
    return short or text[:8]


def _other(row: Comparison, run_id: str) -> str:
    """The run that a run is compared with."""
    return row.run_b if row.run_a == run_id else row.run_a


def _value(correction: Message | None, value: Any) -> str | None:
    if correction is not None:
        return _text(correction)
    return None if value is None else str(value)


def _verdict(row: Comparison, run_id: str) -> str:
    """What a comparison says of a run."""
    if row.winner == "tie":
        return "tie"
    return "better" if (row.run_a if row.winner == "a" else row.run_b) == run_id else "worse"
