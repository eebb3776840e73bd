"""Scores of live and candidate on the same rows, and all the evidence that the gate needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from agentpref.config import GateSettings, UpdateConfig
from agentpref.learn.encode import EncodedExample
from agentpref.learn.losses.kto import is_liked
from agentpref.prove import evaluate, probes
from agentpref.prove.evaluate import Margins, Scores
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


def test_what_people_said_is_evidence_apart_where_a_judge_trained(pair_of):
    by = ("comparison", "judge", "correction", "critique")
    rows = [row(pair_of(n, "yes", origin=origin)) for n, origin in enumerate(by)]
    held_out = Scores(rows, (1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0))
    people = evaluate._people(held_out, rows)
    assert (people.live, people.candidate) == ((1.0, 0.0), (0.0, 1.0))
    assert evaluate._people(held_out, rows[::2]) is None
    assert evaluate._people(Scores(rows[1::2], (1.0, 1.0), (1.0, 1.0)), rows) is None


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


def test_what_the_pairs_ask_for_is_that_of_trained_and_held_out_ones(taught, held_out, pair_of):
    learner = taught("yes")
    trained = learner.encode([pair_of(n, "no", "yes, it is so") for n in range(6)])
    wishes = {one.feature: one for one in gather(learner, held_out, trained=trained).asked}
    assert (wishes["words"].direction, wishes["words"].prompts) == (-1, len(held_out) + 6)
    assert "no at the beginning" not in wishes, "six pairs ask for it, and twelve against it"


@pytest.fixture
def probed(monkeypatch):
    """Who answered which prompts, and at which temperature."""
    asked = []
    generate = probes.generations

    def noted(learner, policy, writings):
        asked.extend((policy, one.prompts, one.temperature) for one in writings)
        return generate(learner, policy, writings)

    monkeypatch.setattr(probes, "generations", noted)
    return asked


def test_each_prompt_is_probed_once_and_never_more_than_enough(
    taught, held_out, pair_of, probed, monkeypatch
):
    twice = [*held_out, *(pair_of(n, "yes, it is") for n in range(100, 112))]
    gather(taught("yes"), twice)
    assert [(policy, t) for policy, _, t in probed] == [
        ("live", 0.0),
        ("live", 0.7),
        ("candidate", 0.0),
        ("candidate", 0.7),
    ]
    first, drawn, *second = (prompts for _, prompts, _ in probed)
    assert [first, drawn] == second, "both answer the same prompts"
    assert drawn == first[: probes.SAMPLED]
    learner = taught("yes")
    assert sorted(first) == sorted(row.prompt for row in learner.encode(held_out))
    monkeypatch.setattr(probes, "PROBES", 5)
    gather(taught("yes"), twice)
    assert len(probed[-1][1]) == 5


def test_half_of_the_probes_are_new_however_many_old_ones_there_are(
    fresh_learner, pair_of, monkeypatch
):
    monkeypatch.setattr(probes, "PROBES", 8)
    learner = fresh_learner()
    new, old, more = (
        learner.encode([pair_of(n, "yes") for n in numbers])
        for numbers in (range(6), range(100, 140), range(200, 240))
    )

    def chosen(*rows):
        found = probes.choose_probes(learner, *rows, limit=64, seed=0)
        assert len(found.rows) == len({row.prompt for row in found.rows})
        names = [int(row.example.prompt.id.removeprefix("prompt")) for row in found.rows]
        return (
            found.fresh,
            sum(n < 100 for n in names),
            sum(100 <= n < 200 for n in names),
            len(names),
        )

    assert chosen(new, old, more) == (4, 4, 4, 8)
    assert chosen(new, old[:1], more) == (7, 6, 1, 8)
    assert chosen(new[:2], [], more) == (8, 2, 0, 8), "new ones of training fill them up"
    assert chosen(new[:2], old[:3], []) == (2, 2, 3, 5)


def test_another_temperature_draws_other_answers(fresh_learner, held_out):
    learner = fresh_learner()
    rows = learner.encode(held_out)

    def drawn(temperature):
        config = UpdateConfig(gate=GateSettings(temperature=temperature))
        evidence = evaluated(learner, rows, [], config)
        assert evidence.sampled.temperature == temperature
        return evidence.sampled

    cold, hot = drawn(0.01), drawn(5.0)
    assert cold.live == cold.candidate, "two policies that agree draw the same words"
    assert hot.live.texts != cold.live.texts


def test_answers_to_held_out_prompts_are_shown_by_the_seed_alone(taught, held_out, pair_of):
    learner = taught("yes")
    trained = learner.encode([pair_of(n, "yes") for n in range(4)])
    evidence = gather(learner, held_out, trained=trained)
    names = {pair.prompt.id for pair in held_out}
    assert {one.prompt_id for one in evidence.shown} <= names, "none of training"
    assert len(evidence.shown) == probes.SHOWN
    assert {one.after for one in evidence.shown} == {"yes"}
    assert evidence.shown == gather(learner, held_out, trained=trained).shown


def test_the_first_token_that_differs_is_ranked_by_itself(taught, pair_of):
    """All of the margin lies behind a token that both answers share."""
    learner = taught("yes")
    new = [pair_of(n, "yes", "yes, I think that it is") for n in range(100, 112)]
    found = evaluate.score(learner, learner.encode(new)).first_token()
    assert found.pairs == 12
    assert found.accuracy == (0.5, 1.0)
    assert 0 < found.margin_first[1] < found.margin[1]
    assert found.likelier[1] == 1.0
    assert evaluate.score(learner, []).first_token() is None


def test_a_ranking_that_does_not_reach_the_first_token_is_noted(pair_of):
    rows = [row(pair_of(n, "yes")) for n in range(4)]
    moved = Margins((0.0, 21.0), (0.0, 0.01), (-3.0, -2.99))
    (note,) = evaluate._first_token_note(Scores(rows, (0.5,) * 4, (1.0,) * 4, [moved] * 4))
    assert note == (
        "ranking improved from .50 to 1.00, but the first token in which two answers differ "
        "decides for the chosen one in .00 -> .00 of 4 pairs; 0.0 of the 21.0 nats by which the "
        "margin grew are that token's"
    )
    decides = Margins((0.0, 21.0), (0.0, 5.0), (-3.0, 2.0))
    assert evaluate._first_token_note(Scores(rows, (0.5,) * 4, (1.0,) * 4, [decides] * 4)) == []


def test_scorers_compare_live_and_candidate_on_the_same_prompts(taught, held_out):
    def brief(messages, answer):
        assert messages[-1]["content"].startswith("Is ")
        return -len(answer)

    (found,) = gather(taught("yes"), held_out, scorers={"brief": brief}).scorers
    assert (found.name, found.candidate, found.p, found.prompts) == ("brief", -3.0, 1.0, 12)
    (worse,) = gather(
        taught("yes"), held_out, scorers={"long": lambda messages, answer: len(answer)}
    ).scorers
    assert worse.p < 0.01


def test_a_prompt_that_was_shortened_is_probed_as_it_was_scored(fresh_learner, pair_of, probed):
    learner, pair = fresh_learner(max_length=64), pair_of(1, "yes")
    question = pair.prompt.messages[0]
    history = [question, {"role": "assistant", "content": "word " * 60}, question]
    long = replace(pair, prompt=replace(pair.prompt, messages=tuple(history)))
    (row,) = learner.encode([long])
    assert learner.shortened == {"prompt_shortened": 1}
    gather(learner, [long])
    assert [prompts for _, prompts, _ in probed] == [[row.prompt]] * 4


def test_the_same_seed_gives_the_same_evidence(taught, held_out, monkeypatch):
    monkeypatch.setattr(probes, "PROBES", 3)
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


def test_thumbs_ask_for_features_too(taught, thumbs):
    evidence = gather(taught("yes"), thumbs)
    wishes = {one.feature: one.direction for one in evidence.asked}
    assert wishes["words"] == -1
    assert wishes["yes at the beginning"] == 1
    assert {text.casefold() for text in evidence.chosen.texts} == {"yes"}
    assert set(evidence.rejected.texts) == {"no, never"}
    sides = len(evidence.chosen.texts), len(evidence.rejected.texts)
    assert (evidence.fresh_chosen, evidence.fresh_rejected) == sides, "all prompts are new"


def test_odd_wishes_are_counted(fresh_learner, pair_of):
    learner = fresh_learner()
    rows = learner.encode([pair_of(n, "   " if n % 8 else "Ask me later") for n in range(40)])
    (blank,) = probes.judged(learner, rows, seed=0).odd
    assert blank.message.startswith("35 of 40 chosen answers are blank: ")
    rows = learner.encode([pair_of(n, "Ask me later", f"no, {n}") for n in range(40)])
    (canned,) = probes.judged(learner, rows, seed=0).odd
    assert canned.message.startswith("40 of 40 chosen answers are one and the same text: ")
    rows = learner.encode([pair_of(n, "yes") for n in range(40)])
    assert probes.judged(learner, rows, seed=0).odd == ()
