"""The page of `report --html`: one file that needs no script, no network and no other file.

``overview`` in the core gathers the values, ``charts.py`` draws them, ``report.html`` is the page.
Jinja escapes every text, and characters that could reorder what is seen are written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentpref.columns import text_of
from agentpref.errors import MissingDependency
from agentpref.printable import escaped
from agentpref_cli.commands.report import changes, taught
from agentpref_cli.commands.update import VERDICTS, account, headline, identity
from agentpref_cli.terminal import moment

_KINDS = {"green": "good", "red": "bad", "yellow": "warn"}


def render(value: Mapping[str, Any], serving: str) -> str:
    """The page of a report.

    Args:
        value: the report, with ``overview`` and, where it trained nothing, ``last_trained``.
        serving: whether its revision serves today, in words.

    Raises:
        MissingDependency: jinja2, matplotlib or scipy is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        from agentpref_cli.page import charts
    except ImportError as error:
        raise MissingDependency(
            f"a page needs {error.name}; install it with: pip install 'agentpref[report]'"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": moment, "number": _number, "short": _short}
    trained = value.get("last_trained", value)
    beside = value["overview"]
    bars = _with_intervals(trained)
    return environment.get_template("report.html").render(
        report=value,
        trained=trained,
        beside=beside,
        kind=_KINDS.get(VERDICTS[value["verdict"]][1], ""),
        headline=headline(value, serving),
        identity=[*identity(value, serving)],
        account=[*taught(beside["words"]), *account(trained)],
        tried=tried(beside["learned_from"], trained["verdict"]),
        bars=bars,
        answers=_answers(trained),
        changes=[*changes(beside)],
        revisions=[row for row in beside["history"] if row["revision"]],
        charts={
            "bars": charts.bars(bars),
            "heat": charts.heat(beside["history"]),
            "kl": charts.divergence(beside["history"]),
        },
    )


_COLUMNS = {
    "trained": "trained",
    "held_out": "held out",
    "set_aside": "tried and set aside",
    "known": "right about already",
}


def tried(found: Mapping[str, Any] | None, verdict: str) -> dict[str, Any]:
    """What became of the new feedback: a heading, a sentence, and the columns with any number."""
    rows = found["source"] if found else []
    columns = {name: words for name, words in _COLUMNS.items() if any(row[name] for row in rows)}
    heading, sentence = "What it learned from", ""
    if not columns:
        sentence = f"Nothing: {VERDICTS[verdict][2]}."
    elif not {"trained", "held_out"} & columns.keys():
        heading = "What it tried"
        sentence = "It learned nothing of it, and set it aside: what served before serves on."
        if "known" in columns:
            sentence = "What serves is right about it already, so that it counts as learned."
    return {"heading": heading, "sentence": sentence, "columns": columns}


def _with_intervals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy by tag, before and after, with exact intervals, the most pairs first.

    The report has the shares and not each pair, so a pair counts as one prompt. Against the base,
    ``before`` is ½ by definition and has no interval.
    """
    from agentpref.prove.comparing import proportion

    rows = []
    for tag, found in report["accuracy"].items():
        row: dict[str, Any] = {"tag": tag, "pairs": int(found["pairs"])}
        for when in ("before", "after"):
            share = found[when]
            known = when == "after" or report["parent"] is not None
            low, high = proportion(share * row["pairs"], row["pairs"]) if known else (None, None)
            row[when] = {"share": share, "low": low, "high": high}
        rows.append(row)
    return sorted(rows, key=lambda row: (-row["pairs"], row["tag"]))


def _answers(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was answered before and after to prompts chosen at random, of a report that has it."""
    return [
        {"prompt": _asked(one["prompt"]), "before": one["before"], "after": one["after"]}
        for one in report.get("answers", ())
    ]


def _asked(messages: Sequence[Mapping[str, Any]]) -> str:
    """A prompt as text: a single question as it is, a conversation with its roles."""
    texts = [text_of(message) or "" for message in messages]
    if len(messages) == 1:
        return texts[0]
    return "\n".join(f"{m['role']}: {text}" for m, text in zip(messages, texts, strict=True))


def _shown(value: Any) -> Any:
    """Text without characters that move or hide others; a chart is mark-up of ours."""
    is_markup = hasattr(value, "__html__")
    return escaped(value, keep="\n\t") if isinstance(value, str) and not is_markup else value


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _short(revision: str) -> str:
    """A revision without the hash: its number is its own within a home."""
    return revision.rpartition("-")[0] or revision
