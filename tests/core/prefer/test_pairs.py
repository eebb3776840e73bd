"""What becomes a pair, what stays a thumb, and what is left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import ConfigError
from agentpref.home import Home
from agentpref.prefer.pairs import PairSet, build_pairs, pair_id_of, read_pairs, thumb_id_of
from agentpref.prefer.split import is_held_out
from agentpref.prefer.votes import Reason
from agentpref.record.database import connect
from agentpref.record.messages import canonical, prompt_of
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run, Source, Winner

_ids = count()


def run(run_id: str, answer: str | None = None, *, prompt: str = "why?", tag: str = "chat") -> Run:
    """One run whose answer is, unless given, its own id."""
    return Run(
        run_id=run_id,
        namespace="default",
        created_at=0.0,
        prompt=prompt_of([{"role": "user", "content": prompt}]),
        output=says(run_id if answer is None else answer),
        tags=(tag,),
    )


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def thumb(run_id: str, score: float | None, at: float = 1, **fields: Any) -> Feedback:
    fields = {"key": "thumbs", "user_id": "ann"} | fields
    return Feedback(f"f{next(_ids)}", run_id, at, score=score, **fields)


def correct(run_id: str, answer: str, at: float = 1, **fields: Any) -> Feedback:
    return Feedback(
        f"f{next(_ids)}", run_id, at, key="correction", correction=says(answer), **fields
    )


def compare(a: str, b: str, winner: Winner, at: float = 1, **fields: Any) -> Comparison:
    return Comparison(f"c{next(_ids)}", at, a, b, winner, **({"user_id": "ann"} | fields))


def build(runs: Sequence[Run], *said: Feedback | Comparison, judge_noise: float = 0.05) -> PairSet:
    feedback = [row for row in said if isinstance(row, Feedback)]
    comparisons = [row for row in said if isinstance(row, Comparison)]
    return build_pairs(runs, feedback, comparisons, held_out=0.2, judge_noise=judge_noise)


def liked(pairs: PairSet) -> list[tuple[str, str, str]]:
    """Each pair as chosen text, rejected text and origin."""
    return [(p.chosen["content"], p.rejected["content"], p.origin) for p in pairs.pairs]


AB = [run("A"), run("B")]


class TestWhatEachSignalSays:
    def test_a_comparison_is_a_pair(self) -> None:
        row = compare("A", "B", "b")
        (pair,) = build(AB, row).pairs
        assert (pair.chosen, pair.rejected) == (says("B"), says("A"))
        assert (pair.origin, pair.noise, pair.weight, pair.tag) == ("comparison", 0.05, 1.0, "chat")
        assert pair.provenance == (row.comparison_id,)
        assert pair.prompt == AB[0].prompt
        assert pair.pair_id == pair_id_of(AB[0].prompt.id, says("B"), says("A"))

    def test_a_correction_is_preferred_to_what_the_model_wrote(self) -> None:
        result = build([run("A")], correct("A", "better"))
        assert liked(result) == [("better", "A", "correction")]
        assert result.pairs[0].noise == 0.02

    def test_up_and_down_on_the_same_prompt_is_a_pair(self) -> None:
        up, down = thumb("A", 1, user_id="ann"), thumb("B", 0, user_id="bob")
        result = build(AB, up, down)
        assert liked(result) == [("A", "B", "thumbs")]
        assert set(result.pairs[0].provenance) == {up.feedback_id, down.feedback_id}
        assert result.thumbs == ()

    def test_a_lone_thumb_is_kept_as_one(self) -> None:
        result = build(AB, thumb("A", 0, at=3))
        assert result.pairs == ()
        (lone,) = result.thumbs
        assert (lone.run_id, lone.completion, lone.desirable) == ("A", says("A"), False)
        assert (lone.tag, lone.created_at, result.left_out) == ("chat", 3, {})

    def test_thumbs_on_different_prompts_are_lone(self) -> None:
        result = build([run("A"), run("B", prompt="how?")], thumb("A", 1), thumb("B", 0))
        assert [t.desirable for t in result.thumbs] == [True, False]

    def test_one_thumb_stands_for_a_lone_answer_judged_alike_often(self) -> None:
        result = build(AB, thumb("A", 1), thumb("A", 1, user_id="bob"))
        assert len(result.thumbs) == 1
        assert result.left_out == {"repeated": 1}

    def test_a_judge_is_a_judge_and_as_noisy_as_measured(self) -> None:
        said = compare("A", "B", "a", source="model")
        (pair,) = build(AB, said, judge_noise=0.2).pairs
        assert (pair.origin, pair.noise) == ("judge", 0.2)

    def test_a_judges_correction_and_thumbs_weigh_as_a_judges_word(self) -> None:
        by_judge: dict[str, Any] = {"source": "model", "user_id": "gpt"}
        corrected = build([run("A")], correct("A", "better", **by_judge))
        thumbed = build(AB, thumb("A", 1), thumb("B", 0, **by_judge))
        assert liked(corrected) == [("better", "A", "judge")]
        assert liked(thumbed) == [("A", "B", "judge")]

    def test_a_judge_less_noisy_than_people_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"judge_noise is 0.01, but must be from .05 to .5"):
            build(AB, judge_noise=0.01)


class TestWhoWroteTheAnswers:
    A = replace(run("A"), token_ids=(1, 2), revision="rev-1")
    B = replace(run("B"), token_ids=(3,), revision="rev-2")

    @pytest.mark.parametrize(
        "said",
        [
            [compare("A", "B", "b")],
            [compare("B", "A", "a")],
            [thumb("B", 1), thumb("A", 0)],
        ],
    )
    def test_tokens_and_writers_go_with_their_answers(self, said: list[Any]) -> None:
        (pair,) = build([self.A, self.B], *said).pairs
        assert (pair.chosen_ids, pair.chosen_by) == ((3,), "rev-2")
        assert (pair.rejected_ids, pair.rejected_by) == ((1, 2), "rev-1")

    def test_a_correction_is_written_by_no_model(self) -> None:
        (pair,) = build([self.A], correct("A", "better")).pairs
        assert (pair.chosen_ids, pair.chosen_by) == (None, None)
        assert (pair.rejected_ids, pair.rejected_by) == ((1, 2), "rev-1")

    def test_what_nobody_logged_is_not_known(self) -> None:
        (pair,) = build(AB, compare("A", "B", "a")).pairs
        assert {pair.chosen_ids, pair.rejected_ids, pair.chosen_by, pair.rejected_by} == {None}

    @pytest.mark.parametrize("turned", [False, True])
    def test_of_several_runs_the_newest_that_has_tokens_speaks(self, turned: bool) -> None:
        mute = replace(run("A2", "A"), created_at=9.0, revision="rev-9")
        newer = replace(self.A, run_id="A0", created_at=5.0, token_ids=(1, 7), revision="rev-5")
        runs = [self.A, mute, newer, self.B]
        said = [compare(a, "B", "a", user_id=a) for a in ("A", "A2", "A0")]
        (pair,) = build(runs[::-1] if turned else runs, *said).pairs
        assert (pair.chosen_ids, pair.chosen_by) == ((1, 7), "rev-5")

    def test_a_correction_that_a_model_wrote_too_has_its_tokens(self) -> None:
        said = [correct("B", "A"), compare("A", "B", "a")]
        (pair,) = build([self.A, self.B], *said).pairs
        assert (pair.origin, pair.chosen_ids, pair.chosen_by) == ("correction", (1, 2), "rev-1")

    def test_a_lone_thumb_carries_them_too(self) -> None:
        said = thumb("A", 1)
        (lone,) = build([self.A], said).thumbs
        assert (lone.token_ids, lone.written_by) == ((1, 2), "rev-1")
        assert lone.provenance == (said.feedback_id,)
        assert lone.thumb_id == thumb_id_of(self.A.prompt.id, says("A"), True)

    def test_the_thumb_whose_run_has_tokens_stands_for_the_others(self) -> None:
        mute = run("A2", "A")
        first, second = thumb("A2", 1, at=1, user_id="bob"), thumb("A", 1, at=2)
        result = build([mute, self.A], first, second)
        (lone,) = result.thumbs
        assert (lone.run_id, lone.token_ids) == ("A", (1, 2))
        assert (lone.provenance, result.left_out) == ((second.feedback_id,), {"repeated": 1})

    def test_a_thumb_turned_round_is_another_thumb(self) -> None:
        up, down = (build([self.A], thumb("A", score)).thumbs[0] for score in (1, 0))
        assert up.thumb_id != down.thumb_id
        assert up.thumb_id == build([self.A], thumb("A", 1, at=9, user_id="bob")).thumbs[0].thumb_id


class TestScores:
    @pytest.mark.parametrize(("score", "up"), [(1, True), (0, False), (0.6, True), (0.4, False)])
    def test_from_nought_to_one_the_middle_is_a_half(self, score: float, up: bool) -> None:
        assert [t.desirable for t in build(AB, thumb("A", score)).thumbs] == [up]

    def test_where_some_are_negative_the_middle_is_nought(self) -> None:
        runs = [run("A"), run("B", prompt="how?"), run("C", prompt="when?")]
        result = build(runs, thumb("A", -1), thumb("B", 0.3), thumb("C", 0))
        assert {t.run_id: t.desirable for t in result.thumbs} == {"A": False, "B": True}
        assert result.left_out == {"neutral_score": 1}

    def test_a_half_is_neutral(self) -> None:
        assert build(AB, thumb("A", 0.5)).left_out == {"neutral_score": 1}

    def test_one_star_is_never_taken_for_praise(self) -> None:
        said = [thumb("A", 1, key="stars"), thumb("B", 5, key="stars"), thumb("A", 1)]
        result = build(AB, *said)
        assert len(result.thumbs) == 1
        assert result.left_out == {"unknown_scale": 2}

    def test_a_person_may_use_any_key_and_a_program_only_the_plain_one(self) -> None:
        said = [
            thumb("A", 1, key="helpful"),
            thumb("B", 1, key="latency", source="code"),
            thumb("B", None),
        ]
        result = build(AB, *said)
        assert [t.run_id for t in result.thumbs] == ["A"]
        assert result.left_out == {"not_a_thumb": 2}


class TestDisagreement:
    def test_a_newer_opposite_verdict_by_the_same_user_supersedes(self) -> None:
        result = build(AB, compare("A", "B", "b", at=2), compare("A", "B", "a", at=1))
        assert liked(result) == [("B", "A", "comparison")]
        assert result.left_out == {"superseded": 1}

    def test_newer_thumbs_by_the_same_user_supersede_an_older_comparison(self) -> None:
        said = [compare("A", "B", "a", at=1), thumb("A", 0, at=2), thumb("B", 1, at=3)]
        assert liked(build(AB, *said)) == [("B", "A", "thumbs")]

    def test_a_user_who_turns_the_thumb_round_is_heard_as_of_now(self) -> None:
        result = build(AB, thumb("A", 1, at=1), thumb("A", 0, at=2))
        assert [t.desirable for t in result.thumbs] == [False]
        assert result.left_out == {"superseded": 1}

    def test_a_person_outweighs_a_judge(self) -> None:
        said = [compare("A", "B", "a"), compare("A", "B", "b", at=2, source="model")]
        result = build(AB, *said)
        assert liked(result) == [("A", "B", "comparison")]
        assert result.left_out == {"outvoted": 1}

    def test_a_thumb_that_loses_one_match_and_carries_another_is_not_left_out(self) -> None:
        said = [thumb("A", 1), thumb("B", 0), thumb("C", 0), compare("A", "B", "b", user_id="bob")]
        result = build([*AB, run("C")], *said)
        assert set(liked(result)) == {("B", "A", "comparison"), ("A", "C", "thumbs")}
        assert result.left_out == {"outvoted": 1}

    def test_two_people_who_disagree_make_no_pair(self) -> None:
        said = [compare("A", "B", "a"), compare("A", "B", "b", user_id="bob")]
        result = build(AB, *said)
        assert (result.pairs, result.left_out) == ((), {"contradicted": 2})

    def test_signals_that_agree_are_one_pair_of_the_strongest_origin(self) -> None:
        said = [
            thumb("A", 1, at=1),
            thumb("B", 0, at=2),
            compare("A", "B", "a", at=3, source="model"),
            compare("B", "A", "b", at=4),
            correct("B", "A", at=5),
        ]
        (pair,) = build(AB, *said).pairs
        assert (pair.origin, pair.noise, pair.created_at) == ("correction", 0.02, 2)
        assert len(pair.provenance) == 5

    def test_a_judge_that_flips_with_the_order_makes_no_pair(self) -> None:
        first, second = (
            compare("A", "B", "a", source="model"),
            compare("B", "A", "a", at=2, source="model"),
        )
        result = build(AB, first, second)
        assert (result.pairs, result.left_out) == ((), {"judge_flipped": 2})

    def test_a_judge_that_holds_in_both_orders_makes_one(self) -> None:
        first = compare("A", "B", "a", source="model")
        second = replace(first.swap(), comparison_id="other")
        assert len(build(AB, first, second).pairs[0].provenance) == 2

    def test_two_judges_do_not_flip_each_other(self) -> None:
        first = compare("A", "B", "a", source="model", user_id="gpt")
        second = compare("B", "A", "a", source="model", user_id="claude")
        assert build(AB, first, second).left_out == {"contradicted": 2}

    def test_a_person_may_change_their_mind_in_any_order(self) -> None:
        said = [compare("A", "B", "a", at=1), compare("B", "A", "a", at=2)]
        assert liked(build(AB, *said)) == [("B", "A", "comparison")]


class TestLeftOut:
    def test_ties_are_counted(self) -> None:
        assert build(AB, compare("A", "B", "tie")).left_out == {"tie": 1}

    def test_identical_answers_are_counted(self) -> None:
        runs = [run("A", "same"), run("B", "same")]
        said = [compare("A", "B", "a"), correct("A", "same")]
        assert build(runs, *said).left_out == {"identical_answers": 2}

    def test_runs_that_are_not_here_are_counted(self) -> None:
        said = [compare("A", "gone", "a"), thumb("gone", 1), correct("gone", "x")]
        assert build(AB, *said).left_out == {"unknown_run": 3}

    def test_runs_of_different_prompts_are_counted(self) -> None:
        runs = [run("A"), run("B", prompt="how?")]
        assert build(runs, compare("A", "B", "a")).left_out == {"different_prompts": 1}

    def test_a_popular_prompt_gives_its_newest_four_thumbs_pairs(self) -> None:
        runs = [run(f"up{n}") for n in range(6)] + [run("down")]
        said = [thumb(f"up{n}", 1, at=n) for n in range(6)]
        result = build(runs, *said, thumb("down", 0))
        assert {chosen for chosen, _, _ in liked(result)} == {"up2", "up3", "up4", "up5"}
        assert result.left_out == {"over_limit": 2}


RUNS = [
    replace(run("r0", "yes", tag="x"), token_ids=(1, 2), revision="rev-1"),
    replace(run("r1", "no"), revision="rev-2"),
    replace(run("r2", "yes"), token_ids=(3,)),
    run("r3", "perhaps", tag="y"),
    run("r4", "yes", prompt="how?"),
    run("r5", "no", prompt="how?"),
]
a_run = st.sampled_from([*(r.run_id for r in RUNS), "gone"])
a_time = st.integers(0, 3).map(float)
a_source = st.sampled_from(get_args(Source))
a_user = st.sampled_from([None, "ann", "bob"])
a_score = st.sampled_from([None, 0.0, 0.5, 1.0, 1.0, 0.0, -1.0, 5.0])
a_correction = st.sampled_from([None, None, None, says("yes"), says("at length")])
feedbacks = st.lists(
    st.builds(
        Feedback,
        feedback_id=st.just(""),
        run_id=a_run,
        created_at=a_time,
        key=st.sampled_from(["thumbs", "thumbs", "stars", "mood"]),
        score=a_score,
        source=a_source,
        user_id=a_user,
        correction=a_correction,
    ),
    max_size=12,
).map(lambda rows: [replace(row, feedback_id=f"f{n}") for n, row in enumerate(rows)])
verdicts = st.lists(
    st.builds(
        Comparison,
        comparison_id=st.just(""),
        created_at=a_time,
        run_a=a_run,
        run_b=a_run,
        winner=st.sampled_from(get_args(Winner)),
        source=a_source,
        user_id=a_user,
    ),
    max_size=12,
).map(lambda rows: [replace(row, comparison_id=f"c{n}") for n, row in enumerate(rows)])


def built(feedback: Sequence[Feedback], comparisons: Sequence[Comparison]) -> PairSet:
    return build_pairs(RUNS, feedback, comparisons, held_out=0.5)


class TestLaws:
    @given(feedbacks, verdicts)
    def test_every_row_ends_in_exactly_one_place(
        self, feedback: list[Feedback], comparisons: list[Comparison]
    ) -> None:
        result = built(feedback, comparisons)
        in_pairs = {row for pair in result.pairs for row in pair.provenance}
        counted = len(in_pairs) + len(result.thumbs) + sum(result.left_out.values())
        assert counted == len(feedback) + len(comparisons)
        assert set(result.left_out) <= set(get_args(Reason))
        in_thumbs = [row for thumb in result.thumbs for row in thumb.provenance]
        assert in_pairs.isdisjoint(in_thumbs)
        assert len(set(in_thumbs)) == len(result.thumbs)

    @given(feedbacks, verdicts)
    def test_tokens_come_from_a_run_that_wrote_the_answer_and_was_judged(
        self, feedback: list[Feedback], comparisons: list[Comparison]
    ) -> None:
        runs_of: dict[str, set[str]] = {row.feedback_id: {row.run_id} for row in feedback}
        runs_of |= {row.comparison_id: {row.run_a, row.run_b} for row in comparisons}
        result = built(feedback, comparisons)
        told = [
            (made.prompt, answer, ids, by, made.provenance)
            for pair in result.pairs
            for made, answer, ids, by in (
                (pair, pair.chosen, pair.chosen_ids, pair.chosen_by),
                (pair, pair.rejected, pair.rejected_ids, pair.rejected_by),
            )
        ]
        told += [
            (t.prompt, t.completion, t.token_ids, t.written_by, t.provenance) for t in result.thumbs
        ]
        for prompt, answer, ids, by, rows in told:
            judged = set().union(*(runs_of[row] for row in rows))
            wrote = [r for r in RUNS if (r.prompt, r.output) == (prompt, answer)]
            known = {(r.token_ids, r.revision) for r in wrote if r.run_id in judged}
            assert (ids, by) in (known or {(None, None)})

    @given(feedbacks, verdicts)
    def test_naming_the_two_runs_the_other_way_round_changes_nothing(
        self, feedback: list[Feedback], comparisons: list[Comparison]
    ) -> None:
        swapped = [row.swap() for row in comparisons]
        assert built(feedback, swapped) == built(feedback, comparisons)

    @given(feedbacks, verdicts, st.randoms())
    def test_the_order_of_the_rows_changes_nothing(
        self, feedback: list[Feedback], comparisons: list[Comparison], random: Any
    ) -> None:
        before = built(feedback, comparisons)
        runs = list(RUNS)
        for rows in (runs, feedback, comparisons):
            random.shuffle(rows)
        assert build_pairs(runs, feedback, comparisons, held_out=0.5) == before

    @given(feedbacks, verdicts)
    def test_other_names_for_runs_and_users_change_no_preference(
        self, feedback: list[Feedback], comparisons: list[Comparison]
    ) -> None:
        def named(name: str | None) -> str | None:
            return name and "".join(chr(0x2000 - ord(letter)) for letter in name)  # sorts backwards

        runs = [replace(r, run_id=named(r.run_id)) for r in RUNS]
        renamed = [replace(f, run_id=named(f.run_id), user_id=named(f.user_id)) for f in feedback]
        recompared = [
            replace(c, run_a=named(c.run_a), run_b=named(c.run_b), user_id=named(c.user_id))
            for c in comparisons
        ]
        before = built(feedback, comparisons)
        after = build_pairs(runs, renamed, recompared, held_out=0.5)
        assert (after.pairs, after.left_out) == (before.pairs, before.left_out)
        assert {named(t.run_id) for t in before.thumbs} == {t.run_id for t in after.thumbs}

    @given(feedbacks, verdicts)
    def test_pairs_are_distinct_consistent_sorted_and_split_by_prompt(
        self, feedback: list[Feedback], comparisons: list[Comparison]
    ) -> None:
        pairs = built(feedback, comparisons).pairs
        questions = [
            (p.prompt.id, frozenset((canonical(p.chosen), canonical(p.rejected)))) for p in pairs
        ]
        assert len(set(questions)) == len(pairs)
        assert all(len(answers) == 2 for _, answers in questions)
        assert list(pairs) == sorted(pairs, key=lambda p: (p.created_at, p.pair_id))
        assert all(p.held_out == is_held_out(p.prompt.messages, 0.5) for p in pairs)


def test_pairs_are_read_from_a_home_one_namespace_at_a_time(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home")
    with closing(connect(home)) as connection:
        store = Store(connection)
        for one in AB:
            store.add_run(one)
            store.add_run(replace(one, run_id=f"other-{one.run_id}", namespace="other"))
        store.add_run(run("C", prompt="how?"))
        store.add_comparison(compare("A", "B", "a"))
        store.add_feedback(correct("A", "better"))
        store.add_feedback(thumb("C", 1))
        store.add_comparison(compare("other-A", "other-B", "b"))
        result = read_pairs(store, "default", held_out=0.2)
        other = read_pairs(store, "other", held_out=0.2, judge_noise=0.1)
    assert set(liked(result)) == {("A", "B", "comparison"), ("better", "A", "correction")}
    assert [t.run_id for t in result.thumbs] == ["C"]
    assert liked(other) == [("B", "A", "comparison")]
