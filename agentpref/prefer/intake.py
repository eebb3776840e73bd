"""From what another product logged to rows of a home.

Ids are hashes of the namespace, the format and the product's own id: a run is added once, and a
score finds its run, in whichever file and order they come. The id of a score hashes what it says,
too: one that was changed there is a second row here, newer by the product's clock, and supersedes
the first. A judgement also finds a run that the app logged here itself under the product's id of
the run or of the trace, such as LangChain's, which LangSmith uses too; and an answer in Open WebUI
that the gateway logged, by the message that it was.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from agentpref.errors import (
    ExchangeError,
    ForgottenUser,
    InvalidFeedback,
    InvalidMessage,
    RecordError,
    RunExists,
    UnknownRun,
)
from agentpref.prefer.logged import LeftOut, Logged, LoggedComparison, LoggedRun, LoggedScore
from agentpref.record.finding import of_trace, spellings
from agentpref.record.ingest.checks import checked
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.ingest.redaction import Redact, redacted, redacted_data
from agentpref.record.messages import IMPORT_ID, Linker, RunRow, check_output, run_row
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Prompt, Run, Source


class LoggedRows(NamedTuple):
    """What one row of a log adds to the home.

    ``known_as`` has the product's own id of each run. Each judgement comes with the ids under which
    its run may be known, the surest first. ``left_out`` says what in the row is neither.
    """

    place: str
    runs: Sequence[RunRow] = ()
    known_as: Sequence[str] = ()
    judgements: Sequence[tuple[Feedback | Comparison, tuple[str, ...]]] = ()
    left_out: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Intake:
    """What all rows of one import share; what is ``None`` the rows say themselves."""

    namespace: str
    tag: str | None
    source: Source | None
    user_id: str | None
    pseudonyms: Callable[[], Pseudonyms]
    redact: Redact | None
    file_name: str
    _linker: Linker

    def rows(self, place: str, format: str, found: Iterable[Logged]) -> LoggedRows:
        """Make the rows of what a row of a log holds.

        Raises:
            ExchangeError: a value cannot be stored.
            RedactionFailed: ``redact`` raised, or returned something other than text.
        """
        runs: list[RunRow] = []
        known_as: list[str] = []
        judgements: list[tuple[Feedback | Comparison, tuple[str, ...]]] = []
        left_out: list[str] = []
        try:
            for one in found:
                if isinstance(one, LeftOut):
                    left_out.append(f"{format}: {one.reason}")
                elif isinstance(one, LoggedRun):
                    runs.append(self._run(one, format))
                    known_as.append(one.id)
                elif isinstance(one, LoggedScore):
                    judgements.append(self._score(one, format))
                else:
                    judgements.append((self._comparison(one, format), ()))
        except (InvalidMessage, InvalidFeedback) as error:
            raise ExchangeError(str(error)) from error
        if not (runs or judgements or left_out):
            left_out.append(f"{format}: a row that holds nothing")
        return LoggedRows(place, runs, known_as, judgements, left_out)

    def _run(self, given: LoggedRun, format: str) -> RunRow:
        asked, tools, output = given.messages, given.tools, given.output
        params, metadata = given.params, {**given.metadata, "imported_from": self.file_name}
        if self.redact is not None:
            asked, tools, output = redacted((asked, tools, output), self.redact)
            params, metadata = redacted_data((params, metadata), self.redact)
        nodes = self._linker.conversation([*asked], [*tools], output)
        run = Run(
            run_id=self._id("run", format, given.id),
            namespace=self.namespace,
            created_at=_finite(given.created_at),
            prompt=Prompt(nodes[-2].id, tuple(asked), tuple(tools)),
            output=output,
            model=_storable(None if given.model is None else str(given.model), "the model"),
            thread_id=given.thread_id,
            trace_id=given.trace_id,
            user_id=self._name(given.user_id),
            params=_storable(params, "a parameter of the model"),
            tags=(self.tag,) if self.tag else (*_storable(given.tags, "a tag"),),
            metadata=_storable(metadata, "its metadata"),
        )
        return run_row(run, nodes)

    def _score(self, given: LoggedScore, format: str) -> tuple[Feedback, tuple[str, ...]]:
        places: list[str] = []
        if given.run_id is not None:
            places += [self._id("run", format, given.run_id), given.run_id]
        if given.trace_id is not None:
            places.append(of_trace(self.namespace, given.trace_id))
        said = (given.score, given.value, given.comment, given.correction)
        comment, value, correction = given.comment, given.value, given.correction
        if self.redact is not None:
            comment, value = redacted_data((comment, value), self.redact)
            correction = redacted(correction, self.redact)
        feedback = Feedback(
            feedback_id=self._id("score", format, given.id, *said),
            run_id=places[0] if places else "",
            created_at=_finite(given.created_at),
            key=given.key,
            score=given.score,
            value=value,
            comment=comment,
            source=self.source or given.source or "human",
            user_id=self.user_id or given.user_id,
            correction=correction,
        )
        made = checked(feedback)
        scale = given.scale or made.scale
        if scale is not None and made.score is not None and not _fits(made.score, scale):
            raise InvalidFeedback(
                f"the score is {made.score:g}, and its scale is from {scale[0]:g} to {scale[1]:g}; "
                f"correct the score or the configuration of {given.key!r}"
            )
        if correction is not None:
            check_output(correction)
        return replace(made, scale=scale, user_id=self._name(made.user_id)), tuple(places)

    def _comparison(self, given: LoggedComparison, format: str) -> Comparison:
        sides = (self._id("run", format, given.better), self._id("run", format, given.worse))
        comment = given.comment
        if self.redact is not None:
            comment = redacted_data(comment, self.redact)
        made = Comparison(
            self._id("comparison", format, given.id, *sides), _finite(given.created_at), *sides,
            "tie" if given.is_tie else "a", self.source or given.source or "human",
            self.user_id or given.user_id, comment,
        )  # fmt: skip
        return replace(checked(made), user_id=self._name(made.user_id))

    def _name(self, user_id: str | None) -> str | None:
        return None if user_id is None else self.pseudonyms().name(user_id)

    def _id(self, *parts: Any) -> str:
        return content_id(self.namespace, *_storable(parts, "what it says"))


def content_id(*parts: object) -> str:
    """An id that hashes what it stands for."""
    return IMPORT_ID + hashlib.blake2b(orjson.dumps(parts), digest_size=16).hexdigest()


def add_logged(
    batch: Sequence[LoggedRows], connection: sqlite3.Connection, namespace: str
) -> Iterator[tuple[str, LoggedRows, RecordError | None]]:
    """Write a batch: all its runs, then its judgements.

    Yields what became of each row: ``"added"``, ``"known"``, ``"left out"``, or ``"bad"`` and why.
    """
    store = Store(connection)
    refused: dict[int, RecordError] = {}
    changed: set[int] = set()
    gone: set[str] = set()
    runs = [(at, run, name) for at, row in enumerate(batch) for run, name in _named(row)]
    there = _there(connection, [run.run_id for _, run, _ in runs])
    absent = [(run, name) for _, run, name in runs if run.run_id not in there]
    here = _logged_here(connection, namespace, absent) | _of_message(connection, namespace, absent)
    new = [(at, run) for at, run, _ in runs if run.run_id not in (there.keys() | here.keys())]
    for (at, run), refusal in zip(new, store.add_runs([run for _, run in new]), strict=True):
        if refusal is None:
            changed.add(at)
        else:
            refused.setdefault(at, refusal)
        if isinstance(refusal, ForgottenUser) and run.trace_id is not None:
            gone.add(of_trace(run.namespace, run.trace_id))
    for at, run, _ in runs:
        stored = there.get(run.run_id)
        if stored is not None and stored != (run.namespace, run.prompt, run.output):
            refused.setdefault(at, RunExists(_CHANGED))
    for at, row in enumerate(batch):
        if at in refused:
            continue
        before = connection.total_changes
        try:
            for judgement, places in row.judgements:
                sought = _in_namespace(connection, namespace, [here.get(p, p) for p in places])
                _add_judgement(store, _of_runs(judgement, here), sought, gone)
        except RecordError as refusal:
            refused[at] = refusal
        if connection.total_changes > before:
            changed.add(at)
    for at, row in enumerate(batch):
        why = refused.get(at)
        if isinstance(why, ForgottenUser):
            yield "left out", row._replace(left_out=["of a user who was forgotten"]), None
        elif why is not None:
            yield "bad", row, why
        elif not (row.runs or row.judgements):
            yield "left out", row, None
        else:
            yield "added" if at in changed else "known", row, None


_CHANGED = (
    "the home has this run with another prompt or answer: it was changed there since, or was "
    "imported with another --redact; leave it out with --skip-bad, or import the file into another "
    "--namespace"
)


def _named(row: LoggedRows) -> Iterator[tuple[RunRow, str]]:
    return zip(row.runs, row.known_as, strict=True)


def _there(
    connection: sqlite3.Connection, run_ids: Sequence[str]
) -> dict[str, tuple[str, str, str]]:
    """The runs of a batch that were imported before: their namespaces, prompts and outputs."""
    query = """SELECT run_id, namespace, prompt, output FROM run
        WHERE run_id IN (SELECT value FROM json_each(?))"""
    rows = connection.execute(query, (orjson.dumps([*{*run_ids}]).decode(),))
    return {run_id: (namespace, prompt, output) for run_id, namespace, prompt, output in rows}


def _logged_here(
    connection: sqlite3.Connection, namespace: str, runs: Sequence[tuple[RunRow, str]]
) -> dict[str, str]:
    """The runs of a batch that the app logged here under the product's own ids of them."""
    query = """SELECT run_id FROM run
        WHERE namespace = ? AND run_id IN (SELECT value FROM json_each(?))"""
    named = {spelling: run.run_id for run, name in runs for spelling in spellings(name)}
    rows = connection.execute(query, (namespace, orjson.dumps([*named]).decode()))
    return {named[run_id]: run_id for (run_id,) in rows}


_EARLIER = 24 * 3600.0
"""How much earlier than its message a run may have been logged, by clocks that differ."""


def _of_message(
    connection: sqlite3.Connection, namespace: str, runs: Sequence[tuple[RunRow, str]]
) -> dict[str, str]:
    """The answers in Open WebUI of a batch that are runs here, which the gateway logged, say.

    Of several calls for one message, the last one answers.
    """
    query = """SELECT run_id, json_extract(metadata, '$.open_webui.message_id') AS message
        FROM run WHERE namespace = ? AND created_at >= ?
        AND thread_id IN (SELECT value FROM json_each(?))
        AND message IN (SELECT value FROM json_each(?))
        AND json_extract(metadata, '$.open_webui.task') IS NULL ORDER BY created_at, run_id"""
    answers = {}
    for run in (run for run, _ in runs if '"open_webui"' in run.metadata):  # few are, in most logs
        known = orjson.loads(run.metadata).get("open_webui")
        if isinstance(known, dict) and isinstance(known.get("message_id"), str):
            answers[known["message_id"]] = run
    if not answers:
        return {}
    since = min(run.created_at for run in answers.values()) - _EARLIER
    threads = orjson.dumps([*{run.thread_id for run in answers.values()}]).decode()
    values = (namespace, since, threads, orjson.dumps([*answers]).decode())
    return {answers[name].run_id: run_id for run_id, name in connection.execute(query, values)}


def _of_runs(judgement: Feedback | Comparison, here: Mapping[str, str]) -> Feedback | Comparison:
    """A comparison, with runs that were logged here by their ids here."""
    if isinstance(judgement, Feedback):
        return judgement
    run_a, run_b = judgement.run_a, judgement.run_b
    return replace(judgement, run_a=here.get(run_a, run_a), run_b=here.get(run_b, run_b))


def _in_namespace(
    connection: sqlite3.Connection, namespace: str, places: Sequence[str]
) -> Iterator[str]:
    """The places of a judgement, without runs that the app logged in another namespace."""
    query = """SELECT run_id FROM run WHERE namespace = ?
        AND run_id IN (SELECT value FROM json_each(?))"""
    for place in places:
        if place.startswith((IMPORT_ID, of_trace(namespace, ""))):
            yield place
        else:
            ids = orjson.dumps(spellings(place)).decode()
            yield from (run_id for (run_id,) in connection.execute(query, (namespace, ids)))


def _add_judgement(
    store: Store, judgement: Feedback | Comparison, places: Iterable[str], gone: Set[str]
) -> None:
    """Write a judgement of the first of some runs that is known; ``gone`` are forgotten traces."""
    if isinstance(judgement, Comparison):
        store.add_comparison(judgement)
        return
    tried: list[str] = []
    for place in places:
        tried.append(place)
        try:
            store.add_feedback(replace(judgement, run_id=place))
        except ForgottenUser:
            raise
        except UnknownRun:
            continue
        return
    if not gone.isdisjoint(tried):
        raise ForgottenUser("the user whose run it judges was forgotten")
    raise UnknownRun(
        "the run or trace that it judges is not in this home; import the file with the runs first "
        "(a score of a step that is no model call has none: leave it out with --skip-bad)"
    )


def _storable(value: Any, name: str) -> Any:
    """A value as JSON holds it: a time, a decimal or a UUID of a table becomes text."""
    try:
        return orjson.loads(orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS))
    except TypeError as error:
        raise ExchangeError(f"{name} is not JSON ({error}); correct it, or leave it out") from error


def _fits(score: float, scale: tuple[float, float]) -> bool:
    return scale[0] <= score <= scale[1]


def _finite(time: float) -> float:
    if not math.isfinite(time):
        raise ExchangeError(f"its time is {time}; write a time such as 2026-11-29T08:00:00Z")
    return time
