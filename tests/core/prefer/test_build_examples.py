"""Which signals make an example, and why the others are left out."""

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

from agentpref.home import Home
from agentpref.prefer.examples import (
    ExampleSet,
    build_examples,
    example_id_of,
    is_held_out,
    read_examples,
    split_point,
)
from agentpref.prefer.votes import Reason
from agentpref.record.database import connect
from agentpref.record.messages import canonical, prompt_of
from agentpref.record.scales import Scale
from agentpref.record.standards import Standards
from agentpref.record.store import Store
from agentpref.types import (
    INCOMPLETE,
    RETRACTION,
    UNKNOWN_BEFORE,
    Comparison,
    Completion,
    Example,
    Feedback,
    Run,
    Source,
    Winner,
)

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


JUDGES = {"gpt": {"chat": 0.2}, "claude": {"chat": 0.3, "sums": 0.1}}
"""The judges that are trusted, and how often each is wrong, by tag."""


def build(runs: Sequence[Run], *said: Feedback | Comparison) -> ExampleSet:
    feedback = [row for row in said if isinstance(row, Feedback)]
    comparisons = [row for row in said if isinstance(row, Comparison)]
    standards = Standards(judges=JUDGES)
    return build_examples(runs, feedback, comparisons, held_out=0.2, standards=standards)


def answers(example: Example) -> tuple[Any, ...]:
    """The messages of an example's completions."""
    return tuple(completion.message for completion in example.completions)


def labels(example: Example) -> tuple[float | None, ...]:
    return tuple(completion.label for completion in example.completions)


def likes(thumbs: Sequence[Example]) -> list[bool]:
    """Whether each lone completion was liked."""
    return [labels(thumb) == (1.0,) for thumb in thumbs]


def preferred(found: ExampleSet) -> list[tuple[str, str, str]]:
    """Each pair as chosen text, rejected text and origin."""
    return [(*(text["content"] for text in answers(p)), p.origin) for p in found.pairs]


AB = [run("A"), run("B")]


class TestSignals:
    def test_a_comparison_makes_a_pair(self) -> None:
        row = compare("A", "B", "b")
        (pair,) = build(AB, row).pairs
        assert (answers(pair), labels(pair)) == ((says("B"), says("A")), (1.0, 0.0))
        assert (pair.origin, pair.noise, pair.weight, pair.tag) == ("comparison", 0.05, 1.0, "chat")
        assert pair.provenance == (row.comparison_id,)
        assert pair.prompt == AB[0].prompt
        assert pair.example_id == example_id_of(AB[0].prompt.id, pair.completions)

    def test_a_correction_is_preferred_to_what_the_model_wrote(self) -> None:
        result = build([run("A")], correct("A", "better"))
        assert preferred(result) == [("better", "A", "correction")]
        assert result.pairs[0].noise == 0.02

    def test_a_liked_and_a_disliked_answer_to_the_same_prompt_make_a_pair(self) -> None:
        up, down = thumb("A", 1, user_id="ann"), thumb("B", 0, user_id="bob")
        result = build(AB, up, down)
        assert preferred(result) == [("A", "B", "thumbs")]
        assert set(result.pairs[0].provenance) == {up.feedback_id, down.feedback_id}
        assert result.thumbs == ()

    def test_a_thumb_with_no_opposite_makes_an_example_of_one_completion(self) -> None:
        result = build(AB, thumb("A", 0, at=3))
        assert result.pairs == ()
        (lone,) = result.thumbs
        assert (lone.lone, answers(lone), labels(lone)) == (True, (says("A"),), (0.0,))
        assert (lone.origin, lone.tag, lone.created_at) == ("thumb", "chat", 3)
        assert result.left_out == {}

    def test_thumbs_on_different_prompts_stay_lone(self) -> None:
        result = build([run("A"), run("B", prompt="how?")], thumb("A", 1), thumb("B", 0, at=2))
        assert likes(result.thumbs) == [True, False]

    def test_two_likes_of_one_answer_make_one_example(self) -> None:
        result = build(AB, thumb("A", 1), thumb("A", 1, user_id="bob"))
        assert len(result.thumbs) == 1
        assert result.left_out == {"repeated": 1}

    def test_a_comparison_by_a_judge_has_the_noise_that_was_measured_in_its_tag(self) -> None:
        by_judge: dict[str, Any] = {"source": "model", "user_id": "claude"}
        (pair,) = build(AB, compare("A", "B", "a", **by_judge)).pairs
        assert (pair.origin, pair.noise) == ("judge", 0.3)
        tagged = [replace(one, tags=("sums",)) for one in AB]
        assert build(tagged, compare("A", "B", "a", **by_judge)).pairs[0].noise == 0.1

    @pytest.mark.parametrize("name", ["llama", None])
    def test_what_a_judge_says_that_nobody_calibrated_makes_nothing(self, name: Any) -> None:
        by_judge: dict[str, Any] = {"source": "model", "user_id": name}
        said = [
            compare("A", "B", "a", **by_judge),
            thumb("A", 1, **by_judge),
            correct("B", "better", **by_judge),
        ]
        result = build(AB, *said)
        assert (result.examples, result.left_out) == ((), {"uncalibrated_judge": 3})

    def test_a_judge_makes_nothing_in_a_tag_in_which_it_is_not_trusted(self) -> None:
        tagged = [replace(one, tags=("jokes",)) for one in AB]
        said = compare("A", "B", "a", source="model", user_id="claude")
        assert build(tagged, said).left_out == {"uncalibrated_judge": 1}

    def test_what_a_program_says_needs_no_calibration(self) -> None:
        (pair,) = build(AB, compare("A", "B", "a", source="code", user_id=None)).pairs
        assert (pair.origin, pair.noise) == ("judge", 0.05)

    def test_of_two_judges_that_agree_the_one_that_errs_less_counts(self) -> None:
        said = [compare("A", "B", "a", source="model", user_id=name) for name in ("gpt", "claude")]
        (pair,) = build(AB, *said).pairs
        assert (pair.noise, len(pair.provenance)) == (0.2, 2)

    def test_a_person_who_agrees_with_a_judge_makes_it_a_persons_pair(self) -> None:
        said = [compare("A", "B", "a"), compare("A", "B", "a", source="model", user_id="gpt")]
        (pair,) = build(AB, *said).pairs
        assert (pair.origin, pair.noise) == ("comparison", 0.05)

    def test_a_correction_and_thumbs_by_a_judge_have_the_origin_judge(self) -> None:
        by_judge: dict[str, Any] = {"source": "model", "user_id": "gpt"}
        corrected = build([run("A")], correct("A", "better", **by_judge))
        thumbed = build(AB, thumb("A", 1), thumb("B", 0, **by_judge))
        assert preferred(corrected) == [("better", "A", "judge")]
        assert preferred(thumbed) == [("A", "B", "judge")]

    @pytest.mark.parametrize("by", ["comment", "critique"])
    def test_a_judge_who_prefers_a_revision_has_the_origin_of_what_it_was_revised_by(
        self, by: str
    ) -> None:
        """Only a judge, only of that answer, and only where the revision is the better one."""
        about = {"revised_from": "A", "revised_by": by}
        runs = [run("A"), replace(run("B"), metadata=about), run("C")]
        by_judge: dict[str, Any] = {"source": "model", "user_id": "gpt"}
        (pair,) = build(runs, compare("A", "B", "b", **by_judge)).pairs
        assert (pair.origin, pair.noise) == (by, 0.2)
        others: list[tuple[str, str, Winner, dict[str, Any], str]] = [
            ("A", "B", "a", by_judge, "judge"),
            ("C", "B", "b", by_judge, "judge"),
            ("A", "B", "b", {}, "comparison"),
        ]
        for a, b, winner, by_whom, origin in others:
            assert build(runs, compare(a, b, winner, **by_whom)).pairs[0].origin == origin

    def test_people_outvote_a_judge_who_prefers_a_revision(self) -> None:
        about = {"revised_from": "A", "revised_by": "comment"}
        runs = [run("A"), replace(run("B"), metadata=about)]
        by_judge = compare("A", "B", "b", source="model", user_id="gpt")
        liked = [thumb("A", 1), thumb("B", 0, user_id="bob")]
        assert preferred(build(runs, by_judge, *liked)) == [("A", "B", "thumbs")]

    @pytest.mark.parametrize("by", [{}, {"revised_by": 3}])
    def test_a_revision_by_something_unknown_is_a_judges_pair(self, by: dict[str, Any]) -> None:
        runs = [run("A"), replace(run("B"), metadata={"revised_from": "A"} | by)]
        said = compare("A", "B", "b", source="model", user_id="gpt")
        assert build(runs, said).pairs[0].origin == "judge"


def tokens_and_authors(example: Example) -> list[tuple[Any, Any]]:
    """The logged tokens and the author of each completion."""
    return [(completion.token_ids, completion.author) for completion in example.completions]


class TestTokensAndAuthors:
    A = replace(run("A"), token_ids=(1, 2), logprobs=(-0.5, -2.0), revision="rev-1")
    B = replace(run("B"), token_ids=(3,), revision="rev-2")

    @pytest.mark.parametrize(
        "said",
        [
            [compare("A", "B", "b")],
            [compare("B", "A", "a")],
            [thumb("B", 1), thumb("A", 0)],
        ],
    )
    def test_each_completion_has_the_tokens_and_the_author_of_its_run(
        self, said: list[Any]
    ) -> None:
        (pair,) = build([self.A, self.B], *said).pairs
        assert tokens_and_authors(pair) == [((3,), "rev-2"), ((1, 2), "rev-1")]
        assert [c.logprobs for c in pair.completions] == [None, (-0.5, -2.0)]

    def test_a_correction_has_neither_tokens_nor_an_author(self) -> None:
        (pair,) = build([self.A], correct("A", "better")).pairs
        assert tokens_and_authors(pair) == [(None, None), ((1, 2), "rev-1")]

    def test_runs_logged_without_tokens_and_revision_give_none(self) -> None:
        (pair,) = build(AB, compare("A", "B", "a")).pairs
        assert tokens_and_authors(pair) == [(None, None)] * 2

    @pytest.mark.parametrize("turned", [False, True])
    def test_of_several_runs_with_the_same_answer_the_newest_with_tokens_counts(
        self, turned: bool
    ) -> None:
        mute = replace(run("A2", "A"), created_at=9.0, revision="rev-9")
        newer = replace(self.A, run_id="A0", created_at=5.0, token_ids=(1, 7), revision="rev-5")
        runs = [self.A, mute, newer, self.B]
        said = [compare(a, "B", "a", user_id=a) for a in ("A", "A2", "A0")]
        (pair,) = build(runs[::-1] if turned else runs, *said).pairs
        assert tokens_and_authors(pair)[0] == ((1, 7), "rev-5")

    def test_a_correction_that_a_model_wrote_too_has_its_tokens(self) -> None:
        said = [correct("B", "A"), compare("A", "B", "a")]
        (pair,) = build([self.A, self.B], *said).pairs
        assert (pair.origin, tokens_and_authors(pair)[0]) == ("correction", ((1, 2), "rev-1"))

    def test_a_lone_thumb_has_the_tokens_and_the_author_of_its_run(self) -> None:
        said = thumb("A", 1)
        (lone,) = build([self.A], said).thumbs
        assert tokens_and_authors(lone) == [((1, 2), "rev-1")]
        assert lone.completions[0].logprobs == (-0.5, -2.0)
        assert lone.provenance == (said.feedback_id,)
        assert lone.example_id == example_id_of(
            self.A.prompt.id, (Completion(says("A"), label=1.0),)
        )

    def test_of_several_thumbs_on_one_answer_the_one_whose_run_has_tokens_is_kept(self) -> None:
        mute = run("A2", "A")
        first, second = thumb("A2", 1, at=1, user_id="bob"), thumb("A", 1, at=2)
        result = build([mute, self.A], first, second)
        (lone,) = result.thumbs
        assert (answers(lone), tokens_and_authors(lone)) == ((says("A"),), [((1, 2), "rev-1")])
        assert (lone.provenance, result.left_out) == ((second.feedback_id,), {"repeated": 1})

    def test_examples_have_the_trace_and_the_time_of_their_run(self) -> None:
        runs = [replace(r, trace_id="task", created_at=7.0) for r in (self.A, self.B)]
        (pair,) = build(runs, compare("A", "B", "a")).pairs
        (lone,) = build(runs, thumb("A", 1)).thumbs
        assert [(made.trace_id, made.run_at) for made in (pair, lone)] == [("task", 7.0)] * 2


class TestIds:
    def test_a_liked_and_a_disliked_answer_have_different_ids(self) -> None:
        up, down = (build(AB, thumb("A", score)).thumbs[0] for score in (1, 0))
        assert up.example_id != down.example_id
        later = build(AB, thumb("A", 1, at=9, user_id="bob")).thumbs[0]
        assert up.example_id == later.example_id

    def test_ids_are_those_of_version_0_1(self) -> None:
        """Homes say by these ids which pairs and thumbs a revision has learned."""
        prompt = AB[0].prompt.id
        better, worse = Completion(says("B"), 1.0), Completion(says("A"), 0.0)
        assert example_id_of(prompt, (better, worse)) == "6a23825616805e115371e3fa4fe4a120"
        for label, thumb_id in (
            (1.0, "b47ade6baadc4ea47a634064a16adbd7"),
            (0.0, "a7659cf5ad57eec22a95b57f5473cfe9"),
        ):
            assert example_id_of(prompt, (Completion(says("A"), label),)) == thumb_id

    def test_the_id_of_a_group_covers_its_labels(self) -> None:
        def group(*labels: float) -> str:
            made = [Completion(says(str(n)), label) for n, label in enumerate(labels)]
            return example_id_of(AB[0].prompt.id, made)

        assert group(1.0, 0.5, 0.0) == group(1.0, 0.5, 0.0)
        assert len({group(1.0, 0.5, 0.0), group(1.0, 0.4, 0.0), group(1.0, 0.5)}) == 3


class TestScores:
    @pytest.mark.parametrize(("score", "up"), [(1, True), (0, False), (0.6, True), (0.4, False)])
    def test_scores_from_0_to_1_are_likes_above_a_half(self, score: float, up: bool) -> None:
        assert likes(build(AB, thumb("A", score)).thumbs) == [up]

    def test_scores_of_a_key_with_negative_ones_are_likes_above_0(self) -> None:
        runs = [run("A"), run("B", prompt="how?"), run("C", prompt="when?")]
        on = {"scale": (-1, 1)}
        result = build(runs, thumb("A", -1), thumb("B", 0.3, **on), thumb("C", 0, **on))
        assert {answers(t)[0]["content"]: labels(t) for t in result.thumbs} == {
            "A": (0.0,),
            "B": (1.0,),
        }
        assert result.left_out == {"neutral_score": 1}

    def test_imported_dislikes_stay_dislikes_beside_a_negative_score(self) -> None:
        said = [thumb("A", 1, scale=(0, 1)), thumb("B", 0, scale=(0, 1))]
        result = build(AB, *said, thumb("B", -1, user_id="bob"))
        assert preferred(result) == [("A", "B", "thumbs")]
        assert result.left_out == {}

    @pytest.mark.parametrize(("score", "up"), [(1, [False]), (3, []), (4, [True])])
    def test_stars_with_a_scale_are_likes_above_its_middle(
        self, score: float, up: list[bool]
    ) -> None:
        assert likes(build(AB, thumb("A", score, scale=(1, 5))).thumbs) == up

    def test_a_score_of_a_half_is_left_out_as_neutral(self) -> None:
        assert build(AB, thumb("A", 0.5)).left_out == {"neutral_score": 1}

    def test_a_stray_score_under_thumbs_switches_no_other_thumb_off(self) -> None:
        result = build(AB, thumb("A", 99), thumb("A", 1), thumb("B", 0))
        assert preferred(result) == [("A", "B", "thumbs")]
        assert result.left_out == {"unknown_scale": 1}

    def test_stars_are_left_out_and_never_read_as_likes(self) -> None:
        said = [thumb("A", 1, key="stars"), thumb("B", 5, key="stars"), thumb("A", 1)]
        result = build(AB, *said)
        assert len(result.thumbs) == 1
        assert result.left_out == {"undeclared_key": 2}

    def test_stars_of_a_declared_key_count_on_its_scale_unless_they_have_their_own(self) -> None:
        said = [
            thumb("A", 2, key="stars"),
            thumb("B", 4, key="stars"),
            thumb("B", 9, key="stars", user_id="bob", scale=(0, 10)),
            thumb("A", 9, key="stars", user_id="cy"),
        ]
        declared = [Scale("stars", "human", 1, 5)]
        result = build_examples(AB, said, [], held_out=0.2, standards=Standards((*declared,)))
        assert preferred(result) == [("B", "A", "thumbs")]
        assert result.left_out == {"unknown_scale": 1}

    def test_a_key_is_declared_for_each_kind_of_source(self) -> None:
        said = [thumb("A", 1, key="k"), thumb("B", 0, key="k", source="code", scale=(0, 1))]
        result = build_examples(
            AB, said, [], held_out=0.2, standards=Standards((Scale("k", "human", 0, 1),))
        )
        assert likes(result.thumbs) == [True]
        assert result.left_out == {"undeclared_key": 1}

    def test_measurements_and_words_are_no_preferences(self) -> None:
        said = [
            thumb("A", 1),
            thumb("B", 1, key="helpful"),
            thumb("B", 1, key="latency", source="code"),
            thumb("B", None),
        ]
        result = build(AB, *said)
        assert [answers(t) for t in result.thumbs] == [(says("A"),)]
        assert result.left_out == {"undeclared_key": 2, "no_score": 1}


class TestDisagreement:
    def test_a_newer_verdict_by_the_same_user_supersedes_the_older(self) -> None:
        result = build(AB, compare("A", "B", "b", at=2), compare("A", "B", "a", at=1))
        assert preferred(result) == [("B", "A", "comparison")]
        assert result.left_out == {"superseded": 1}

    def test_newer_thumbs_by_the_same_user_supersede_an_older_comparison(self) -> None:
        said = [compare("A", "B", "a", at=1), thumb("A", 0, at=2), thumb("B", 1, at=3)]
        assert preferred(build(AB, *said)) == [("B", "A", "thumbs")]

    def test_a_newer_opposite_thumb_by_the_same_user_supersedes_the_older(self) -> None:
        result = build(AB, thumb("A", 1, at=1), thumb("A", 0, at=2))
        assert likes(result.thumbs) == [False]
        assert result.left_out == {"superseded": 1}

    @pytest.mark.parametrize(
        "neutral", [{"score": 0.5}, {"score": 0, "scale": (-1, 1)}, {"score": 3, "scale": (1, 5)}]
    )
    def test_a_newer_neutral_score_by_the_same_user_withdraws_the_older(
        self, neutral: dict[str, Any]
    ) -> None:
        pair = [thumb("A", 1, at=1), thumb("B", 0, at=1)]
        result = build(AB, *pair, thumb("A", at=2, **neutral))
        assert (result.pairs, likes(result.thumbs)) == ((), [False])
        assert result.left_out == {"neutral_score": 1, "superseded": 1}
        assert preferred(build(AB, *pair, thumb("A", at=2, user_id="bob", **neutral))) == [
            ("A", "B", "thumbs")
        ]

    def test_a_newer_correction_by_the_same_user_supersedes_the_older(self) -> None:
        said = [correct("A", "better", at=1), correct("A", "best", at=2)]
        result = build([run("A")], *said)
        assert preferred(result) == [("best", "A", "correction")]
        assert result.left_out == {"superseded": 1}

    def test_a_correction_back_to_the_original_withdraws_the_older(self) -> None:
        said = [correct("A", "better", at=1), correct("A", "A", at=2)]
        result = build([run("A")], *said)
        assert (result.pairs, result.left_out) == ((), {"identical_answers": 1, "superseded": 1})
        other = correct("A", "best", at=1, user_id="bob")
        assert preferred(build([run("A")], *said, other)) == [("best", "A", "correction")]

    def test_a_judge_that_was_taken_back_in_one_order_is_not_flipped(self) -> None:
        said = [
            compare("A", "B", "a", source="model", user_id="gpt"),
            compare("B", "A", "a", at=2, source="model", user_id="gpt"),
        ]
        by_judge = {"source": "model", "user_id": "gpt"}
        fields = {"key": RETRACTION, "value": {"key": "comparison"}, **by_judge}
        result = build(AB, said[0], thumb("A", None, at=1, **fields), said[1])
        assert preferred(result) == [("B", "A", "judge")]
        assert result.left_out == {"retracted": 1, "retraction": 1}

    def test_a_person_outweighs_a_judge(self) -> None:
        said = [compare("A", "B", "a"), compare("A", "B", "b", at=2, source="model", user_id="gpt")]
        result = build(AB, *said)
        assert preferred(result) == [("A", "B", "comparison")]
        assert result.left_out == {"outvoted": 1}

    def test_a_thumb_that_loses_one_match_and_carries_another_is_not_left_out(self) -> None:
        said = [thumb("A", 1), thumb("B", 0), thumb("C", 0), compare("A", "B", "b", user_id="bob")]
        result = build([*AB, run("C")], *said)
        assert set(preferred(result)) == {("B", "A", "comparison"), ("A", "C", "thumbs")}
        assert result.left_out == {"outvoted": 1}

    def test_two_people_who_contradict_each_other_make_no_pair(self) -> None:
        said = [compare("A", "B", "a"), compare("A", "B", "b", user_id="bob")]
        result = build(AB, *said)
        assert (result.pairs, result.left_out) == ((), {"contradicted": 2})

    def test_signals_that_agree_make_one_pair_of_the_strongest_origin(self) -> None:
        said = [
            thumb("A", 1, at=1),
            thumb("B", 0, at=2),
            compare("A", "B", "a", at=3, source="model", user_id="gpt"),
            compare("B", "A", "b", at=4),
            correct("B", "A", at=5),
        ]
        (pair,) = build(AB, *said).pairs
        assert (pair.origin, pair.noise, pair.created_at) == ("correction", 0.02, 2)
        assert len(pair.provenance) == 5

    def test_a_judge_that_contradicts_itself_in_the_other_order_makes_no_pair(self) -> None:
        first, second = (
            compare("A", "B", "a", source="model", user_id="gpt"),
            compare("B", "A", "a", at=2, source="model", user_id="gpt"),
        )
        result = build(AB, first, second)
        assert (result.pairs, result.left_out) == ((), {"judge_flipped": 2})

    def test_a_judge_that_agrees_in_both_orders_makes_one_pair(self) -> None:
        first = compare("A", "B", "a", source="model", user_id="gpt")
        second = replace(first.swap(), comparison_id="other")
        assert len(build(AB, first, second).pairs[0].provenance) == 2

    def test_two_judges_that_disagree_contradict_each_other(self) -> None:
        first = compare("A", "B", "a", source="model", user_id="gpt")
        second = compare("B", "A", "a", source="model", user_id="claude")
        assert build(AB, first, second).left_out == {"contradicted": 2}

    def test_a_person_who_changes_the_verdict_in_the_other_order_supersedes_it(
        self,
    ) -> None:
        said = [compare("A", "B", "a", at=1), compare("B", "A", "a", at=2)]
        assert preferred(build(AB, *said)) == [("B", "A", "comparison")]


class TestLeftOut:
    def test_ties_are_counted_and_make_no_pair(self) -> None:
        assert build(AB, compare("A", "B", "tie")).left_out == {"tie": 1}

    def test_signals_between_identical_answers_are_counted(self) -> None:
        runs = [run("A", "same"), run("B", "same")]
        said = [compare("A", "B", "a"), correct("A", "same")]
        assert build(runs, *said).left_out == {"identical_answers": 2}

    def test_signals_on_unknown_runs_are_counted(self) -> None:
        said = [compare("A", "gone", "a"), thumb("gone", 1), correct("gone", "x")]
        assert build(AB, *said).left_out == {"unknown_run": 3}

    def test_comparisons_of_runs_with_different_prompts_are_counted(self) -> None:
        runs = [run("A"), run("B", prompt="how?")]
        assert build(runs, compare("A", "B", "a")).left_out == {"different_prompts": 1}

    def test_what_is_said_of_an_answer_that_broke_off_is_counted_and_makes_no_example(self) -> None:
        broken = replace(run("B"), metadata={"finish_reason": INCOMPLETE})
        cut = replace(run("C"), metadata={"finish_reason": "length"})
        said = [compare("A", "B", "a"), thumb("B", 0), correct("B", "x"), thumb("C", 0)]
        result = build([run("A"), broken, cut], *said)
        assert result.left_out == {"incomplete_answer": 3}
        assert [one.completions[0].message["content"] for one in result.thumbs] == ["C"]

    def test_what_is_said_where_the_beginning_of_the_conversation_is_unknown_makes_no_example(
        self,
    ) -> None:
        partial = replace(run("B"), metadata={UNKNOWN_BEFORE: "resp_7"})
        said = [compare("A", "B", "a"), thumb("B", 0), correct("B", "x"), thumb("A", 1)]
        result = build([run("A"), partial], *said)
        assert result.left_out == {"incomplete_prompt": 3}
        assert [one.completions[0].message["content"] for one in result.thumbs] == ["A"]

    def test_a_prompt_with_many_thumbs_gives_the_newest_four_pairs(self) -> None:
        runs = [run(f"up{n}") for n in range(6)] + [run("down")]
        said = [thumb(f"up{n}", 1, at=n) for n in range(6)]
        result = build(runs, *said, thumb("down", 0))
        assert {chosen for chosen, _, _ in preferred(result)} == {"up2", "up3", "up4", "up5"}
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
        key=st.sampled_from(["thumbs", "thumbs", "stars", "mood", RETRACTION]),
        score=a_score,
        value=st.sampled_from([None, {"key": "thumbs"}, {"key": None}, {"key": "comparison"}]),
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


def built(feedback: Sequence[Feedback], comparisons: Sequence[Comparison]) -> ExampleSet:
    return build_examples(RUNS, feedback, comparisons, held_out=0.5)


class TestLaws:
    @pytest.mark.guarantee("learning")
    @given(feedbacks, verdicts)
    def test_every_row_is_in_one_example_or_in_left_out(
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
            (made.prompt, own.message, own.token_ids, own.author, made.provenance)
            for made in result.examples
            for own in made.completions
        ]
        for prompt, answer, ids, by, rows in told:
            judged = set().union(*(runs_of[row] for row in rows))
            wrote = [r for r in RUNS if (r.prompt, r.output) == (prompt, answer)]
            known = {(r.token_ids, r.revision) for r in wrote if r.run_id in judged}
            assert (ids, by) in (known or {(None, None)})

    @given(feedbacks, verdicts)
    def test_swapping_the_two_runs_of_each_comparison_changes_nothing(
        self, feedback: list[Feedback], comparisons: list[Comparison]
    ) -> None:
        swapped = [row.swap() for row in comparisons]
        assert built(feedback, swapped) == built(feedback, comparisons)

    @pytest.mark.guarantee("learning")
    @given(feedbacks, verdicts, st.randoms())
    def test_the_order_of_the_rows_changes_nothing(
        self, feedback: list[Feedback], comparisons: list[Comparison], random: Any
    ) -> None:
        before = built(feedback, comparisons)
        runs = list(RUNS)
        for rows in (runs, feedback, comparisons):
            random.shuffle(rows)
        assert build_examples(runs, feedback, comparisons, held_out=0.5) == before

    @given(feedbacks, verdicts)
    def test_renaming_runs_and_users_changes_no_example(
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
        after = build_examples(runs, renamed, recompared, held_out=0.5)
        assert after == before

    @given(feedbacks, verdicts)
    def test_pairs_are_distinct_consistent_sorted_and_split_by_prompt(
        self, feedback: list[Feedback], comparisons: list[Comparison]
    ) -> None:
        pairs = built(feedback, comparisons).pairs
        questions = [
            (p.prompt.id, frozenset(canonical(answer) for answer in answers(p))) for p in pairs
        ]
        assert len(set(questions)) == len(pairs)
        assert all(len(answers) == 2 for _, answers in questions)
        assert list(pairs) == sorted(pairs, key=lambda p: (p.created_at, p.example_id))
        assert all(p.held_out == is_held_out(p.prompt.messages, 0.5) for p in pairs)


def test_examples_are_read_from_a_home_one_namespace_at_a_time(tmp_path: Path) -> None:
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
        result = read_examples(store, "default", held_out=0.2)
        other = read_examples(store, "other", held_out=0.2)
    assert set(preferred(result)) == {("A", "B", "comparison"), ("better", "A", "correction")}
    assert [answers(t) for t in result.thumbs] == [(says("C"),)]
    assert preferred(other) == [("B", "A", "comparison")]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_split_point_of_a_prompt_is_the_same_in_every_version() -> None:
    """Models are bundled that were trained on one side of it."""
    assert split_point(asked("What is the capital of France?")) == pytest.approx(
        0.879962280979206, abs=1e-15
    )


def test_a_fifth_of_many_prompts_is_held_out() -> None:
    held = sum(is_held_out(asked(f"question {n}"), 0.2) for n in range(5000))
    assert 900 <= held <= 1100


def test_the_system_message_does_not_move_a_prompt() -> None:
    dated = [{"role": "system", "content": "Today is Monday."}, *asked("hi")]
    assert split_point(dated) == split_point(asked("hi"))


def test_the_developer_message_does_not_move_a_prompt() -> None:
    asked = [{"role": "user", "content": "why?"}]
    dated = [{"role": "developer", "content": "Today is Monday."}, *asked]
    assert split_point(dated) == split_point(asked)


def test_prompts_of_a_system_message_alone_are_split_like_others() -> None:
    points = [split_point([{"role": "system", "content": f"story {n}"}]) for n in range(500)]
    assert len(set(points)) == 500
    assert 60 < sum(point < 0.2 for point in points) < 140


def test_earlier_turns_of_the_assistant_move_a_prompt() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert split_point([*asked("hi"), turn]) != split_point(asked("hi"))


@pytest.mark.guarantee("learning")
@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_prompt_held_out_at_a_share_is_held_out_at_any_larger_one(
    text: str, one: float, other: float
) -> None:
    small, large = sorted((one, other))
    assert is_held_out(asked(text), small) <= is_held_out(asked(text), large)


@given(st.text())
def test_a_share_of_0_holds_out_no_prompt_and_1_all(text: str) -> None:
    assert not is_held_out(asked(text), 0)
    assert is_held_out(asked(text), 1)
