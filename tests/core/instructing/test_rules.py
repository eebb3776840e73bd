"""Rules: what comparisons ask for, in words, and the choice of those that help."""

from __future__ import annotations

import pytest

from agentpref.instructing import rules
from agentpref.prove.asked import Asked
from tests.core.learn.examples import make_pair

HELPS, HARMS, NOTHING = "Say yes.", "Say no.", "Breathe."


def asked(feature, direction, chosen=1.0):
    return Asked(feature, direction, chosen, 2.0, 30, 0.001)


class Scale:
    """A learner whose policy follows some rules, by a number of nats each."""

    def __init__(self, told="", **nats):
        self.told, self.nats, self.asked = told, nats, []

    def instructions(self, policy):
        return self.told

    def instruct(self, text):
        self.told = text
        self.asked.append(text)

    def measure(self, examples):
        return [type("Row", (), {"example": one}) for one in examples]

    def ratios(self, policy, rows):
        moved = sum(nats for rule, nats in self.nats.items() if rule in self.told)
        return [(moved, 0.0) for _ in rows]


def choose(learner, *proposals, pairs=20):
    examples = [make_pair(n, "yes", "no") for n in range(pairs)]
    return rules.choose(learner, examples, proposals, beta=0.1, seed=0)


def test_the_surest_wish_comes_first_and_each_rule_once():
    found = rules.rules_of(
        [asked("words", -1, 12.2), asked("tokens", -1, 16.3), asked("list items", 1)]
    )
    assert found == ["Answer briefly: about 12 words are enough.", "Use a bulleted list."]


def test_an_answer_in_a_language_is_asked_for_by_its_name():
    assert rules.rules_of([asked("written in German", 1)]) == ["Answer in German."]
    assert rules.rules_of([asked("written in German", -1), asked("repeats itself", 1)]) == []


@pytest.mark.parametrize("some", [["One."], ["One.", "Two, and more."], ["- not a list"]])
def test_rules_are_read_from_the_instructions_that_they_make(some):
    assert rules.read(rules.written(some)) == [one.removeprefix("- ") for one in some]


def test_a_rule_that_helps_is_told_and_one_that_does_not_is_left_out():
    learner = Scale(**{HELPS: 3.0, HARMS: -3.0})
    found = choose(learner, HARMS, NOTHING, HELPS)
    assert found == rules.Chosen((HELPS,), 5, 20, better=20, worse=0, missed=(NOTHING, 0, 0))
    assert learner.told == HELPS


def test_rules_that_help_together_are_told_as_a_list_the_better_first():
    learner = Scale(**{HELPS: 1.0, NOTHING: 3.0})
    assert choose(learner, HELPS, NOTHING).rules == (NOTHING, HELPS)
    assert learner.told == f"- {NOTHING}\n- {HELPS}"


def test_without_a_rule_that_helps_the_model_is_told_what_it_was():
    learner = Scale("Stay.", **{HARMS: -1.0})
    assert choose(learner, HARMS, NOTHING).rules == ("Stay.",)
    assert learner.told == "Stay."


def test_a_rule_that_is_told_already_is_not_tried_again():
    learner = Scale(HELPS, **{HELPS: 1.0})
    assert choose(learner, HELPS).tried == 0


def test_a_few_pairs_prove_no_rule():
    assert choose(Scale(**{HELPS: 3.0}), HELPS, pairs=4).rules == ()
    assert choose(Scale(**{HELPS: 3.0}), HELPS, pairs=0) == rules.Chosen((), 0, 0)


def test_pairs_that_a_rule_leaves_no_room_for_count_against_it():
    learner = Scale(**{HELPS: 3.0})
    measure = learner.measure
    learner.measure = lambda some: measure([] if HELPS in learner.told else some)
    assert choose(learner, HELPS).rules == ()
