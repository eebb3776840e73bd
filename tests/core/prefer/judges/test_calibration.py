"""How right judges are: real verdicts, known truths, and judges that nothing can be said of."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import MissingDependency
from agentpref.prefer.judges.calibration import (
    Calibration,
    Estimate,
    GoldVerdict,
    calibrate,
    drifted,
    people_agreement,
)

LLMBAR = Path(__file__).parents[3] / "data" / "llmbar" / "verdicts.json"
WINNERS = {"1": "a", "2": "b", None: "tie"}

answers = st.sampled_from(("a", "b"))
winners = st.sampled_from(("a", "b", "tie"))
verdicts = st.builds(
    GoldVerdict,
    st.sampled_from(("code", "chat")),
    answers,
    winners,
    winners,
    st.sampled_from(("a", "b", None)),
    st.none() | st.floats(0.5, 1),
)


def right(n: int, stratum: str = "x") -> list[GoldVerdict]:
    return [GoldVerdict(stratum, "a", "a", "a", "a")] * n


def wrong(n: int, stratum: str = "x") -> list[GoldVerdict]:
    return [GoldVerdict(stratum, "a", "b", "b", "b")] * n


def llmbar(judge: str) -> list[GoldVerdict]:
    found = []
    for row in json.loads(LLMBAR.read_text(encoding="utf-8")):
        first, second = row["lengths"]
        longer = None if first == second else "a" if first > second else "b"
        given, swapped = (WINNERS[said] for said in row["verdicts"][judge])
        found.append(GoldVerdict("natural", WINNERS[row["label"]], given, swapped, longer))
    return found


@pytest.mark.parametrize(
    ("judge", "counts", "accuracy", "consistency", "noise", "position_bias"),
    [
        ("GPT-4", (93, 2, 5), 0.979, 0.95, 0.05, 0.005),
        ("ChatGPT", (67, 4, 29), 0.944, 0.71, 0.0625, 0.105),
        ("ChatGPT-0301", (73, 5, 22), 0.936, 0.78, 0.0696, 0.07),
        ("LLaMA2", (70, 9, 21), 0.886, 0.79, 0.1187, 0.015),
        ("PaLM2", (73, 5, 22), 0.936, 0.80, 0.0696, 0.051),
        ("Falcon", (50, 2, 48), 0.962, 0.52, 0.05, 0.24),
    ],
)
def test_six_real_judges_are_measured_as_they_are(
    judge: str,
    counts: tuple[int, int, int],
    accuracy: float,
    consistency: float,
    noise: float,
    position_bias: float,
) -> None:
    found = calibrate(llmbar(judge))
    one = found.strata["natural"]
    assert (one.right, one.wrong, one.ties) == counts
    assert one.accuracy is not None
    assert one.accuracy.value == pytest.approx(accuracy, abs=5e-4)
    assert one.consistency is not None
    assert one.consistency.value == pytest.approx(consistency)
    assert one.position_bias is not None
    assert one.position_bias.value == pytest.approx(position_bias, abs=5e-4)
    assert found.noise("natural") == pytest.approx(noise, abs=1e-4)


def test_a_real_judge_that_likes_length_is_shown_to() -> None:
    bias = calibrate(llmbar("LLaMA2")).pooled.length_bias
    assert bias is not None
    assert bias.value == pytest.approx(0.250, abs=5e-4)
    assert bias.low > 0


def test_bounds_are_those_of_clopper_and_pearson() -> None:
    one = calibrate([*right(9), *wrong(1)]).pooled
    assert one.accuracy == pytest.approx(Estimate(0.9, 0.5550, 0.9975), abs=1e-4)
    assert one.lower == pytest.approx(0.6058, abs=1e-4)
    assert calibrate(right(5)).pooled.lower == pytest.approx(0.05 ** (1 / 5))


def test_five_right_verdicts_are_the_fewest_that_are_trusted() -> None:
    assert calibrate(right(4)).noise("x") is None
    assert calibrate(right(5)).noise("x") == pytest.approx(0.5 / 6)


def test_no_judge_counts_as_righter_than_95_percent() -> None:
    found = calibrate(right(1_000))
    assert found.strata["x"].noise < 0.001
    assert found.noise("x") == 0.05


def test_a_stratum_without_gold_is_not_trusted_whatever_the_others_say() -> None:
    found = calibrate(right(100))
    assert found.pooled.trusted
    assert found.noise("y") is None
    assert found.noise("all") is None


def test_a_stratum_named_all_is_a_stratum() -> None:
    found = calibrate([*right(10, "all"), *wrong(10)])
    assert found.strata["all"].n == 10
    assert found.noise("all") is not None


def test_a_judge_no_better_than_a_coin_is_not_trusted() -> None:
    assert calibrate([*right(55), *wrong(45)]).noise("x") is None


def test_ties_count_neither_as_right_nor_as_wrong_and_are_shown() -> None:
    tie = GoldVerdict("x", "a", "a", "b", "a")
    found, without = (
        calibrate([*right(20), *wrong(2), *[tie] * 30]),
        calibrate([*right(20), *wrong(2)]),
    )
    assert found.pooled.ties == 30
    assert found.noise("x") == without.noise("x")


def test_a_judge_that_always_names_the_first_decides_nothing() -> None:
    found = calibrate([GoldVerdict("x", "a", "a", "b", "a")] * 30)
    one = found.strata["x"]
    assert (one.ties, one.accuracy, one.lower, found.noise("x")) == (30, None, 0, None)
    assert one.consistency is not None
    assert one.consistency.value == 0
    assert one.position_bias is not None
    assert one.position_bias.value == 0.5
    assert one.position_bias.low > 0.4


def test_a_judge_that_always_says_a_is_a_coin_on_fair_gold() -> None:
    gold = [GoldVerdict("x", better, "a", "a", None) for better in ("a", "b") * 20]
    found = calibrate(gold)
    assert (found.pooled.right, found.pooled.wrong) == (20, 20)
    assert found.noise("x") is None
    assert found.pooled.length_bias is None


def test_gold_of_one_label_only_leaves_what_it_cannot_say_unknown() -> None:
    one = calibrate(right(10)).pooled
    assert one.sensitivity is not None
    assert (one.specificity, one.length_bias) == (None, None)


@pytest.mark.parametrize(
    "gold", [[], right(1), wrong(1), [GoldVerdict("x", "a", "tie", "tie", None)]]
)
def test_next_to_nothing_is_measured_without_a_number_for_noise(gold: list[GoldVerdict]) -> None:
    found = calibrate(gold)
    assert found.noise("x") is None
    assert found.pooled.n == len(gold)
    assert drifted(found, gold) is None


def test_a_consistent_judge_has_no_position_bias_and_an_interval_with_width() -> None:
    bias = calibrate(right(10)).pooled.position_bias
    assert bias is not None
    assert bias.value == 0
    assert bias.low < 0 < bias.high


def test_the_interval_of_the_position_bias_covers_a_known_bias() -> None:
    covered = 0
    for seed in range(200):
        rng, gold = random.Random(seed), []
        for _ in range(40):  # 20 % follow the first place and 5 % the second: a bias of .075
            kind = rng.choices(("first", "second", "agree"), (0.2, 0.05, 0.75))[0]
            said = {"first": ("a", "b"), "second": ("b", "a"), "agree": ("a", "a")}[kind]
            gold.append(GoldVerdict("x", "a", *said, None))
        bias = calibrate(gold).pooled.position_bias
        covered += bias is not None and bias.low <= 0.075 <= bias.high
    assert 0.91 <= covered / 200 <= 0.99


def test_confidences_that_are_right_have_no_calibration_error() -> None:
    gold = [*[one._replace(confidence=0.9) for one in (*right(9), *wrong(1))], *right(5)]
    one = calibrate(gold).pooled
    assert one.calibration_error == pytest.approx(0, abs=1e-12)
    assert one.brier == pytest.approx(0.09)
    boastful = calibrate([*right(1), *wrong(1)[:0], wrong(1)[0]._replace(confidence=1.0)]).pooled
    assert (boastful.calibration_error, boastful.brier) == (1.0, 1.0)
    assert calibrate(right(3)).pooled.brier is None


@given(st.lists(verdicts, max_size=30))
def test_a_calibration_survives_json(gold: list[GoldVerdict]) -> None:
    found = calibrate(gold)
    assert Calibration.from_mapping(json.loads(json.dumps(found.to_mapping()))) == found


@given(st.lists(verdicts, max_size=30))
def test_which_answer_is_called_a_changes_nothing(gold: list[GoldVerdict]) -> None:
    assert calibrate([one.swap() for one in gold]) == calibrate(gold)


@given(st.lists(verdicts, max_size=30))
def test_counts_add_up_and_values_lie_in_their_intervals(gold: list[GoldVerdict]) -> None:
    found = calibrate(gold)
    for one in (found.pooled, *found.strata.values()):
        assert one.right + one.wrong + one.ties == one.n
        for field in ("accuracy", "consistency", "position_bias", "sensitivity", "length_bias"):
            estimate = getattr(one, field)
            assert estimate is None or estimate.low <= estimate.value <= estimate.high
    for tag in ("code", "chat", "neither"):
        noise = found.noise(tag)
        assert noise is None or 0.05 <= noise < 0.5


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_further_right_verdict_never_costs_trust(yes: int, no: int) -> None:
    fewer, more = calibrate(right(yes) + wrong(no)), calibrate(right(yes + 1) + wrong(no))
    assert more.pooled.lower >= fewer.pooled.lower
    assert more.pooled.noise < fewer.pooled.noise


def test_unknown_keys_of_a_newer_version_are_passed_over() -> None:
    values = calibrate(right(3)).to_mapping()
    values["all"]["invented_later"] = 1
    assert Calibration.from_mapping(values) == calibrate(right(3))


def test_a_judge_that_became_worse_is_told_with_both_numbers() -> None:
    why = drifted(calibrate([*right(46), *wrong(4)]), [*right(11), *wrong(9)])
    assert why is not None
    assert "11 of 20" in why
    assert "46 of 50" in why


def test_a_judge_that_is_as_right_as_before_or_righter_has_not_drifted() -> None:
    known = calibrate([*right(46), *wrong(4)])
    assert drifted(known, [*right(18), *wrong(2)]) is None
    assert drifted(calibrate([*right(30), *wrong(20)]), right(20)) is None
    assert drifted(known, []) is None
    assert drifted(known, wrong(20, "never calibrated")) is None


def test_the_drift_test_of_one_stratum_is_fishers() -> None:
    from scipy.stats import fisher_exact

    for now in range(11, 20):
        chance = fisher_exact([[now, 20 - now], [46, 4]], alternative="less").pvalue
        told = drifted(calibrate([*right(46), *wrong(4)]), [*right(now), *wrong(20 - now)])
        assert (told is not None) == (chance <= 0.05)


def test_another_mix_of_strata_is_no_drift() -> None:
    easy, hard = [*right(99, "easy"), *wrong(1, "easy")], [*right(11, "hard"), *wrong(9, "hard")]
    again = [*right(10, "easy"), *right(55, "hard"), *wrong(45, "hard")]
    assert drifted(calibrate([*easy, *hard]), again) is None


def test_a_judge_that_did_not_change_is_accused_at_most_as_often_as_asked() -> None:
    accused = 0
    for seed in range(150):
        rng = random.Random(seed)
        drawn = [right(1)[0] if rng.random() < 0.85 else wrong(1)[0] for _ in range(90)]
        accused += drifted(calibrate(drawn[:60]), drawn[60:]) is not None
    assert accused / 150 <= 0.05


def test_people_are_compared_with_themselves_and_with_each_other() -> None:
    votes = [
        ("q1", "ann", "a"),
        ("q1", "bob", "a"),
        ("q2", "ann", "b"),
        ("q2", "bob", "a"),
        ("q2", "bob", "b"),  # bob changed his mind, so both agree
        ("q3", "ann", "a"),
        ("q3", "bob", "b"),
        ("q4", "ann", "tie"),
        ("q4", "ann", "tie"),
    ]
    found = people_agreement(votes)
    assert (found["votes"], found["repeats"], found["self_agreement"]) == (9, 2, 0.5)
    assert (found["pairs"], found["agreement"]) == (3, pytest.approx(2 / 3))
    # Values aa, bb, ab: o_ab = 2 of n = 6, n_a = n_b = 3, so α = 1 - (n - 1) o_ab / (2 n_a n_b).
    assert found["alpha"] == pytest.approx(1 - 5 * 2 / (2 * 9))


@pytest.mark.parametrize("votes", [[], [("q", "ann", "a")], [("q", "ann", "a"), ("q", "bob", "a")]])
def test_alpha_is_unknown_where_nothing_varies(votes: list[tuple[str, str, str]]) -> None:
    assert people_agreement(votes)["alpha"] is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), winners), max_size=40))
def test_shares_of_agreement_are_shares(votes: list[tuple[int, int, str]]) -> None:
    found = people_agreement(votes)
    for name in ("self_agreement", "agreement"):
        assert found[name] is None or 0 <= found[name] <= 1
    assert found["alpha"] is None or found["alpha"] <= 1


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingDependency, match=r"pip install 'agentpref\[judge\]'"):
        calibrate(right(3))
    monkeypatch.setitem(sys.modules, "evalica", None)
    with pytest.raises(MissingDependency, match=r"pip install 'agentpref\[judge\]'"):
        people_agreement([("q", "ann", "a"), ("q", "bob", "b")])
