"""`report`: show one update whole, in the terminal, as a page or as a mail; or all of some time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.commands.update import CANARY, NEVER, SERVES, plain_answers, show_report
from agentpref_cli.terminal import BOLD, GOOD, moment, print_result, say, table

if TYPE_CHECKING:
    from agentpref.record.journal import Entry

TRIED = {
    "learned from": ("trained", "held_out"),
    "tried and set aside": ("set_aside",),
    "right about already": ("known",),
}
"""What became of the new feedback that an update tried, in words, by the counts that say so."""

_STANDARD = Path("-")
_TO_THE_DAY = 10


def report(
    update_id: Annotated[
        str | None,
        typer.Argument(
            metavar="ID",
            help="The id of an update or a revision, or its beginning [default: the last update].",
        ),
    ] = None,
    home: options.Home = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which of the home's namespaces [default: `default`; with an ID or --since, all].",
            show_default=False,
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="All updates since: an age such as 1d, or a date.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a page that needs nothing else; - is standard output.",
            show_default=False,
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, as for a mail.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show an update and the gate's verdict on it, and whether its revision serves today.

    Without an ID this is the last one, also if it failed or found nothing new; the last one that
    trained something follows. `--html FILE` writes a page. `--since 1d --markdown` is a morning
    mail: its first line says what happened.
    """
    _refuse_idle(update_id, since, html, markdown, as_json)
    if since is not None:
        return _show_since(home, namespace, since, markdown, as_json)
    value = _one(home, update_id, namespace)
    told = value.get("last_trained", value)
    if html is not None:
        _write_page(html, value, as_json)
    elif markdown:
        from agentpref_cli.page import mail

        print("\n".join(mail.one(value, _today(value["serving"]))))
    else:
        print_result(as_json, value, lambda: _show(value, told))
    return None


def _refuse_idle(
    update_id: str | None, since: str | None, html: Path | None, markdown: bool, as_json: bool
) -> None:
    """Refuse options that would have no effect."""
    if since is not None and (update_id is not None or html is not None):
        other = "an ID" if update_id is not None else "--html"
        raise typer.BadParameter(
            f"it shows all updates of a time, and {other} one", param_hint="--since"
        )
    if markdown and (as_json or html is not None):
        other = "--json" if as_json else "--html"
        raise typer.BadParameter(f"choose this or {other}", param_hint="--markdown")
    if html == _STANDARD and as_json:
        raise typer.BadParameter(
            "--json needs a FILE: the page goes to standard output", param_hint="--html"
        )


def _one(home: Path | None, update_id: str | None, namespace: str | None) -> dict[str, Any]:
    """An update's report with what its revision does today, and what a reader wants beside it."""
    from agentpref.errors import UpdateError
    from agentpref.home import Home
    from agentpref.overview import overview
    from agentpref.record import journal

    trained = None
    wanted = "default" if update_id is None and namespace is None else namespace
    with options.reading(home, wanted) as connection:
        if update_id is not None:
            found = journal.find(connection, update_id, namespace)
        else:
            newest = journal.listed(connection, namespace or "default", limit=1)
            if not newest:
                raise UpdateError(
                    f"namespace {namespace or 'default'!r} has no update yet; run 'agentpref "
                    "update' first"
                )
            found = newest[0]
            if not found.report.get("training"):
                trained = journal.last_trained(connection, found.namespace)
        beside = overview(connection, Home.of(connection), trained or found)
    value = _with_serving(found, home)
    if trained is not None:
        value["last_trained"] = _with_serving(trained, home)
    return {**value, "overview": beside}


def _with_serving(entry: Entry, home: Path | None) -> dict[str, Any]:
    """A report with its answers, what its revision does today, and how often one ended like that.

    The answers are not in the report itself, which is kept when they are forgotten.
    """
    from agentpref.home import Home
    from agentpref.serve.registry import Registry

    service = Registry(home, namespace=entry.namespace).service(entry.revision)
    repeated = {"times": entry.times, "first_at": entry.first_at} if entry.times > 1 else {}
    answers = plain_answers(Home.open(home).answers(entry.update_id))
    return {**entry.report, "serving": service._asdict(), "answers": answers, **repeated}


def _today(service: Mapping[str, Any]) -> str:
    """Whether a revision serves now, in words."""
    if service["now"] == "live":
        return SERVES
    if service["now"] == "canary":
        return CANARY
    ended = {"served": service["until"], "was the canary": service["canary_until"]}
    times = [(at, what) for what, at in ended.items() if at is not None]
    if not times:
        return NEVER
    at, what = max(times)
    return f"{what} until {moment(at)}"


# In the terminal


def _show(value: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    show_report(value, _today(value["serving"]))
    if told is not value:
        say("")
        say("the last update that trained something:", BOLD)
        show_report(told, _today(told["serving"]))
    for line in _beside(value["overview"]):
        say(line)
    _show_history(value["overview"])


def _beside(found: Mapping[str, Any]) -> Iterator[str]:
    """What was learned from which feedback, where the revision comes from, what to label next."""
    for by in ("source", "origin", "date"):
        for words, fates in TRIED.items():
            rows = (found["learned_from"] or {}).get(by, ())
            counts = [(row["name"], sum(row[fate] for fate in fates)) for row in rows]
            told = ", ".join(f"{name} {count}" for name, count in [c for c in counts if c[1]][:6])
            if told:
                yield f"{words}, by {by}: {told}"
    yield from taught(found["words"])
    line = [_named(one) for one in found["lineage"]]
    if len(line) > 1:
        yield f"line: {' -> '.join(line)}"
    few = [row for row in found["label_next"] if not row["one_kind"]][:3]
    if few:
        yield (
            "label next: the fewer held-out prompts a tag has, the larger a loss in it can be "
            f"before the gate is sure to refuse; {'; '.join(map(_evidence, few))}; `agentpref "
            "ask --rule evidence` asks for these"
        )
    if found["unread"]:
        yield f"{found['unread']:,} judgements came in since; the next update reads them"


def taught(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """By which words answers were revised, of the revisions that trained it.

    >>> words = [{"text": "too long", "examples": 5}, {"text": "say the price", "examples": 3}]
    >>> print(*taught([{"origin": "comment", "examples": 8, "words": words}]))
    learned from 8 comments: 'too long' (5), 'say the price' (3)
    """
    for one in found:
        what = one["origin"] if one["examples"] == 1 else f"{one['origin']}s"
        words = [f"'{each['text']}' ({each['examples']:,})" for each in one["words"]]
        more = [f"and {len(words) - _WORDS:,} more"] if len(words) > _WORDS else []
        told = ", ".join([*words[:_WORDS], *more])
        yield f"learned from {one['examples']:,} {what}{f': {told}' if told else ''}"


_WORDS = 6


def _evidence(row: Mapping[str, Any]) -> str:
    """How large a loss in a tag has to be, and what would halve that."""
    if row["unseen_loss"] is None:
        return f"{row['tag']} has {row['held_out_prompts']} (any loss)"
    more = f"about {row['more']:,} more judged prompts halve it"
    return f"{row['tag']} has {row['held_out_prompts']} ({row['unseen_loss']:.2f}; {more})"


def _named(one: Mapping[str, Any]) -> str:
    """A revision of the line, with what it does and when it was made."""
    name = one["revision"].rpartition("-")[0] or one["revision"]
    day = moment(one["created_at"])[:_TO_THE_DAY] if one["created_at"] else None
    facts = [fact for fact in (one["serves"], one["standing"], day) if fact]
    return f"{name} ({', '.join(facts)})" if facts else name


def _show_history(found: Mapping[str, Any]) -> None:
    """Accuracy over all revisions, and what was lost; nothing where there is one."""
    shown = [row for row in found["history"] if row["revision"]]
    if len(shown) < 2:
        return
    if found["earlier"]:
        say(f"{found['earlier']:,} older updates are not shown")
    tags = sorted({tag for row in shown for tag in row["accuracy"]})[:6]
    names = [row["revision"].rpartition("-")[0] for row in shown]
    rows = [
        (
            name,
            row["serves"],
            *(row["accuracy"].get(tag, {}).get("after") for tag in tags),
            row["kl"],
        )
        for name, row in zip(names, shown, strict=True)
    ]
    table(("revision", "serves", *tags, "KL"), rows)
    for line in changes(found):
        say(line)


def changes(found: Mapping[str, Any]) -> Iterator[str]:
    """What was lost since a revision that was better, and where people changed their minds."""
    for row in found["forgetting"]:
        if row["lost"] > 0:
            name = row["best_revision"].rpartition("-")[0] or row["best_revision"]
            lost = f"{row['lost']:.2f} lost since {name}, on the same pairs"
            yield f"{row['tag']}: {lost}; {row['last']:.2f} now"
    for row in found["history"]:
        if row["revision"]:
            name = row["revision"].rpartition("-")[0]
            for tag in row["turned"]:
                yield f"{tag}: people changed their minds; from {name} on, what they say now counts"


# As a page, and of some time


def page_of(home: Path, update_id: str, namespace: str) -> str:
    """The page of an update.

    Raises:
        UpdateError: there is no such update.
        MissingDependency: jinja2, matplotlib or scipy is not installed.
    """
    from agentpref_cli.page import render

    value = _one(home, update_id, namespace)
    return render(value, _today(value["serving"]))


def _write_page(file: Path, value: Mapping[str, Any], as_json: bool) -> None:
    from agentpref.home import replacing
    from agentpref_cli.page import render

    page = render(value, _today(value["serving"]))
    if file == _STANDARD:
        sys.stdout.write(page)
        return
    with replacing(file) as draft:  # only this user may read it: it has people's words
        draft.write_text(page, encoding="utf-8")
    print_result(as_json, {"file": str(file)}, lambda: say(f"wrote {file}", GOOD))


def _show_since(
    home: Path | None, namespace: str | None, since: str, markdown: bool, as_json: bool
) -> None:
    """Show all updates of some time under one line."""
    from agentpref.overview import since as ended_since
    from agentpref.overview import subject

    at = options.parse_since(since, time.time(), "--since")
    with options.reading(home, namespace) as connection:
        entries = ended_since(connection, at, namespace)
    when = "since yesterday" if since.strip() == "1d" else f"since {moment(at)}"
    line = subject(entries, when)
    values = [_with_serving(entry, home) for entry in entries]
    if markdown:
        from agentpref_cli.page import mail

        named = [(value, _today(value["serving"])) for value in values]
        return print("\n".join(mail.several(line, named)))
    found = {"subject": line, "since": at, "updates": values}
    return print_result(as_json, found, lambda: _show_several(line, values))


def _show_several(line: str, values: Sequence[Mapping[str, Any]]) -> None:
    say(line, BOLD)
    for value in values:
        say("")
        show_report(value, _today(value["serving"]))
