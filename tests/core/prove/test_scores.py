"""Scores of live and candidate on the same rows, and all the evidence that the gate needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from agentpref.config import GateSettings, UpdateConfig
from agentpref.learn.encode import EncodedExample
from agentpref.learn.losses.kto import is_liked
from agentpref.prove import evaluate
from agentpref.prove.evaluate import Scores
from agentpref.prove.evidence import UserCheckResult
from agentpref.prove.gate import judge
from agentpref.prove.signs import Signs


def row(pair, chosen=(1, 2), rejected=(3,)):
    return EncodedExample(pair, (9,), (chosen, rejected), (None, None))


@pytest.fixture
def scores(pair_of):
    """Four rows of two tags; live is right on the first two, the candidate on all but the last."""
    pairs = [pair_of(n, "yes", tag="ab"[n % 2]) for n in range(4)]
    return Scores([row(pair) for pair in pairs], (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.5))


@pytest.fixture
def held_out(pair_of):
    return [pair_of(n, "yes") for n in range(100, 112)]


def gather(learner, new, old=(), **options):
    return evaluated(learner, *(learner.encode(examples) for examples in (new, old)), **options)


def evaluated(learner, new, old, config=None, **options):
    options = {"trained": new, "checks": {}, **options}
    config = config or UpdateConfig()
    rows = [*new, *old] or options["trained"]
    kl = evaluate.kl_from_base(learner, rows, seed=config.seed)
    scores = (evaluate.score(learner, rows) for rows in (new, old))
    return evaluate.gather(learner, *scores, kl=kl, config=config, **options)


def test_the_scores_of_some_rows_come_with_their_prompts(scores):
    taken = scores.paired([0, 3])
    assert (taken.live, taken.candidate) == ((1.0, 0.0), (1.0, 0.5))
    assert taken.prompts == ("prompt0", "prompt3")


def test_scores_are_averaged_by_tag(scores):
    assert scores.by_tag() == {
        "a": {"pairs": 2, "before": 0.5, "after": 1.0},
        "b": {"pairs": 2, "before": 0.5, "after": 0.75},
    }
    assert scores.joined(scores).by_tag()["b"] == {"pairs": 4, "before": 0.5, "after": 0.75}


def test_no_rows_have_no_tags(scores):
    nothing = Scores([], (), ())
    assert nothing.by_tag() == {}
    assert nothing.joined(scores).by_tag() == scores.by_tag()


def test_a_fresh_candidate_scores_as_live(fresh_learner, held_out):
    learner = fresh_learner()
    found = evaluate.score(learner, learner.encode(held_out))
    assert found.live == found.candidate == (0.5,) * len(held_out), "both are the base: a coin"


def test_a_taught_candidate_scores_above_live(taught, held_out):
    learner = taught("yes")
    found = evaluate.score(learner, learner.encode(held_out))
    assert set(found.live) == {0.5}
    assert set(found.candidate) == {1.0}


def test_the_gate_passes_on_good_evidence(taught, held_out):
    evidence = gather(taught("yes"), held_out)
    assert len(evidence.new) == len(held_out)
    assert evidence.retention == {}
    assert evidence.kl > 0.1
    assert evidence.candidate.mean_length < evidence.live.mean_length
    settings = GateSettings(
        cross_fit_below=0, kl_budget=1e3, distinct_floor=0.0, length_ratio=(1e-3, 1e3)
    )
    assert judge(evidence, settings).verdict == "passed"


def test_old_pairs_are_evidence_of_retention_by_stratum(taught, held_out, pair_of):
    learner, config = taught("yes"), UpdateConfig(gate=GateSettings(min_stratum=4))
    old = [pair_of(n, "yes", tag=tag) for n, tag in enumerate("baaa" * 5)]
    evidence = gather(learner, held_out, old, config=config)
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
    monkeypatch.setattr(evaluate, "generations", lambda *a, limit: asked.append((a[1], a[2])))
    twice = [*held_out, *(pair_of(n, "yes, it is") for n in range(100, 112))]
    gather(taught("yes"), twice)
    (live, first), (candidate, second) = asked
    assert (live, candidate) == ("live", "candidate")
    assert first == second, "both answer the same prompts"
    learner = taught("yes")
    assert sorted(first) == sorted(row.prompt for row in learner.encode(held_out))
    monkeypatch.setattr(evaluate, "PROBES", 5)
    gather(taught("yes"), twice)
    assert len(asked[-1][1]) == 5


def test_a_prompt_that_was_shortened_is_probed_as_it_was_scored(
    fresh_learner, pair_of, monkeypatch
):
    asked = []
    monkeypatch.setattr(evaluate, "generations", lambda *a, limit: asked.append(a[2]))
    learner, pair = fresh_learner(max_length=64), pair_of(1, "yes")
    question = pair.prompt.messages[0]
    history = [question, {"role": "assistant", "content": "word " * 60}, question]
    long = replace(pair, prompt=replace(pair.prompt, messages=tuple(history)))
    (row,) = learner.encode([long])
    assert learner.shortened == {"prompt_shortened": 1}
    gather(learner, [long])
    assert asked == [[row.prompt]] * 2


def test_the_same_seed_gives_the_same_evidence(taught, held_out, monkeypatch):
    monkeypatch.setattr(evaluate, "PROBES", 3)
    monkeypatch.setattr(evaluate, "KL_ROWS", 3)
    learner = taught("yes")
    assert gather(learner, held_out) == gather(learner, held_out)
    other = gather(learner, held_out, config=UpdateConfig(seed=1))
    assert other.kl != gather(learner, held_out).kl, "another seed looks at other rows"


def test_without_held_out_pairs_the_trained_ones_are_probed(taught, held_out):
    learner = taught("yes")
    evidence = gather(learner, [], trained=learner.encode(held_out))
    assert len(evidence.new) == 0
    assert evidence.kl > 0.1
    assert evidence.candidate.endless == 0


def test_user_checks_ask_the_candidate(taught, held_out):
    def yes(ask):
        return ask([{"role": "user", "content": "Is 3 a number?"}]) == "yes", "it says yes"

    evidence = gather(taught("yes"), held_out, checks={"agrees": yes})
    assert evidence.user_checks == (UserCheckResult("agrees", True, "it says yes"),)


def test_the_cost_of_an_evaluation_grows_with_its_rows_and_is_bounded_elsewhere(pair_of):
    rows = [row(pair_of(n, "yes"), chosen=(1,) * 50) for n in range(600)]
    costs = [evaluate.tokens_needed(rows[:n]) for n in (1, 300, 600)]
    assert evaluate.tokens_needed([]) == 0
    assert costs[2] - costs[1] == 3 * 300 * rows[0].width, "probes and rows for KL are bounded"
    assert costs[0] >= 3 * rows[0].width


# Lone thumbs


@pytest.fixture
def thumbs(thumb_of):
    """By turns "yes", which is liked, and "no, never", which is not."""
    return [thumb_of(n, ("yes", "no, never")[n % 2], n % 2 == 0) for n in range(200, 212)]


def lone(thumb):
    return EncodedExample(thumb, (9,), ((1, 2), (3,)), (None, None))


def test_a_fresh_candidate_scores_half_on_thumbs(fresh_learner, thumbs):
    learner = fresh_learner()
    found = evaluate.score(learner, learner.encode(thumbs))
    assert found.live == found.candidate == (0.5,) * len(thumbs)


def test_a_taught_candidate_is_right_about_likes_and_dislikes(taught, thumbs, thumb_of):
    learner = taught("yes")
    found = evaluate.score(learner, learner.encode(thumbs))
    assert set(found.live) == {0.5}
    assert set(found.candidate) == {1.0}
    flipped = [thumb_of(n, ("yes", "no, never")[n % 2], n % 2 == 1) for n in range(200, 212)]
    assert set(evaluate.score(learner, learner.encode(flipped)).candidate) == {0.0}


def test_pairs_and_thumbs_are_scored_together(taught, held_out, thumbs):
    learner = taught("yes")
    mixed = [*learner.encode(thumbs), *learner.encode(held_out)]
    found = evaluate.score(learner, mixed)
    assert found.candidate == (1.0,) * len(mixed)
    assert len(found.paired()) == len(mixed)
    assert found.counted_thumbs() == len(thumbs)
    assert found.notes() == []


def test_the_gate_passes_on_thumbs_alone(taught, thumbs):
    evidence = gather(taught("yes"), thumbs)
    together = " ".join(evidence.new.prompts).split()
    assert set(together) == {thumb.prompt.id for thumb in thumbs}
    assert len(set(evidence.new.prompts)) == len(thumbs) / 2, "a like and a dislike are a coin"
    settings = GateSettings(
        cross_fit_below=0, kl_budget=1e3, distinct_floor=0.0, length_ratio=(1e-3, 1e3)
    )
    assert judge(evidence, settings).verdict == "passed"


def test_old_thumbs_are_evidence_of_retention_in_a_stratum_of_their_own(taught, thumbs):
    config = UpdateConfig(gate=GateSettings(min_stratum=4))
    evidence = gather(taught("yes"), thumbs[:2], thumbs, config=config)
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
    by_domain = [
        float(bool(row.example.completions[0].label) is (row.example.tag != "b")) for row in rows
    ]
    scores = Scores(rows, (0.5,) * len(rows), by_domain)
    found = scores.paired()
    assert (scores.counted_thumbs(), len(found), sum(found.candidate)) == (6, 6, 3.0)
    assert scores.by_tag() == {
        "a": {"pairs": 4, "before": 0.5, "after": 0.5},
        "c": {"pairs": 2, "before": 0.5, "after": 0.5},
    }


@pytest.mark.parametrize("direction", [True, False])
def test_moving_every_answer_alike_is_no_evidence(thumb_of, direction):
    rows = [lone(thumb_of(n, f"answer {n}", n % 4 == 0)) for n in range(40)]
    alike = [float(is_liked(row.example) is direction) for row in rows]
    found = Scores(rows, (0.5,) * 40, alike).paired()
    assert (len(found), sum(found.candidate)) == (20, 10.0)


def test_a_like_and_a_dislike_of_one_tag_have_a_sign_together(thumb_of):
    """Their labels are no two coins, but which of them is the like is one."""
    kinds = [("a", True), ("a", True), ("a", False), ("b", True), ("b", False), ("a", False)]
    rows = [lone(thumb_of(n, f"{n}", liked, tag=tag)) for n, (tag, liked) in enumerate(kinds)]
    right = (1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
    found = Scores(rows, (0.5,) * 6, right).paired(matched=True)
    by_number = dict(zip((row.example.prompt.id for row in rows), found.prompts, strict=True))
    assert by_number["prompt3"] == by_number["prompt4"]
    assert len({by_number[f"prompt{n}"] for n in (0, 1, 2, 5)}) == 2
    assert by_number["prompt0"] != by_number["prompt1"]
    assert Signs.of(found) == Signs(prompts=3, better=1, worse=0), "one right, one wrong: no sign"


def test_a_group_of_likes_alone_proves_nothing(thumb_of):
    scores = Scores([lone(thumb_of(n, f"{n}", True)) for n in range(6)], (0.5,) * 6, (1.0,) * 6)
    assert (len(scores.paired()), scores.by_tag(), scores.counted_thumbs()) == (0, {}, 0)
    (note,) = scores.notes()
    assert note.startswith("0 of 6 new held-out thumbs count as evidence: ")


def test_thumbs_ask_for_lengths_and_diversity_too(taught, thumbs, thumb_of):
    long = EncodedExample(thumb_of(1, "a", True), (9,), ((1, 2, 3, 4), (3,)), (None, None))
    short = EncodedExample(thumb_of(2, "b", False), (9,), ((5, 5, 5), (3,)), (None, None))
    evidence = gather(taught("yes"), thumbs, trained=[long, short])
    assert evidence.asked_length == pytest.approx(4 / 3)
    assert evidence.asked_distinct == pytest.approx(1 / (1 / 2))
    evidence = gather(taught("yes"), thumbs, trained=[long])
    assert (evidence.asked_length, evidence.asked_distinct) == (1.0, 1.0)
