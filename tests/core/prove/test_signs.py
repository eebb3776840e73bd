"""The sign test: exact at any size, also where models on the way to the candidate judge."""

from __future__ import annotations

import itertools
import math
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.prove.bootstrap import Paired
from agentpref.prove.signs import Signs, allowed, can_decide, prompts_needed

RISK = 0.05


def test_each_prompt_has_one_sign_that_of_the_sum_of_its_changes() -> None:
    live = (0.5, 0.5, 0.5, 1.0, 0.0, 1.0, 1.0)
    candidate = (1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    signs = Signs.of(Paired(live, candidate, tuple("aaabbcd")))
    assert signs == Signs(prompts=4, better=1, worse=1)
    assert signs.changed == 2
    assert signs + Signs(3, 2, 1) == Signs(7, 3, 2)


def test_chances_are_the_tails_of_the_binomial() -> None:
    signs = Signs(prompts=30, better=15, worse=5)
    tail = sum(comb(20, k) for k in range(15, 21)) / 2**20
    assert signs.chance_of_gain() == pytest.approx(tail)
    assert Signs(30, 5, 15).chance_of_loss() == pytest.approx(tail)
    few = sum(comb(20, k) * 0.6**k * 0.4 ** (20 - k) for k in range(6))
    assert Signs(20, 5, 15).chance_if_worth_having() == pytest.approx(2 * few)
    assert Signs(60, 0, 0).chance_if_worth_having() == pytest.approx(2 * 0.9**60)


def test_no_signs_prove_and_refute_nothing() -> None:
    nothing = Signs()
    assert nothing.chance_of_gain() == nothing.chance_of_loss() == 1.0
    assert nothing.chance_if_worth_having() == 1.0
    assert not can_decide(0, 0.99)


@pytest.mark.guarantee("proof")
def test_a_coin_is_called_a_gain_no_more_often_than_allowed_at_any_size() -> None:
    for look, size in itertools.product((1, 2, 5), range(1, 200, 7)):
        error = allowed(look, RISK)
        proven = [k for k in range(size + 1) if Signs(size, k, size - k).chance_of_gain() <= error]
        assert sum(comb(size, k) for k in proven) / 2**size <= error
        assert bool(proven) == can_decide(size, error)


@given(st.integers(1, 300), st.integers(0, 300))
def test_a_better_prompt_makes_a_gain_never_less_likely(size: int, better: int) -> None:
    better = min(better, size - 1)
    less, more = (Signs(size, k, size - k) for k in (better, better + 1))
    assert more.chance_of_gain() <= less.chance_of_gain()
    assert more.chance_of_loss() >= less.chance_of_loss()
    assert more.chance_if_worth_having() >= less.chance_if_worth_having()


def test_the_errors_of_all_looks_add_up_to_the_risk() -> None:
    spent = math.fsum(allowed(look, RISK) for look in range(1, 10_001))
    assert spent == pytest.approx(RISK * (1 - 1 / 10_001))
    assert allowed(1, RISK) == RISK / 2


@pytest.mark.parametrize("choices", [1, 2, 6, 62])
def test_choices_share_what_as_many_looks_may_err(choices: int) -> None:
    last = 3 + choices
    each = allowed(last, RISK, choices)
    looks = [allowed(look, RISK) for look in range(last - choices + 1, last + 1)]
    assert choices * each == pytest.approx(sum(looks))


@pytest.mark.guarantee("proof")
def test_judges_that_learn_from_earlier_labels_leave_the_signs_fair_coins() -> None:
    """All labelings of ten prompts, in parts of 4, 3 and 3; each judge repeats the majority."""
    parts, counts = [range(4, 7), range(7, 10)], [0] * 7
    for labels in itertools.product((0, 1), repeat=10):
        right = 0
        for part in parts:
            majority = int(2 * sum(labels[: part.start]) > part.start)
            right += sum(labels[i] == majority for i in part)
        counts[right] += 1
    assert [count / 2**10 for count in counts] == [comb(6, k) / 2**6 for k in range(7)]


def test_more_prompts_are_needed_where_less_is_gained_and_more_is_asked() -> None:
    clear, faint = Signs(100, 75, 25), Signs(100, 60, 40)
    needed = [prompts_needed(signs, RISK / 2) for signs in (clear, faint)]
    assert needed[0] is not None
    assert needed[1] is not None
    assert 25 < needed[0] < 40 < 150 < needed[1] < 250
    stricter = prompts_needed(clear, RISK / 6)
    assert stricter is not None
    assert stricter > needed[0]
    halved = prompts_needed(Signs(200, 75, 25), RISK / 2)
    assert halved == pytest.approx(2 * needed[0], abs=1), "half of the prompts do not change"
    assert prompts_needed(Signs(100, 50, 50), RISK) is None
    assert prompts_needed(Signs(4, 4, 0), RISK / 2) == 6, "what all better ones would prove"
