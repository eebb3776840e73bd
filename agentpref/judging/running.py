"""Lets a calibrated judge compare answers that a home has, or samples second ones first.

Two answers to one prompt that nobody compared are a question. Both verdicts of the judge on it, one
for each order, are written as two comparisons in one transaction: verdicts that follow the position
contradict each other, make no pair, and are counted. A run that is ended goes on where it was.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from agentpref.errors import ConfigError, JudgeError, UncalibratedJudge, UnknownRun
from agentpref.home import Home, make_private_folder, writing
from agentpref.judging.gold import gold_of_home, stored_prompt_id
from agentpref.judging.opened import ASKING, Asking, OpenedJudge, at_work
from agentpref.prefer.examples import as_asked
from agentpref.prefer.judges.calibration import drifted
from agentpref.prefer.judges.hearing import KEPT_EVERY, Case, Spending
from agentpref.prefer.judges.verdicts import Judge, Opinion, Question, Verdict
from agentpref.prefer.retractions import withdraw
from agentpref.record.database import locked, transaction
from agentpref.record.log import Log
from agentpref.record.messages import as_json, canonical
from agentpref.record.store import Store
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.types import INCOMPLETE, SAMPLED_FOR, UNKNOWN_BEFORE, Comparison, Run

ANSWERS = 4
"""So many answers to one prompt are compared with one another, the newest ones."""

RECHECKED = 10
"""So many comparisons by people are put to a judge anew before each run."""

Generate = Callable[[GenerationRequest], Reply]


@dataclass(slots=True)
class JudgeRun:
    """What a judge did.

    ``questions`` counts pairs of answers that nobody had compared. Each was ``asked``, is
    ``waiting`` (beyond a limit, or its calls failed), or is counted by its stratum in
    ``untrusted``. Of those asked, ``decided`` have a winner, ``ties`` none; in ``position`` the
    verdicts followed the place of the answers, in ``steered`` what won spoke to its judge, and so
    did not win, and ``forgotten`` ones were removed meanwhile, so that nothing is written.
    ``sampled`` answers were drawn from live first.
    """

    judge: str
    namespace: str
    questions: int = 0
    asked: int = 0
    waiting: int = 0
    forgotten: int = 0
    decided: int = 0
    ties: int = 0
    position: int = 0
    steered: int = 0
    sampled: int = 0
    untrusted: Counter[str] = field(default_factory=Counter)
    principles: Counter[str] = field(default_factory=Counter)
    spending: Spending = field(default_factory=Spending)
    notes: list[str] = field(default_factory=list)

    def to_mapping(self) -> dict[str, Any]:
        """The run as plain values: what ``--json`` prints."""
        counters = {"untrusted": dict(self.untrusted), "principles": dict(self.principles)}
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | counters | {"spending": self.spending.to_mapping()}


class Pair(NamedTuple):
    """Two runs of one prompt, the older one first."""

    a: Run
    b: Run

    @property
    def case(self) -> Case:
        """The question which one is better."""
        question = Question(self.a.prompt.messages, self.a.output, self.b.output)
        return Case(question, stored_prompt_id(self.a))


def _alone(home: Home, judge: OpenedJudge, namespace: str) -> AbstractContextManager[None]:
    """Keep a second run of the same judge out: it would ask, and pay for, everything twice."""
    with writing(home.judges):
        make_private_folder(home.judges)
    name = f"{judge.name}\n{namespace}".encode()
    refusal = JudgeError(
        f"another process runs the judge {judge.name!r} on namespace {namespace!r}; wait for it to "
        "end"
    )
    digest = hashlib.blake2b(name, digest_size=6).hexdigest()
    return locked(home.judges / f".{digest}.lock", refusal)


def judge_runs(
    home: Home | str | Path | None,
    name: str | Judge,
    *,
    namespace: str = "default",
    limit: int | None = None,
    answers: int = ANSWERS,
    recheck: int = RECHECKED,
    sample: int = 0,
    prompts: int = 100,
    temperature: float = 0.8,
    generate: Generate | None = None,
    asking: Asking = ASKING,
) -> JudgeRun:
    """Compare answers to the same prompts, and log the verdicts as comparisons by the judge.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        name: a judge of the home, calibrated in this namespace, or a rule.
        namespace: whose answers.
        limit: ask so many questions at most, those about the newest prompts.
        answers: compare so many answers to one prompt with one another, at most.
        recheck: put so many comparisons by people to it first, anew; 0: none.
        sample: draw answers from ``generate`` first, until the prompts have so many more.
        prompts: of so many prompts with a single answer, the newest ones.
        temperature: at which they are drawn.
        generate: answers a request with what serves.
        asking: how the judge is asked.

    Raises:
        UncalibratedJudge: nobody knows how right it is, or it is trusted nowhere, or it is less
            right than it was when it was calibrated.
        JudgeError: there is no such judge, or it could not be asked.
        ConfigError: ``sample`` is asked for without ``generate``.
    """
    if sample and generate is None:
        raise ConfigError("sample is given without generate; pass what answers a request")
    if answers < 2:
        raise ConfigError(f"answers is {answers}, but must be 2 or more")
    with (
        at_work(home, name, namespace) as (place, connection, judge),
        _alone(place, judge, namespace),
    ):
        done = JudgeRun(judge.name, namespace)
        pairs = list(undecided(connection, namespace, judge.voter, answers))
        if pairs or sample:
            check_again(judge, namespace, recheck, asking, done)
        if sample and generate is not None:
            wanted = _with_one_answer(connection, namespace, prompts, judge)
            with Log(place.path, namespace=namespace) as log:
                for number, run in enumerate(wanted):
                    sample_answers(log, run, generate, sample, temperature)
                    done.sampled += sample
                    if asking.progress is not None:
                        asking.progress("sample", number + 1, len(wanted))
            pairs = list(undecided(connection, namespace, judge.voter, answers))
        done.questions = len(pairs)
        done.untrusted.update(pair.a.tag for pair in pairs if not judge.trusts(pair.a.tag))
        pairs = [pair for pair in pairs if judge.trusts(pair.a.tag)]
        compare(judge, connection, pairs[:limit], done, asking)
        done.waiting = len(pairs) - done.asked
        return done


def compare(
    judge: OpenedJudge,
    connection: sqlite3.Connection,
    pairs: Sequence[Pair],
    done: JudgeRun,
    asking: Asking,
    keep: Callable[[Opinion], bool] = lambda said: True,
) -> dict[int, Opinion]:
    """Put pairs of runs to a judge, and write its verdicts; return the opinions by place.

    Those that ``keep`` refuses are not written as comparisons; the home keeps the verdicts, so that
    they are not asked again.
    """
    found: dict[int, Opinion] = {}
    unwritten: list[tuple[Pair, Opinion]] = []
    written_at = time.monotonic()
    try:
        for number, one in judge.hear([pair.case for pair in pairs], done.spending, asking):
            found[number] = one
            done.asked += 1
            done.decided += one.winner != "tie"
            done.ties += one.winner == "tie"
            done.position += one.follows is not None
            done.steered += one.steered
            if one.winner != "tie" and one.as_given.principle:
                done.principles[one.as_given.principle] += 1
            if keep(one):
                unwritten.append((pairs[number], one))
            if time.monotonic() - written_at >= KEPT_EVERY:
                done.forgotten += write_opinions(connection, judge, unwritten)
                unwritten, written_at = [], time.monotonic()
    finally:
        done.forgotten += write_opinions(connection, judge, unwritten)
    if done.spending.stopped and not found and done.spending.asked:
        done.notes.append(
            f"ended: {done.spending.stopped}, before the first question of the run; raise the "
            "limit, or leave out the recheck (--recheck 0)"
        )
    elif done.spending.stopped:
        done.notes.append(f"ended: {done.spending.stopped}; the same command goes on")
    return found


def write_opinions(
    connection: sqlite3.Connection, judge: OpenedJudge, said: Sequence[tuple[Pair, Opinion]]
) -> int:
    """Write what a judge said of pairs of runs: a comparison for each order, once.

    Returns:
        How many pairs are not there any more, because they were removed meanwhile.
    """
    now, store, gone = time.time(), Store(connection), 0
    with transaction(connection):
        for pair, one in said:
            orders = ((pair.a, pair.b, one.as_given), (pair.b, pair.a, one.swapped))
            try:
                for a, b, verdict in orders:
                    store.add_comparison(_comparison(judge, a, b, verdict, now))
            except UnknownRun:
                gone += 1
    return gone


def _comparison(judge: OpenedJudge, a: Run, b: Run, verdict: Verdict, now: float) -> Comparison:
    """A verdict on two runs in the order in which they were shown; it has one id for ever."""
    parts = "\n".join((judge.voter, a.run_id, b.run_id)).encode()
    words = ": ".join(word for word in (verdict.principle, verdict.rationale) if word)
    return Comparison(
        hashlib.blake2b(parts, digest_size=16).hexdigest(),
        now,
        a.run_id,
        b.run_id,
        verdict.winner,
        judge.source,
        judge.voter,
        words or None,
    )


def sample_answers(
    log: Log,
    run: Run,
    generate: Generate,
    count: int,
    temperature: float,
    *,
    max_tokens: int = 256,
    salt: str = "",
    **about: Any,
) -> list[str]:
    """Draw further answers to a run's prompt, and record them; return the ids of their runs.

    The seeds follow from the run, the number of the answer and the ``salt``.
    """
    run = as_asked(run)  # else the arguments of its chat template would be lost
    limit = run.params.get("max_tokens")
    found = []
    for number in range(count):
        drawn = hashlib.blake2b(f"{run.run_id} {number} {salt}".encode(), digest_size=4)
        seed = int(drawn.hexdigest(), 16)
        request = GenerationRequest(
            run.prompt.messages,
            run.prompt.tools,
            max_tokens=limit if isinstance(limit, int) and 0 < limit <= 4096 else max_tokens,
            temperature=temperature,
            seed=seed,
            chat_template_kwargs=run.prompt.chat_template_kwargs,
        )
        reply = generate(request)
        params: dict[str, Any] = {"temperature": temperature, "seed": seed,
                                  "max_tokens": request.max_tokens}  # fmt: skip
        if run.prompt.chat_template_kwargs:
            params["chat_template_kwargs"] = run.prompt.chat_template_kwargs
        ended = {"finish_reason": INCOMPLETE if reply.finish_reason == "length" else "stop"}
        found.append(
            log.record(
                run.prompt.messages,
                reply.message,
                model=run.model,
                revision=reply.revision,
                tools=run.prompt.tools,
                params=params,
                token_ids=reply.token_ids,
                logprobs=reply.logprobs,
                tags=run.tags,
                metadata={SAMPLED_FOR: run.run_id, **ended, **about},
            )
        )
    log.flush()
    return found


def check_again(
    judge: OpenedJudge, namespace: str, count: int, asking: Asking, done: JudgeRun
) -> None:
    """Put some gold to a model anew; raise if it is provably less right than when calibrated."""
    if not count or judge.source == "code":
        return
    assert judge.calibration is not None
    try:
        gold = gold_of_home(judge.connection, namespace, limit=count)
    except JudgeError:  # it was calibrated on a file
        done.notes.append("people compared nothing here, so the judge was not checked again")
        return
    anew = replace(asking, anew=True, progress=None)
    heard = judge.hear([one.case for one in gold], done.spending, anew)
    why = drifted(judge.calibration, [gold[number].verdict(one) for number, one in heard])
    if why is not None:
        raise UncalibratedJudge(
            f"judge {judge.name!r} has changed since it was calibrated: {why}; look at what its "
            f"engine serves, and run `agentpref judge calibrate {judge.name}` again"
        )


def _with_one_answer(
    connection: sqlite3.Connection, namespace: str, count: int, judge: OpenedJudge
) -> list[Run]:
    """The newest runs whose prompts have a single answer."""
    query = """SELECT max(run_id), max(created_at) FROM run WHERE namespace = ?
        GROUP BY prompt HAVING count(DISTINCT output) = 1 ORDER BY 2 DESC LIMIT ?"""
    found = [run_id for run_id, _ in connection.execute(query, (namespace, count))]
    store = Store(connection)
    runs = (store.run(run_id) for run_id in found)
    return [run for run in runs if is_whole(run) and judge.trusts(run.tag)]


def is_whole(run: Run) -> bool:
    """Whether an answer ended by itself, and its log knows the whole prompt."""
    about = run.metadata
    return about.get("finish_reason") != INCOMPLETE and about.get(UNKNOWN_BEFORE) is None


def undecided(
    connection: sqlite3.Connection, namespace: str, voter: str | None, answers: int
) -> Iterator[Pair]:
    """Pairs of answers to one prompt that neither people nor the voter compared, newest first.

    Of each prompt, so many of the newest answers are paired.
    """
    query = """SELECT prompt FROM run WHERE namespace = ?
        GROUP BY prompt HAVING count(DISTINCT output) > 1 ORDER BY max(created_at) DESC"""
    prompts = [prompt for (prompt,) in connection.execute(query, (namespace,))]
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        some = as_json(prompts[start : start + _PROMPTS_AT_ONCE])
        query = """SELECT run_id FROM run
            WHERE +namespace = ? AND prompt IN (SELECT value FROM json_each(?))"""
        run_ids = [run_id for (run_id,) in connection.execute(query, (namespace, some))]
        runs, feedback, comparisons = Store(connection).judged(namespace, run_ids)
        known = {run.run_id: as_asked(run) for run in runs}
        decided = {
            answers_key(known[row.run_a], known[row.run_b])
            for row in withdraw(feedback, comparisons).comparisons
            if row.source == "human" or (voter is not None and row.user_id == voter)
        }
        for newest in _newest([*known.values()], answers):
            for place, b in enumerate(newest):
                for a in newest[place + 1 :]:
                    if answers_key(a, b) not in decided:
                        yield Pair(a, b)


_PROMPTS_AT_ONCE = 500


def _newest(runs: Sequence[Run], count: int) -> Iterator[list[Run]]:
    """Of each prompt, the newest runs with answers that differ, newest first."""
    prompts: dict[str, dict[bytes, Run]] = {}
    for run in sorted(runs, key=lambda run: (run.created_at, run.run_id), reverse=True):
        if is_whole(run):
            prompts.setdefault(run.prompt.id, {}).setdefault(canonical(run.output), run)
    return (list(found.values())[:count] for found in prompts.values())


def answers_key(a: Run, b: Run) -> tuple[str, frozenset[bytes]]:
    """Which two answers to which prompt two runs are, whoever logged them again."""
    return a.prompt.id, frozenset((canonical(a.output), canonical(b.output)))


def explain(untrusted: Mapping[str, int]) -> str:
    """In words, why questions were not asked."""
    tags = ", ".join(f"{tag} ({count})" for tag, count in sorted(untrusted.items()))
    return f"not trusted in {tags}: no comparison by people shows there that it is right"
