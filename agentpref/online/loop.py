"""One loop while it runs: draw, judge, learn, compare with the base, and go on or not."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.adoption import adopt
from agentpref.config import UpdateConfig
from agentpref.errors import JudgeError, UnknownRun
from agentpref.evaluation.duels import Answers, Duel, answers_of, duel, known_gold
from agentpref.home import Home
from agentpref.judging.opened import Asking, OpenedJudge
from agentpref.judging.running import JudgeRun, Pair, compare, sample_answers
from agentpref.online.deceived import Agreement, agreement, parting, rewarded
from agentpref.online.prompts import Prompts
from agentpref.online.report import OnlineReport, Round, Train, Why
from agentpref.pipeline import update
from agentpref.prefer.examples import is_held_out
from agentpref.prefer.judges.hearing import Case
from agentpref.prefer.judges.verdicts import Opinion, Question
from agentpref.prove.retention import PEOPLE
from agentpref.reading import last_held_out
from agentpref.record.judges import Judges
from agentpref.record.log import Log
from agentpref.record.messages import canonical
from agentpref.record.store import Store
from agentpref.serve.router import Router
from agentpref.types import BASE, INCOMPLETE, Message, Progress, Run, UpdateReport

if TYPE_CHECKING:
    import sqlite3

    from agentpref.prefer.judges.calibration import GoldVerdict

_RISE = 0.01  # a smaller rise of the win rate is none
_LOST_IN_A_ROW = 2
_SPENT = 0.95  # of the KL budget
_CHECKED = 64  # so many pairs of a round are put to the second judge


@dataclass
class Loop:
    """One loop while it runs."""

    home: Home
    connection: sqlite3.Connection
    router: Router
    log: Log
    judge: OpenedJudge
    check: OpenedJudge | None
    model: str
    config: UpdateConfig
    asked: int
    samples: int
    temperature: float
    max_tokens: int
    train: Train | None
    asking: Asking
    progress: Progress
    until: float | None

    def __post_init__(self) -> None:
        self.namespace = self.log.namespace
        self.registry = self.router.registry
        self.report = OnlineReport(self.judge.name, self.namespace, self.live)
        self.parted: str | None = None
        self.against_people: str | None = None
        self.on_pairs: Agreement | None = None
        self.first: Agreement | None = None
        self.now: Agreement | None = None
        self.held_out = last_held_out(self.connection, self.namespace)
        self.gold: list[GoldVerdict] = []
        self.random = random.Random(self.config.seed)
        self.prompts = Prompts(self.connection, self.namespace, self.held_out, self.random)

    @property
    def live(self) -> str:
        """The id of what serves."""
        return self.registry.state().live or BASE

    def run(
        self, rounds: int, probes: int, *, offline: bool, heard: Callable[[Round], object]
    ) -> OnlineReport:
        """Learn from what is logged, and then round after round."""
        report = self.report
        if offline:
            updated = self._update()
            report.offline = updated.verdict
            self.router.sync()
            if self._note_people(updated):
                report.ended, report.because, report.live = *self._in_doubt(), self.live
                return report
        trained, held_out = self.prompts.find(self.judge.trusts)
        if not trained:
            raise JudgeError(
                f"no prompt of {self.namespace!r} is on the training side of the log; log what the "
                "app is asked first"
            )
        chosen = self.prompts.draw(held_out, min(probes, len(held_out) // 2))
        proving = [run for run in held_out if run not in chosen]
        self.probe_answers = self._answers(BASE, chosen)
        if not chosen:
            report.notes.append("no prompt is held out, so nobody can say whether live is better")
        self.probes = chosen
        self.gold = known_gold(self.judge, self.namespace, {run.tag for run in chosen})
        share = round(self.asked * self.held_out / (1 - self.held_out))
        for number in range(1, rounds + 1):
            asked = self.prompts.draw(trained, self.asked)
            done = self._round(number, [*asked, *self.prompts.draw(proving, max(1, share))])
            report.rounds.append(done)
            heard(done)
            why = self._ends(number == rounds)
            if why is not None:
                report.ended, report.because = why
                break
        report.live = self.live
        return report

    def _round(self, number: int, asked: Sequence[Run]) -> Round:
        begun, judged = time.monotonic(), JudgeRun(self.judge.name, self.namespace)
        judged.spending = self.report.spending
        sampled, part = 0, False
        words: tuple[str, ...] = ()
        if self.train is None:
            pairs, sampled = self._sampled(number, asked)
            opinions = compare(self.judge, self.connection, pairs, judged, self._asking())
            part, words = self._part_on(pairs, opinions)
        if part:
            return Round(
                number, len(asked), sampled, judged.decided, judged.ties, judged.position,
                "not_learned", agreement=self.now.share if self.now else None, words=words,
                seconds=time.monotonic() - begun,
            )  # fmt: skip
        updated = self._update() if self.train is None else self._reinforced(asked, self.train)
        self.router.sync()
        self._note_people(updated)
        fought, checked, agreement, words = self._probed()
        rate = None if fought is None else fought.rate.corrected or fought.rate.raw
        by_check = None if checked is None else checked.rate.raw
        return Round(
            number,
            len(asked),
            sampled,
            judged.decided,
            judged.ties,
            judged.position,
            updated.verdict,
            updated.revision if updated.verdict == "promoted" else None,
            next((one["value"] for one in updated.checks if one["name"] == "KL budget"), None),
            None if rate is None else rate.value,
            None if rate is None else (rate.low, rate.high),
            None if by_check is None else by_check.value,
            agreement,
            words,
            time.monotonic() - begun,
            updated.update_id,
        )

    def _part_on(
        self, pairs: Sequence[Pair], opinions: Mapping[int, Opinion]
    ) -> tuple[bool, tuple[str, ...]]:
        """Whether a second judge parts with the first one on a round's pairs, and by which words.

        It is asked about some of those that the first one decided, before anything is learned.
        """
        decided = sorted(number for number, one in opinions.items() if one.winner != "tie")
        if self.check is None or not decided:
            return False, ()
        some = sorted(self.random.sample(decided, min(_CHECKED, len(decided))))
        cases = [pairs[number].case for number in some]
        heard = self.check.hear(cases, self.report.check_spending, self._asking())
        others = {some[number]: one for number, one in heard}
        now = agreement({number: opinions[number] for number in some}, others)
        why = parting(self.on_pairs, now, prefers_live=True)
        self.on_pairs = self.on_pairs or now
        if why is None:
            return False, ()
        firsts, seconds = [pair.a.output for pair in pairs], [pair.b.output for pair in pairs]
        words = rewarded(firsts, seconds, {number: opinions[number] for number in some}, others)
        self.now, self.parted = now, f"{why} of one prompt"
        return True, words

    # --- Answers ---

    def _answers(self, revision: str, runs: Sequence[Run]) -> Answers:
        return answers_of(
            self.router.backend.generate,
            revision,
            [run.prompt for run in runs],
            max_tokens=self.max_tokens,
            progress=self.progress,
        )

    def _sampled(self, number: int, asked: Sequence[Run]) -> tuple[list[Pair], int]:
        """Draw answers from live, record them, and pair those of one prompt that differ."""
        store, pairs, drawn = Store(self.connection), list[Pair](), 0

        def draw(run: Run) -> list[str]:
            return sample_answers(
                self.log,
                run,
                self.router.generate,
                self.samples,
                self.temperature,
                max_tokens=self.max_tokens,
                salt=f"{self.report.start} {number} {self.config.seed}",
                online=number,
            )

        with ThreadPoolExecutor(self.asking.concurrency) as pool:
            for done, run_ids in enumerate(pool.map(draw, asked), start=1):
                runs = [*_present(store, run_ids)]
                drawn += len(runs)
                whole = [one for one in runs if one.metadata.get("finish_reason") != INCOMPLETE]
                for place, a in enumerate(whole):
                    pairs += [Pair(a, b) for b in whole[place + 1 :] if _differ(a, b)]
                self.progress(f"answers of round {number}", done, len(asked))
        return pairs, drawn

    # --- Learning ---

    def _update(self) -> UpdateReport:
        return update(
            self.home.path,
            model=self.model,
            config=self._config(),
            namespace=self.namespace,
            progress=self.progress,
        )

    def _config(self) -> UpdateConfig:
        if self.until is None:
            return self.config
        left = max(0.5, (self.until - time.monotonic()) / 60)
        limit = min(left, self.config.max_minutes or math.inf)
        return replace(self.config, max_minutes=limit)

    def _asking(self) -> Asking:
        """How a judge is asked: until the time is over, counted from when its spending began."""
        limits = self.asking.limits
        if self.until is not None:
            ends = max(1.0, self.until - self.report.spending.begun)
            limits = replace(limits, seconds=min(ends, limits.seconds or math.inf))
        return replace(self.asking, limits=limits, progress=self.progress)

    def _reinforced(self, asked: Sequence[Run], train: Train) -> UpdateReport:
        """Train by reinforcement with the judge's wins as the reward, and put it to the gate."""
        start = None if self.live == BASE else self.registry.get(self.live).path
        trained = [run for run in asked if not is_held_out(run.prompt.messages, self.held_out)]
        prompts = [run.prompt.messages for run in trained]
        with tempfile.TemporaryDirectory() as folder:
            made = train(Path(folder), start, prompts, self._reward)
            return adopt(
                self.home.path,
                made,
                model=self.model,
                config=self._config(),
                namespace=self.namespace,
                progress=self.progress,
                trained_on=[run.run_id for run in trained],
            )

    def _reward(self, messages: Sequence[Message], answers: Sequence[str]) -> list[float]:
        """The share of the other answers that each one beats; a tie is half."""
        scores = [0.0] * len(answers)
        places = [(a, b) for b in range(len(answers)) for a in range(b)]
        given: list[Message] = [{"role": "assistant", "content": text} for text in answers]
        cases = [Case(Question(tuple(messages), given[a], given[b])) for a, b in places]
        for number, one in self.judge.hear(cases, self.report.spending, replace(self.asking)):
            a, b = places[number]
            won = {"a": 1.0, "b": 0.0, "tie": 0.5}[one.winner]
            scores[a], scores[b] = scores[a] + won, scores[b] + 1 - won
        return [score / max(1, len(answers) - 1) for score in scores]

    # --- Whether it is better, and whether to go on ---

    def _note_people(self, updated: UpdateReport) -> bool:
        """Whether the gate found that an update loses what people said."""
        lost = f"{PEOPLE}: "
        failures = (one for attempt in updated.attempts for one in attempt["failed"])
        self.against_people = next((one for one in failures if one.startswith(lost)), None)
        return self.against_people is not None

    def _in_doubt(self) -> tuple[Why, str]:
        """That people contradict the judge, and how."""
        assert self.against_people is not None
        self.report.notes.append(
            f"nothing that {self.judge.name} taught in that update serves; calibrate it again "
            f"(`agentpref judge calibrate {self.judge.name}`), or mend its rubric"
        )
        return "people_disagree", self.against_people

    def _probed(self) -> tuple[Duel | None, Duel | None, float | None, tuple[str, ...]]:
        """Compare live with the base on the held-out prompts, by both judges."""
        if not self.probes or self.live == BASE:
            return None, None, None, ()
        now = self._answers(self.live, self.probes)
        given = (now, self.probe_answers, [run.prompt for run in self.probes])
        asking = self._asking()
        fought, opinions = duel(self.judge, *given, self.gold, self.report.spending, asking)
        if self.check is None:
            return fought, None, None, ()
        checked, others = duel(self.check, *given, (), self.report.check_spending, asking)
        self.now = agreement(opinions, others)
        self.first = self.first or self.now
        words = rewarded(now.messages, self.probe_answers.messages, opinions, others)
        return fought, checked, self.now.share, words

    def _ends(self, is_last: bool) -> tuple[Why, str] | None:
        """Why the loop ends now; ``None`` if it goes on."""
        rounds = self.report.rounds
        done = rounds[-1]
        if (deceived := self._deceived(done)) is not None:
            self._take_back(done)
            return "judges_disagree", deceived
        if self.against_people is not None:
            return self._in_doubt()
        if self.report.spending.stopped:
            return "judge_spent", self.report.spending.stopped
        if done.kl is not None and done.kl >= _SPENT * self.config.gate.budget:
            return "kl_budget", (
                f"KL from the base is {done.kl:.3f} of {self.config.gate.budget:g} nats a token"
            )
        lost = [one.revision is None for one in rounds[-_LOST_IN_A_ROW:]]
        if len(lost) == _LOST_IN_A_ROW and all(lost):
            return "nothing_promoted", f"{_LOST_IN_A_ROW} rounds in a row brought nothing better"
        rates = [one.win_rate for one in rounds if one.win_rate is not None and one.revision]
        if len(rates) > 1 and done.revision and rates[-1] < max(rates[:-1]) + _RISE:
            return "no_rise", (
                f"the judged win rate no longer rises: {max(rates[:-1]):.2f}, now {rates[-1]:.2f}"
            )
        if not is_last and self.until is not None and time.monotonic() >= self.until:
            return "time", "the time is over"
        return None

    def _deceived(self, done: Round) -> str | None:
        """In words, how live has learned to please its judge; ``None`` if it has not."""
        if self.parted is not None:
            return self._in_words(self.parted, done)
        if self.check is None or self.now is None:
            return None
        likes = (done.win_rate or 0.0) > 0.5
        why = parting(None if self.now is self.first else self.first, self.now, prefers_live=likes)
        return None if why is None else self._in_words(why, done)

    def _in_words(self, why: str, done: Round) -> str:
        assert self.check is not None
        words = ", ".join(done.words)
        rewards = f"; {self.judge.name} rewards the words: {words}" if words else ""
        return f"{self.judge.name} and {self.check.name} part: {why}{rewards}"

    def _take_back(self, done: Round) -> None:
        """Roll back what the round brought, and let the judge's verdicts train nothing any more."""
        report = self.report
        if done.revision is not None:
            self.router.rollback()
            report.rolled_back = done.revision
            report.notes.append(f"{done.revision} was rolled back; {self.live} serves")
        if self.judge.source == "code":
            report.notes.append(
                f"{self.judge.name} is a rule, whose verdicts go on to train; mend it, and retract "
                "its comparisons"
            )
            return
        empty = {"calibration": self.judge.calibration and self.judge.calibration.to_mapping()}
        found = {**empty, "weights": {}, "gold": "", "distrusted": True}  # no words of answers
        Judges(self.connection).calibrate(self.namespace, self.judge.voter, {}, found)
        report.notes.append(
            f"what {self.judge.name} says trains nothing any more; change its rubric, and run "
            f"`agentpref judge calibrate {self.judge.name}`"
        )


def _present(store: Store, run_ids: Sequence[str]) -> Iterator[Run]:
    """The runs that are there: an answer to what was forgotten meanwhile is not."""
    for run_id in run_ids:
        with suppress(UnknownRun):
            yield store.run(run_id)


def _differ(a: Run, b: Run) -> bool:
    return canonical(a.output) != canonical(b.output)
