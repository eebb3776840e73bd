from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import TrainingDiverged, UpdateError
from agentpref.prove.metrics import (
    RMatrix,
    accuracy,
    correctness,
    distinct_n,
    evenly,
    length_ratio,
    recovery,
    thumb_margins,
)

STREAM = RMatrix(
    strata=("a", "b", "c"),
    rows=(
        (0.50, 0.40, 0.60),
        (0.90, 0.50, 0.60),
        (0.92, 0.95, 0.70),
        (0.70, 0.85, 0.90),
    ),
)


def test_a_pair_is_right_above_zero_and_a_coin_at_zero() -> None:
    assert correctness([2.0, -1e-9, 0.0, -0.0, 1e-9]) == (1.0, 0.0, 0.5, 0.5, 1.0)


def test_the_base_scores_one_half() -> None:
    assert accuracy(correctness([0.0] * 7)) == 0.5


@pytest.mark.parametrize("margin", [math.nan, math.inf, -math.inf])
def test_a_margin_that_is_not_finite_is_an_error_that_names_the_pair(margin: float) -> None:
    with pytest.raises(TrainingDiverged, match=f"pair 1 is {margin}.*learning rate"):
        correctness([0.1, margin])


def test_the_accuracy_of_nothing_is_an_error() -> None:
    with pytest.raises(UpdateError, match="0 held-out pairs"):
        accuracy([])


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_swapping_chosen_and_rejected_mirrors_the_accuracy(margins: list[float]) -> None:
    mirrored = accuracy(correctness([-margin for margin in margins]))
    assert mirrored == pytest.approx(1 - accuracy(correctness(margins)))


def test_the_stream_metrics_equal_their_hand_worked_values() -> None:
    assert STREAM.acc == pytest.approx((0.70 + 0.85 + 0.90) / 3)
    assert STREAM.bwt == pytest.approx(((0.70 - 0.90) + (0.85 - 0.95)) / 2)  # -.15
    assert STREAM.fwt == pytest.approx(((0.50 - 0.40) + (0.70 - 0.60)) / 2)  # +.10
    assert STREAM.forgetting == pytest.approx(((0.92 - 0.70) + (0.95 - 0.85)) / 2)  # .16


def test_accuracy_before_any_update_is_not_something_to_forget() -> None:
    born_good = RMatrix(("a", "b"), ((0.99, 0.5), (0.60, 0.5), (0.60, 0.9)))
    assert born_good.forgetting == 0.0


def test_one_update_can_have_forgotten_nothing() -> None:
    single = RMatrix(("a",), ((0.5,), (0.9,)))
    assert (single.acc, single.bwt, single.fwt, single.forgetting) == (0.9, 0.0, 0.0, 0.0)


def test_the_matrix_and_its_metrics_are_reported_together() -> None:
    report = STREAM.to_mapping()
    assert report["strata"] == ("a", "b", "c")
    assert report["rows"] == STREAM.rows
    assert report["bwt"] == STREAM.bwt


@pytest.mark.parametrize("rows", [((0.5,),), ((0.5,), (0.5, 0.5)), ((0.5,),) * 3])
def test_a_matrix_of_the_wrong_shape_is_refused(rows: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(UpdateError, match="needs 2 rows of 1"):
        RMatrix(("a",), rows)


def test_recovery_is_the_closed_share_of_the_gap() -> None:
    assert recovery(0.8, naive=0.6, joint=0.9) == pytest.approx(2 / 3)
    assert recovery(0.8, naive=0.9, joint=0.9) is None
    assert recovery(0.8, naive=0.9, joint=0.7) is None


def test_distinct_2_counts_bigrams_over_the_whole_set() -> None:
    # ab bc | ab bd : four bigrams, three of them distinct; a single token has none
    assert distinct_n(["abc", "abd", "a"]) == 3 / 4
    assert distinct_n([[7, 7, 7, 7]]) == 1 / 3
    assert distinct_n(["a", ""]) == 0.0


def test_distinct_n_takes_other_orders() -> None:
    assert distinct_n(["aab"], n=1) == 2 / 3
    assert distinct_n(["aaaa"], n=3) == 1 / 2


def test_length_ratio_stays_finite_for_empty_answers() -> None:
    assert length_ratio(30.0, 40.0) == 0.75
    assert length_ratio(0.0, 40.0) == 1 / 40
    assert length_ratio(40.0, 0.0) == 40.0


# Thumbs

EIGHTHS = st.integers(-400, 400).map(lambda n: n / 8)
ROW = st.tuples(EIGHTHS, EIGHTHS, st.booleans())
"""Log-ratios of an answer and of one to another prompt, and whether the answer was liked."""
THUMBS = st.lists(ROW, min_size=4, max_size=4) | st.lists(ROW, min_size=1, max_size=2)
"""As many of them as have a mean without rounding."""


def thumb_accuracy(rows: list[tuple[float, float, bool]]) -> float:
    """Accuracy on as many likes as dislikes, as the exam takes it."""
    right = correctness(thumb_margins(*zip(*rows, strict=True)))
    counted = evenly({str(i): liked for i, (_, _, liked) in enumerate(rows)})
    return accuracy([right[int(i)] for i in counted])


def test_a_thumb_is_right_when_its_answer_moved_the_way_that_was_asked_for() -> None:
    margins = thumb_margins([3.0, 1.0, 3.0, 1.0, 2.0], [1.0, 3.0], [True, True, False, False, True])
    assert margins == (1.0, -1.0, -1.0, 1.0, 0.0)
    assert correctness(margins) == (1.0, 0.0, 0.0, 1.0, 0.5)


def test_to_the_base_all_thumbs_are_coins() -> None:
    assert correctness(thumb_margins([0.0] * 3, [0.0] * 3, [True, False, True])) == (0.5,) * 3
    assert thumb_margins([], [], []) == ()


@given(THUMBS, EIGHTHS)
def test_a_constant_added_to_all_log_ratios_changes_no_margin(rows, shift) -> None:
    moved = [(ratio + shift, other + shift, liked) for ratio, other, liked in rows]
    before, after = (thumb_margins(*zip(*r, strict=True)) for r in (rows, moved))
    assert before == after


def test_a_policy_that_lowers_everything_is_still_seen_to_tell_right_from_wrong() -> None:
    """With KTO's clamp at 0 both likes would be wrong here, and right again 9 nats higher."""
    assert thumb_margins([-2.0, -4.0, -8.0], [-6.0, -4.0], [True, True, False]) == (3.0, 1.0, 3.0)


@given(
    st.lists(st.booleans(), min_size=2, max_size=30).filter(lambda kinds: len(set(kinds)) == 2),
    EIGHTHS,
    EIGHTHS,
)
def test_moving_all_answers_alike_gains_nothing_whatever_people_mostly_press(
    kinds, ratio, other
) -> None:
    assert thumb_accuracy([(ratio, other, liked) for liked in kinds]) == 0.5


@given(st.dictionaries(st.text(max_size=4), st.booleans(), max_size=30))
def test_as_many_likes_as_dislikes_count_and_all_of_the_rarer_kind(kinds) -> None:
    counted = evenly(kinds)
    sizes = {kind: list(kinds.values()).count(kind) for kind in (True, False)}
    for kind in (True, False):
        chosen = {key for key in counted if kinds[key] is kind}
        assert len(chosen) == min(sizes.values())
        assert all(
            key > max(chosen) for key in kinds.keys() - chosen if kinds[key] is kind and chosen
        )
