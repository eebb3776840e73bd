"""Which attempt follows a refused one: what failed decides."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from agentpref.attempt import Bench, Tried
from agentpref.budget import Budget
from agentpref.config import UpdateConfig
from agentpref.learn.data import Available, UpdateRows
from agentpref.learn.encode import EncodedExample
from agentpref.prove.behaviour import ILL_FORMED
from agentpref.prove.evaluate import Scores
from agentpref.prove.results import CheckResult, GateResult
from agentpref.prove.retention import PEOPLE
from agentpref.prove.signs import allowed, sign_test
from agentpref.retry import (
    IMITATION,
    LONGER,
    MOST,
    Plan,
    Turn,
    follow_up,
    following,
    idle,
    narrowed,
    only_undecided,
)
from tests.core.learn.examples import make_pair

KL = CheckResult("KL budget", False, 0.2, 0.15, "over")
GAIN = CheckResult("new preferences", False, 0.0, 0.0, "no gain")
WRITTEN = CheckResult("written", False, 0, None, "ranked, but not written")
BROKEN = CheckResult("tool-call JSON", False, 9, 2, "live wrote no tool call; 9 do not parse")
ORDER = ("test", "comparison")


def lost(tag):
    return CheckResult(f"retention of test/{tag}/any/any", False, -0.3, -0.1, "a loss")


def row(number, tag, origin="comparison"):
    example = make_pair(number, "yes", "no", tag=tag, origin=origin, held_out=True)
    return EncodedExample(example, (1,), ((2,), (3,)), (None, None))


def scores(**groups):
    """Held-out prompts by tag: (live, candidate) of each."""
    found = [(tag, pair) for tag, pairs in groups.items() for pair in pairs]
    rows = [row(number, tag) for number, (tag, _) in enumerate(found)]
    return Scores(rows, [pair[0] for _, pair in found], [pair[1] for _, pair in found])


GOOD, COIN = [(0.0, 1.0)] * 10, [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)] * 3
WORSE, FEW = [(1.0, 0.0)] * 8, COIN[:4]


def after(checks, new, plan=None, tried=frozenset(), **changes):
    available = Available(new_held_out=tuple(one.example for one in new.rows))
    options = {"can_refit": True, "can_imitate": True, "confidence": 0.95, **changes}
    return follow_up(plan or Plan(), checks, new, available, lambda: tried, **options)


def names(new, tag):
    return {one.example.example_id for one in new.rows if one.example.tag == tag}


def test_where_the_kl_budget_failed_base_is_refitted():
    plan, why = after([KL], scores(a=GOOD))
    assert (plan.number, plan.start, plan.aside, plan.looks) == (2, "base", frozenset(), 1)
    assert "KL budget is spent" in why
    assert after([KL], scores(a=GOOD), can_refit=False) is None
    assert after([KL], scores(a=GOOD), plan) is None, "a refit that fails is not repeated"


NO_GAIN = CheckResult("new preferences", False, None, None, "live ranks them rightly already")


@pytest.mark.parametrize("failed", [[WRITTEN], [BROKEN], [WRITTEN, BROKEN], [NO_GAIN, WRITTEN]])
def test_what_is_ranked_and_not_written_is_imitated_and_then_trained_longer_once(failed):
    plan, why = after(failed, scores(a=GOOD))
    assert (plan.number, plan.start, plan.looks) == (2, "live", 1)
    assert (plan.imitation, plan.longer) == (IMITATION, 1)
    assert "imitates the chosen answers" in why
    assert Plan.thaw(plan.freeze()) == plan
    plan, why = after(failed, scores(a=GOOD), plan)
    assert (plan.imitation, plan.longer, plan.looks) == (IMITATION, LONGER, 2)
    assert "trains 3 times as long" in why
    assert Plan.thaw(plan.freeze()) == plan
    assert after(failed, scores(a=GOOD), replace(plan, number=2)) is None
    assert after([*failed, lost("a")], scores(a=GOOD)) is None, "more training would lose more"


@pytest.mark.parametrize("name", sorted(ILL_FORMED - {"tool-call JSON"}))
def test_answers_that_lost_their_form_are_imitated_and_not_trained_longer(name):
    harm = CheckResult(name, False, 5, 0, "harm")
    plan, why = after([harm, NO_GAIN], scores(a=GOOD))
    assert (plan.imitation, plan.longer) == (IMITATION, 1)
    assert "written without the form of answers" in why
    assert after([harm], scores(a=GOOD), plan) is None
    assert after([harm], scores(a=GOOD), can_imitate=False) is None
    assert after([harm, WRITTEN], scores(a=GOOD), plan)[0].longer == LONGER
    assert after([harm, WISHES], scores(a=GOOD), odd={"a"}) is None, "nobody can mean that"


def test_an_imitation_that_spent_the_budget_trains_longer_where_there_is_no_refit():
    """On 40 comparisons it wrote all calls at .17 nats of .15, and all was set aside."""
    plan = Plan(number=2, imitation=IMITATION, looks=1)
    for failed in ([KL], [KL, NO_GAIN]):
        following, why = after(failed, scores(a=GOOD), plan, can_refit=False)
        assert (following.longer, following.imitation, following.looks) == (LONGER, IMITATION, 2)
        assert "imitation spent the KL budget" in why
        assert after(failed, scores(a=GOOD), following, can_refit=False) is None
    assert after([KL, lost("a")], scores(a=GOOD), plan, can_refit=False) is None
    refit, _ = after([KL], scores(a=GOOD), plan)
    assert (refit.start, refit.longer, refit.imitation) == ("base", 1, IMITATION)
    assert after([KL], scores(a=GOOD), can_refit=False) is None, "nothing was imitated"


def test_where_there_is_nothing_to_imitate_it_trains_longer_at_once():
    plan, _ = after([WRITTEN], scores(a=GOOD), can_imitate=False)
    assert (plan.imitation, plan.longer) == (0.0, LONGER)


@pytest.mark.parametrize("bad", [COIN, WORSE])
def test_a_tag_that_fails_is_left_out(bad):
    new = scores(good=GOOD, bad=bad)
    plan, why = after([GAIN], new)
    assert (plan.start, plan.aside) == ("live", names(new, "bad"))
    assert (plan.looks, plan.choices) == (2, 2), "either tag could have been at fault"
    assert Plan.thaw(plan.freeze()) == plan
    assert plan.without[0].startswith("tag bad (")
    assert "once more without tag bad" in why


WISHES = CheckResult("wishes", False, 10, 5.0, "tag bad: 10 of 10 are one and the same text")


def test_a_tag_that_nobody_can_mean_is_left_out_and_not_the_honest_one():
    """The honest one had no gain beside it, and was left out; then both were refused."""
    new = scores(good=COIN, bad=GOOD)
    plan, why = after([WISHES, KL, WRITTEN, GAIN], new, odd={"bad"})
    assert plan.aside == names(new, "bad")
    assert (plan.number, plan.start, plan.longer, plan.looks) == (2, "live", 1, 1)
    assert plan.without == ("tag bad (nobody can mean what is chosen there)",)
    assert why == "once more without tag bad (nobody can mean what is chosen there)"
    assert after([WISHES, KL], new, odd={"bad", "good"}) is None, "nothing else is new"
    assert after([WISHES, KL], new, Plan(number=MOST), odd={"bad"}) is None


def test_where_nobody_can_mean_any_tag_what_judges_said_may_still_be_left_out():
    new = by_origin(comparison=GOOD, judge=COIN)
    plan, _ = after([WISHES, KL], new, odd={"one"})
    assert (plan.without[0][:15], plan.start) == ("source judges (", "live")
    assert after([WISHES, KL], by_origin(comparison=GOOD), odd={"one"}) is None


def test_old_evidence_does_not_yield_to_what_nobody_can_mean():
    new = scores(good=GOOD, bad=GOOD)
    for tag, kept in (("bad", False), ("good", True)):
        turn = Turn(aged=frozenset("a"), told=({"tag": tag},))
        plan, _ = after([WISHES], new, Plan(turn=turn), odd={"bad"})
        assert bool(plan.turn) is kept
        assert (plan.aged, plan.aside) == (frozenset(), names(new, "bad"))


def test_where_people_changed_their_minds_the_old_evidence_yields_in_the_next_attempt():
    turn = Turn(frozenset("ab"), frozenset("c"), frozenset("d"), ({"tag": "one"},), ("said",))
    first = Plan(aside=frozenset("de"), aged=frozenset("c"), turn=turn)
    plan, why = after([lost("one")], scores(one=GOOD), first)
    assert (plan.number, plan.looks, plan.start) == (2, 1, "live")
    assert (plan.aged, plan.restored, plan.aside) == (set("ab"), set("c"), set("e"))
    assert (plan.changed, plan.notes) == (turn.told, turn.notes)
    assert "yields" in why
    assert not plan.turn, "it yields once"
    assert Plan.thaw(first.freeze()) == first


def by_origin(**groups):
    found = [(origin, pair) for origin, pairs in groups.items() for pair in pairs]
    rows = [row(number, "one", origin) for number, (origin, _) in enumerate(found)]
    return Scores(rows, [pair[0] for _, pair in found], [pair[1] for _, pair in found])


def test_judges_that_fail_are_left_out_and_people_are_not_split_by_how_they_judged():
    """Of labels thrown by a coin, corrections are those that live does not say itself."""
    new = by_origin(comparison=GOOD, judge=COIN)
    plan, _ = after([GAIN], new)
    assert plan.aside == {one.example.example_id for one in new.rows[len(GOOD) :]}
    assert plan.without[0].startswith("source judges (")
    assert after([GAIN], by_origin(correction=GOOD, comparison=COIN)) is None


def test_where_what_people_said_was_lost_judges_are_left_out():
    new = by_origin(comparison=GOOD, judge=GOOD)
    plan, _ = after([replace(lost("one"), name=PEOPLE)], new)
    assert plan.aside == {one.example.example_id for one in new.rows[len(GOOD) :]}
    assert plan.without == ("source judges (what people said was lost)",)


def test_a_tag_whose_old_evidence_was_lost_is_left_out():
    new = scores(good=GOOD, bad=GOOD)
    plan, _ = after([lost("bad")], new)
    assert plan.aside == names(new, "bad")
    assert after([lost("elsewhere")], new, can_refit=False) is None


def test_where_only_what_live_knew_in_other_tags_was_lost_base_is_refitted():
    new, together = scores(good=GOOD), replace(lost("x"), name="retention of all strata together")
    plan, why = after([lost("elsewhere"), together], new)
    assert (plan.start, plan.looks, plan.aside) == ("base", 1, frozenset())
    assert "in other tags was lost, so base is refitted" in why
    assert after([lost("elsewhere"), GAIN], new) is None, "what proves nothing is not worth it"
    assert after([lost("elsewhere"), lost("good")], new) is None
    assert after([lost("elsewhere")], new, plan) is None, "once"


def listed(new, *, trained=("good", "bad")):
    """What there was to learn: what is held out, and a trained example of each tag."""
    extra = [
        replace(make_pair(500 + n, "a", "b", tag=t), held_out=False) for n, t in enumerate(trained)
    ]
    return Available(new=tuple(extra), new_held_out=tuple(one.example for one in new.rows))


def after_too_little(new, plan=None, tried=frozenset(), **options):
    return narrowed(plan or Plan(), new, listed(new, **options), lambda: tried, confidence=0.95)


def test_what_shows_no_gain_is_left_out_where_the_rest_shows_one_and_its_looks_are_paid_for():
    new = scores(good=GOOD, bad=COIN)
    plan, why = after_too_little(new, Plan(looks=1))
    assert names(new, "bad") < plan.aside
    assert len(plan.aside) == len(COIN) + 1, "what trained, too"
    assert (plan.number, plan.start, plan.looks) == (2, "live", 1 + 2), "either might have been"
    assert plan.waits == plan.aside
    assert plan.choices == 2
    assert "once more without tag bad (no gain: right about 6 of 12 held-out prompts)" in why
    assert after_too_little(new, Plan(number=MOST)) is None


def test_what_may_yet_show_a_gain_is_not_left_out():
    slow = [(0.0, 1.0)] * 5 + [(1.0, 0.0)] * 3 + [(1.0, 1.0)] + [(0.0, 0.0)]
    known = [(1.0, 1.0)] * 9 + [(1.0, 0.0)]
    for group in (slow, known, COIN[:4]):
        assert after_too_little(scores(good=GOOD, bad=group)) is None
    assert after_too_little(scores(good=[(0.0, 1.0)] * 4, bad=COIN)) is None, "1 in 16 is no gain"
    assert after_too_little(scores(good=COIN, bad=COIN)) is None
    assert after_too_little(scores(good=GOOD, bad=COIN), trained=("bad",)) is None, "none to train"


def test_what_an_earlier_update_tried_is_left_out_of_its_tag_and_that_could_be_nothing_else():
    new = scores(a=COIN)
    fresh = [row(100 + number, "a") for number in range(10)]
    both = Scores([*new.rows, *fresh], [*new.live, *[0.0] * 10], [*new.candidate, *[1.0] * 10])
    plan, _ = after_too_little(both, tried=names(new, "a"), trained=("a",))
    assert plan.aside == names(new, "a")
    assert plan.looks == 1


def test_too_small_groups_are_not_paid_for():
    new = scores(good=GOOD, bad=COIN, **{f"few{n}": FEW for n in range(6)})
    plan, _ = after_too_little(new)
    assert plan.looks == 3, "good, bad, or both, and the few remain"


def test_the_second_chance_calls_no_more_coins_a_gain_than_the_looks_allow():
    """Two tags of coins; what is left keeps its signs, which were seen when it was chosen."""
    rng, wrong, nights, tested = random.Random(5), 0, 3_000, 0
    for _ in range(nights):
        sides = {tag: [rng.random() < 0.5 for _ in range(10)] for tag in ("a", "b")}
        new = scores(**{tag: [(1.0 - s, float(s)) for s in own] for tag, own in sides.items()})
        plan = after_too_little(new, trained=("a", "b"))
        better = sum(map(sum, sides.values()))
        wrong += sign_test(better, 20 - better, one_sided=True) <= allowed(1, 0.05)
        if plan is not None:
            tested += 1
            (kept,) = (own for tag, own in sides.items() if not names(new, tag) <= plan[0].aside)
            chance = sign_test(sum(kept), 10 - sum(kept), one_sided=True)
            wrong += chance <= allowed(plan[0].looks + 1, 0.05, plan[0].choices)
    assert tested > 30
    assert wrong / nights <= sum(allowed(look, 0.05) for look in (1, 2, 3))


def test_of_a_candidate_that_passed_what_shows_no_gain_is_named():
    new = scores(good=GOOD, bad=COIN)
    found = idle(new, listed(new), frozenset, confidence=0.95)
    assert found.words == ("tag bad (no gain: right about 6 of 12 held-out prompts)",)
    assert names(new, "bad") < found.examples
    assert idle(scores(good=GOOD), listed(scores(good=GOOD)), frozenset, confidence=0.95) is None


def test_too_few_prompts_are_not_at_fault():
    assert after([GAIN], scores(good=GOOD, few=FEW)) is None


def test_where_everything_or_nothing_is_at_fault_nothing_follows():
    assert after([GAIN], scores(one=COIN, two=COIN)) is None
    assert after([GAIN], scores(one=GOOD, two=GOOD)) is None
    assert after([GAIN], scores(one=COIN)) is None


def test_what_an_earlier_update_tried_is_told_from_what_is_new():
    new = scores(a=COIN)
    fresh = [row(100 + number, "a") for number in range(10)]
    both = Scores([*new.rows, *fresh], [*new.live, *[0.0] * 10], [*new.candidate, *[1.0] * 10])
    plan, why = after([GAIN], both, tried=names(new, "a"))
    assert plan.aside == names(new, "a")
    assert "what an earlier update tried" in why
    others = frozenset(one.example.example_id for one in fresh)
    assert after([GAIN], both, tried=others) is None, "what is new is not blamed for what is not"


def test_kl_and_a_tag_are_mended_at_once_and_attempts_end():
    new = scores(good=GOOD, bad=COIN)
    plan, _ = after([KL, GAIN], new)
    assert (plan.start, plan.aside) == ("base", names(new, "bad"))
    assert after([KL, GAIN], new, Plan(number=MOST)) is None


def test_a_plan_is_found_again_as_it_was_kept():
    plan = Plan(2, "base", 3, frozenset("ab"), frozenset("c"), without=("tag a",), told=({"a": 1},))
    assert Plan.thaw(plan.freeze()) == plan
    assert Plan.thaw({}) == Plan()


def test_only_a_loss_of_what_may_have_changed_is_undecided():
    plan, together = Plan(undecided=frozenset(["a/b"])), lost("x")
    together = CheckResult("retention of all strata together", False, -0.3, -0.1, "a loss")

    def alone(*failed, plan=plan, refuted=False):
        return only_undecided(plan, GateResult("refused", failed, refuted=refuted))

    assert alone(lost("a/b"))
    assert alone(lost("a/b"), together)
    assert alone(GAIN, lost("a/b"))
    assert not alone(GAIN, lost("a/b"), refuted=True)
    assert not alone(GAIN)
    assert not alone(together)
    assert not alone(lost("c"))
    assert not alone(lost("a/b"), KL)
    assert not alone(lost("a/b"), plan=Plan())


def test_the_notes_say_what_failed_and_what_followed():
    told = {"attempt": 1, "start": "live", "failed": ["KL budget: over"], "next": "a refit"}
    assert [*following([told, {"attempt": 2}])] == [
        "attempt 1, from live, failed (KL budget); a refit"
    ]


@pytest.mark.parametrize(
    ("plan", "following", "needed"),
    [
        (Plan(), Plan(number=2), 100.0),
        (Plan(), Plan(number=2, longer=LONGER), 100.0 * LONGER),
        (Plan(number=2, longer=LONGER), Plan(number=3, longer=LONGER), 100.0),
        (Plan(), Plan(number=2, start="base"), 600.0),
        (Plan(), Plan(number=2, start="base", longer=LONGER), 600.0 * LONGER),
    ],
)
def test_a_longer_attempt_and_one_on_more_rows_need_so_much_more_time(plan, following, needed):
    """After an attempt on eight rows that took 100 seconds, beside 40 old rows for a refit."""
    tried = Tried(plan, Available(old=(None,) * 40), UpdateRows(None, new=[None] * 8))

    def has_time(left):
        budget = Budget(left, clock=lambda: 0.0, started=0.0)
        bench = Bench("u-1", 0.0, "rev-1", None, UpdateConfig(), {}, {}, budget, None, None, None)
        return bench._has_time(tried, following, 100.0)

    assert has_time(needed)
    assert not has_time(needed - 1)
