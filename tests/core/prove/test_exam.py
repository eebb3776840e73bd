"""The exam: marks of live and candidate on the same rows, and all that the gate needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from agentpref.config import GateSettings
from agentpref.learn.encode import EncodedPair, EncodedThumb
from agentpref.prove import exam
from agentpref.prove.exam import Marks
from agentpref.prove.gate import UserCheck, judge


def row(pair, chosen=(1, 2), rejected=(3,)):
    return EncodedPair(pair, (9,), chosen, rejected)


@pytest.fixture
def marks(pair_of):
    """Four rows of two tags; live is right on the first two, the candidate on all but the last."""
    pairs = [pair_of(n, "yes", tag="ab"[n % 2]) for n in range(4)]
    return Marks([row(pair) for pair in pairs], (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.5))


@pytest.fixture
def held_out(pair_of):
    return [pair_of(n, "yes") for n in range(100, 112)]


def gather(learner, new, old=(), **options):
    return examined(learner, *(learner.encode(pairs) for pairs in (new, old)), **options)


def examined(learner, new, old, **options):
    options = {"trained": new, "checks": {}, **options}
    kl = exam.distance(learner, [*new, *old] or options["trained"])
    marks = (exam.mark(learner, rows) for rows in (new, old))
    return exam.evidence(learner, *marks, kl=kl, **options)


def test_marks_of_some_rows_keep_their_prompts(marks):
    taken = marks.take([0, 3])
    assert (taken.live, taken.candidate) == ((1.0, 0.0), (1.0, 0.5))
    assert taken.prompts == ("prompt0", "prompt3")


def test_marks_are_summed_up_by_tag(marks):
    assert marks.by_tag() == {
        "a": {"pairs": 2, "before": 0.5, "after": 1.0},
        "b": {"pairs": 2, "before": 0.5, "after": 0.75},
    }
    assert marks.joined(marks).by_tag()["b"] == {"pairs": 4, "before": 0.5, "after": 0.75}


def test_no_rows_have_no_tags(marks):
    nothing = Marks([], (), ())
    assert nothing.by_tag() == {}
    assert nothing.joined(marks).by_tag() == marks.by_tag()


def test_a_fresh_candidate_is_marked_as_live_is(fresh_learner, held_out):
    learner = fresh_learner()
    found = exam.mark(learner, learner.encode(held_out))
    assert found.live == found.candidate == (0.5,) * len(held_out), "both are the base: a coin"


def test_a_taught_candidate_is_marked_above_live(taught, held_out):
    learner = taught("yes")
    found = exam.mark(learner, learner.encode(held_out))
    assert set(found.live) == {0.5}
    assert set(found.candidate) == {1.0}


def test_the_gate_can_rule_on_the_evidence(taught, held_out):
    evidence = gather(taught("yes"), held_out)
    assert len(evidence.new) == len(held_out)
    assert evidence.retention == {}
    assert evidence.kl > 0.1
    assert evidence.candidate.mean_length < evidence.live.mean_length
    settings = GateSettings(
        min_pairs=5, kl_budget=1e3, distinct_floor=0.0, length_ratio=(1e-3, 1e3)
    )
    assert judge(evidence, settings).verdict == "promoted"


def test_old_pairs_are_evidence_of_retention_by_stratum(taught, held_out, pair_of):
    learner = taught("yes")
    learner = _with_config(learner, gate=GateSettings(min_stratum=4))
    old = [pair_of(n, "yes", tag=tag) for n, tag in enumerate("baaa" * 5)]
    evidence = gather(learner, held_out, old)
    sizes = {(s.tag, s.age): len(paired) for s, paired in evidence.retention.items()}
    assert sum(sizes.values()) == len(old)
    assert Counter(tag for tag, _ in sizes)["b"] == 1, "too few for thirds of age"
    assert Counter(tag for tag, _ in sizes)["a"] > 1
    prompts = {prompt for paired in evidence.retention.values() for prompt in paired.prompts}
    assert prompts == {pair.prompt.id for pair in old}
    assert set(evidence.new.prompts) == {pair.prompt.id for pair in held_out}


def test_lengths_and_diversity_asked_for_are_those_of_the_pairs(taught, held_out, pair_of):
    trained = [
        row(pair_of(1, "yes"), chosen=(1, 2, 3, 4), rejected=(5, 6)),
        row(pair_of(2, "yes"), chosen=(1, 2), rejected=(5,)),
    ]
    evidence = gather(taught("yes"), held_out, trained=trained)
    assert evidence.asked_length == pytest.approx(6 / 3)
    assert evidence.asked_distinct == pytest.approx((3 / 4) / 1)


def test_rejected_answers_of_one_token_ask_for_no_diversity(taught, held_out, pair_of):
    trained = [row(pair_of(1, "yes"), chosen=(1, 2, 1, 2), rejected=(5,))]
    assert gather(taught("yes"), held_out, trained=trained).asked_distinct == 1.0


def test_each_prompt_is_probed_once_and_never_more_than_enough(
    taught, held_out, pair_of, monkeypatch
):
    asked = []
    monkeypatch.setattr(exam, "generations", lambda *a, limit: asked.append((a[1], a[2])))
    twice = [*held_out, *(pair_of(n, "yes, it is") for n in range(100, 112))]
    gather(taught("yes"), twice)
    (live, first), (candidate, second) = asked
    assert (live, candidate) == ("live", "candidate")
    assert first == second, "both answer the same prompts"
    learner = taught("yes")
    assert sorted(first) == sorted(row.prompt for row in learner.encode(held_out))
    monkeypatch.setattr(exam, "PROBES", 5)
    gather(taught("yes"), twice)
    assert len(asked[-1][1]) == 5


def test_a_prompt_that_was_shortened_is_probed_as_it_was_scored(
    fresh_learner, pair_of, monkeypatch
):
    asked = []
    monkeypatch.setattr(exam, "generations", lambda *a, limit: asked.append(a[2]))
    learner, pair = fresh_learner(max_length=64), pair_of(1, "yes")
    question = pair.prompt.messages[0]
    history = [question, {"role": "assistant", "content": "word " * 60}, question]
    long = replace(pair, prompt=replace(pair.prompt, messages=tuple(history)))
    (row,) = learner.encode([long])
    assert learner.shortened == {"prompt_shortened": 1}
    gather(learner, [long])
    assert asked == [[row.prompt]] * 2


def test_the_same_seed_gives_the_same_evidence(taught, held_out, monkeypatch):
    monkeypatch.setattr(exam, "PROBES", 3)
    monkeypatch.setattr(exam, "KL_ROWS", 3)
    learner = taught("yes")
    assert gather(learner, held_out) == gather(learner, held_out)
    other = gather(_with_config(learner, seed=1), held_out)
    assert other.kl != gather(learner, held_out).kl, "another seed looks at other rows"


def test_without_held_out_pairs_the_trained_ones_are_probed(taught, held_out):
    learner = taught("yes")
    evidence = gather(learner, [], trained=learner.encode(held_out))
    assert len(evidence.new) == 0
    assert evidence.kl > 0.1
    assert evidence.candidate.endless == 0


def test_checks_of_the_user_speak_with_the_candidate(taught, held_out):
    def yes(ask):
        return ask([{"role": "user", "content": "Is 3 a number?"}]) == "yes", "it says yes"

    evidence = gather(taught("yes"), held_out, checks={"agrees": yes})
    assert evidence.user_checks == (UserCheck("agrees", True, "it says yes"),)


def _with_config(learner, **changes):
    """The same model under other settings of the exam."""
    import copy

    other = copy.copy(learner)
    other.config = replace(learner.config, **changes)
    return other


def test_the_cost_of_an_exam_grows_with_its_rows_and_is_bounded_elsewhere(pair_of):
    rows = [row(pair_of(n, "yes"), chosen=(1,) * 50) for n in range(600)]
    costs = [exam.tokens_needed(rows[:n]) for n in (1, 300, 600)]
    assert exam.tokens_needed([]) == 0
    assert costs[2] - costs[1] == 3 * 300 * rows[0].width, "probes and rows for KL are bounded"
    assert costs[0] >= 3 * rows[0].width


# Lone thumbs


@pytest.fixture
def thumbs(thumb_of):
    """By turns "yes", which is liked, and "no, never", which is not."""
    return [thumb_of(n, ("yes", "no, never")[n % 2], n % 2 == 0) for n in range(200, 212)]


def lone(thumb):
    return EncodedThumb(thumb, (9,), (1, 2), (3,))


def gather_thumbs(learner, new, old=(), **options):
    return examined(learner, *(learner.encode_thumbs(thumbs) for thumbs in (new, old)), **options)


def test_to_a_fresh_candidate_thumbs_are_coins(fresh_learner, thumbs):
    learner = fresh_learner()
    found = exam.mark(learner, learner.encode_thumbs(thumbs))
    assert found.live == found.candidate == (0.5,) * len(thumbs)


def test_a_taught_candidate_is_right_about_likes_and_dislikes(taught, thumbs):
    learner = taught("yes")
    found = exam.mark(learner, learner.encode_thumbs(thumbs))
    assert set(found.live) == {0.5}
    assert set(found.candidate) == {1.0}
    flipped = [replace(thumb, desirable=not thumb.desirable) for thumb in thumbs]
    assert set(exam.mark(learner, learner.encode_thumbs(flipped)).candidate) == {0.0}


def test_pairs_and_thumbs_are_marked_side_by_side(taught, held_out, thumbs):
    learner = taught("yes")
    mixed = [*learner.encode_thumbs(thumbs), *learner.encode(held_out)]
    found = exam.mark(learner, mixed)
    assert found.candidate == (1.0,) * len(mixed)
    assert len(found.take(range(len(mixed)))) == len(mixed)
    assert found.thumbs() == len(thumbs)
    assert found.remarks() == []


def test_thumbs_alone_are_evidence_that_the_gate_can_rule_on(taught, thumbs):
    evidence = gather_thumbs(taught("yes"), thumbs)
    assert set(evidence.new.prompts) == {thumb.prompt.id for thumb in thumbs}
    settings = GateSettings(
        min_pairs=5, kl_budget=1e3, distinct_floor=0.0, length_ratio=(1e-3, 1e3)
    )
    assert judge(evidence, settings).verdict == "promoted"


def test_old_thumbs_are_evidence_of_retention_in_a_stratum_of_their_own(taught, thumbs):
    learner = _with_config(taught("yes"), gate=GateSettings(min_stratum=4))
    evidence = gather_thumbs(learner, thumbs[:2], thumbs)
    assert {stratum.origin for stratum in evidence.retention} == {"thumb"}
    assert sum(map(len, evidence.retention.values())) == len(thumbs)


def test_as_many_likes_as_dislikes_count_in_every_tag(thumb_of):
    """A domain that is mostly liked must not make up for one that is mostly disliked."""
    kinds = {"a": [True] * 5 + [False] * 2, "b": [False] * 3, "c": [True, False]}
    rows = [
        lone(thumb_of(n, f"{tag}{n}", liked, tag=tag))
        for tag, likes in kinds.items()
        for n, liked in enumerate(likes)
    ]
    by_domain = [float(row.thumb.desirable is (row.thumb.tag != "b")) for row in rows]
    marks = Marks(rows, (0.5,) * len(rows), by_domain)
    found = marks.take(range(len(rows)))
    assert (marks.thumbs(), len(found), sum(found.candidate)) == (6, 6, 3.0)
    assert marks.by_tag() == {
        "a": {"pairs": 4, "before": 0.5, "after": 0.5},
        "c": {"pairs": 2, "before": 0.5, "after": 0.5},
    }


@pytest.mark.parametrize("direction", [True, False])
def test_moving_every_answer_alike_is_no_evidence(thumb_of, direction):
    rows = [lone(thumb_of(n, f"answer {n}", n % 4 == 0)) for n in range(40)]
    alike = [float(row.thumb.desirable is direction) for row in rows]
    found = Marks(rows, (0.5,) * 40, alike).take(range(40))
    assert (len(found), sum(found.candidate)) == (20, 10.0)


def test_a_group_of_likes_alone_proves_nothing(thumb_of):
    marks = Marks([lone(thumb_of(n, f"{n}", True)) for n in range(6)], (0.5,) * 6, (1.0,) * 6)
    assert (len(marks.take(range(6))), marks.by_tag(), marks.thumbs()) == (0, {}, 0)
    (words,) = marks.remarks()
    assert words.startswith("0 of 6 new held-out thumbs count as evidence: ")


def test_thumbs_ask_for_lengths_and_diversity_too(taught, thumbs, thumb_of):
    long = EncodedThumb(thumb_of(1, "a", True), (9,), (1, 2, 3, 4), (3,))
    short = EncodedThumb(thumb_of(2, "b", False), (9,), (5, 5, 5), (3,))
    evidence = gather_thumbs(taught("yes"), thumbs, trained=[long, short])
    assert evidence.asked_length == pytest.approx(4 / 3)
    assert evidence.asked_distinct == pytest.approx(1 / (1 / 2))
    evidence = gather_thumbs(taught("yes"), thumbs, trained=[long])
    assert (evidence.asked_length, evidence.asked_distinct) == (1.0, 1.0)
