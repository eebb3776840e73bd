from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.config import GateSettings, UpdateConfig
from agentpref.errors import ConfigError
from agentpref.prove.bootstrap import Paired, lower_bound
from agentpref.prove.evidence import Evidence, Generations, ScorerResult, UserCheckResult
from agentpref.prove.gate import judge
from agentpref.prove.results import CheckResult, GateResult
from agentpref.prove.retention import PEOPLE, retention_margin
from agentpref.types import Stratum

RARELY = 0.1
MOSTLY = 0.9
LIVE = Generations(distinct_2=0.60, mean_length=40.0, endless=1, tool_parse=0.9)
SUPPORT = Stratum("default", "support", "any")
TONE = Stratum("default", "tone", "any")


def counted(both: int = 0, gained: int = 0, lost: int = 0, neither: int = 0) -> Paired:
    """Pairs with a prompt each, by who was right: both policies, one of them, or neither."""
    moves = [(1.0, 1.0)] * both + [(0.0, 1.0)] * gained + [(1.0, 0.0)] * lost
    moves += [(0.0, 0.0)] * neither
    live, candidate = zip(*moves, strict=True)
    return Paired(live, candidate, tuple(str(i) for i in range(len(moves))))


GAIN = counted(both=105, gained=90, lost=6, neither=13)
KEPT = counted(both=170, gained=8, lost=8, neither=14)
GOOD = Evidence(new=GAIN, kl=0.05, live=LIVE, candidate=LIVE, retention={SUPPORT: KEPT})


def named(verdict: GateResult, name: str) -> CheckResult:
    return next(check for check in verdict.checks if check.name == name)


def failed(verdict: GateResult) -> list[str]:
    return [check.name for check in verdict.checks if not check.passed]


def writing(**changes: float | bool | None) -> Evidence:
    return replace(GOOD, candidate=replace(LIVE, **changes))  # type: ignore[arg-type]


def answering(**changes: int) -> Evidence:
    """As :func:`writing`, of 32 answers."""
    live = replace(LIVE, answers=({},) * 32)
    return replace(GOOD, live=live, candidate=replace(live, **changes))  # type: ignore[arg-type]


def test_a_better_candidate_that_forgot_nothing_is_promoted_with_a_message() -> None:
    verdict = judge(GOOD)
    assert (verdict.verdict, verdict.reasons) == ("passed", ())
    message = named(verdict, "new preferences").message
    assert message.startswith(".52 -> .91 on 214 held-out pairs, +.39, at least +.3")
    assert message.endswith(
        "90 of 214 prompts better, 6 worse: 1 in over a million by chance, "
        "1 in 42 or rarer proves a gain (first look)"
    )


def test_the_base_as_live_has_nothing_to_retain() -> None:
    coins = Paired((0.5,) * 214, GAIN.candidate, GAIN.prompts)
    assert judge(replace(GOOD, new=coins, retention={})).verdict == "passed"


def test_a_gain_that_is_not_proven_is_insufficient_and_says_what_would_settle_it() -> None:
    few = replace(GOOD, new=counted(both=4, gained=11, lost=4, neither=1), comparisons=100)
    verdict = judge(few)
    assert verdict.verdict == "insufficient"
    assert failed(verdict) == ["new preferences"]
    assert "11 of 20 prompts better, 4 worse: 1 in 17 by chance" in verdict.reasons[0]
    needed = verdict.gain["comparisons_needed"]
    assert needed is not None
    # Of 15 changed ones 11: ((2.414 / 2 + .842 √(.733 · .267)) / .233)² = 45.8 changed, 62 in all.
    assert needed == 100 * 62 / 20
    more = f"if this change is real, about {needed - 100:.0f} more comparisons would settle it"
    assert verdict.reasons[0].endswith(more)


def test_no_new_pair_at_all_is_insufficient() -> None:
    assert judge(replace(GOOD, new=Paired())).verdict == "insufficient"


def test_many_pairs_on_few_prompts_are_insufficient() -> None:
    few = replace(counted(gained=200), prompts=tuple(str(i % 5) for i in range(200)))
    verdict = judge(replace(GOOD, new=few))
    assert verdict.verdict == "insufficient"
    assert "5 of 5 prompts better, 0 worse: 1 in 32 by chance" in verdict.reasons[0]
    assert "this look does not count" in verdict.reasons[0]
    enough = replace(few, prompts=tuple(str(i % 6) for i in range(200)))
    assert judge(replace(GOOD, new=enough)).verdict == "passed"


def test_little_evidence_does_not_excuse_harm() -> None:
    little = counted(both=10, gained=5)
    assert judge(replace(GOOD, new=little)).verdict == "insufficient"
    assert judge(replace(GOOD, new=little, kl=0.5)).verdict == "refused"
    worse = judge(replace(GOOD, new=little.swap()))
    assert worse.verdict == "refused"
    assert "a loss: check the labels" in worse.reasons[0]
    assert worse.refuted


def test_where_no_gain_worth_having_is_there_the_candidate_is_refused() -> None:
    """Else nights of coin labels would be insufficient for ever."""
    verdict = judge(replace(GOOD, new=counted(both=120, gained=20, lost=25, neither=49)))
    assert verdict.verdict == "insufficient"
    verdict = judge(replace(GOOD, new=counted(both=100, gained=45, lost=55, neither=14)))
    assert verdict.verdict == "refused"
    assert failed(verdict) == ["new preferences"]
    assert "no gain worth having: check the labels" in verdict.reasons[0]
    assert verdict.refuted
    unchanged = judge(replace(GOOD, new=counted(both=30, neither=20)))
    assert unchanged.verdict == "refused"
    assert "no gain worth having" in unchanged.reasons[0]
    right = replace(GOOD, new=counted(both=50))
    assert "there is nothing to gain" in judge(right).reasons[0]
    assert judge(right).verdict == "refused", "a tag that live is wrong about may be among them"
    untold = judge(replace(right, known=True, untold=80))
    assert untold.verdict == "insufficient"
    assert "80 more have thumbs of one kind, which prove nothing" in untold.reasons[0]
    known = judge(replace(right, known=True))
    assert (known.verdict, known.reasons) == ("nothing_to_gain", judge(right).reasons)


def test_a_small_gain_that_is_proven_is_promoted_all_the_same() -> None:
    assert judge(replace(GOOD, new=counted(gained=550, lost=450))).verdict == "passed"


@pytest.mark.guarantee("proof")
def test_a_candidate_trained_on_shuffled_labels_is_refused() -> None:
    rng = random.Random(3)
    live = tuple(float(rng.random() < 0.9) for _ in range(220))
    noise = tuple(float(rng.random() < 0.5) for _ in range(220))
    prompts = tuple(map(str, range(220)))
    verdict = judge(
        replace(
            GOOD,
            new=Paired(noise[::-1], noise, prompts),
            retention={SUPPORT: Paired(live, noise, prompts)},
        )
    )
    assert verdict.verdict == "refused"
    assert failed(verdict) == ["new preferences", "retention of default/support/any/any"]
    assert "raise replay.minimum" in verdict.reasons[1]


@pytest.mark.guarantee("proof")
@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=30), st.integers(1, 30))
def test_a_candidate_identical_to_live_is_never_promoted(few: list[float], times: int) -> None:
    right = few * times
    same = Paired(tuple(right), tuple(right), tuple(map(str, range(len(right)))))
    evidence = Evidence(new=same, kl=0.0, live=LIVE, candidate=LIVE, retention={SUPPORT: same})
    verdict = judge(evidence)
    assert verdict.verdict == ("refused" if 2 * 0.9 ** len(right) <= 0.05 else "insufficient")
    assert named(verdict, "retention of default/support/any/any").passed


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 213), st.integers(0, 199))
def test_improving_a_pair_never_undoes_a_promotion(new: int, kept: int) -> None:
    barely = replace(
        GOOD,
        new=counted(both=120, gained=36, lost=20, neither=38),
        retention={SUPPORT: counted(both=163, gained=10, lost=16, neither=11)},
    )
    better = replace(
        barely,
        new=_improved(barely.new, new),
        retention={SUPPORT: _improved(barely.retention[SUPPORT], kept)},
    )
    assert judge(barely).verdict == "passed"
    assert judge(better).verdict == "passed"


def _improved(paired: Paired, index: int) -> Paired:
    right = list(paired.candidate)
    right[index] = 1.0
    return replace(paired, candidate=tuple(right))


@pytest.mark.guarantee("proof")
def test_each_stratum_is_protected_however_good_the_others_are() -> None:
    verdict = judge(replace(GOOD, retention={SUPPORT: KEPT, TONE: counted(both=150, lost=50)}))
    assert verdict.verdict == "refused"
    assert "retention of default/tone/any/any" in failed(verdict)
    assert "retention of default/support/any/any" not in failed(verdict)


def test_a_loss_of_what_people_said_refuses_whatever_a_judge_says() -> None:
    lost = replace(GOOD, people=counted(both=20, gained=2, lost=12, neither=6))
    verdict = judge(lost)
    assert (verdict.verdict, failed(verdict)) == ("refused", [PEOPLE])
    assert named(verdict, PEOPLE).message.startswith(
        ".80 -> .55 on 40 held-out prompts; 2 became better, 12 worse: 1 in 155 by chance, 1 in 20"
    )
    assert judge(replace(GOOD, people=counted(both=20, gained=6, lost=8))).verdict == "passed"
    assert PEOPLE not in [one.name for one in judge(GOOD).checks]


def test_retention_is_judged_by_the_bound_and_not_by_the_estimate() -> None:
    noisy = counted(both=150, gained=16, lost=30, neither=4)
    check = named(judge(replace(GOOD, retention={SUPPORT: noisy})), f"retention of {SUPPORT}")
    assert check.bound is not None
    assert check.bound < -0.07  # the change itself lies within the margin
    assert not check.passed


def test_damage_too_thin_for_any_stratum_is_seen_over_all_together() -> None:
    thin = counted(both=184, gained=2, lost=12, neither=2)
    strata = {Stratum("default", f"t{i}", "any"): thin for i in range(6)}
    # Prompts of different strata are different prompts.
    strata = {s: replace(p, prompts=tuple(s.tag + q for q in p.prompts)) for s, p in strata.items()}
    verdict = judge(replace(GOOD, retention=strata))
    assert failed(verdict) == ["retention of all strata together"]


def test_a_large_stratum_is_held_to_the_margin_of_the_settings() -> None:
    assert retention_margin(5_000, 1, GateSettings()) == 0.03
    large = counted(both=4_000, gained=100, lost=300, neither=600)
    check = named(judge(replace(GOOD, retention={SUPPORT: large})), f"retention of {SUPPORT}")
    assert (check.passed, check.bound) == (False, -0.03)
    assert "widened" not in check.message


def test_the_margin_of_a_small_stratum_is_widened_and_said() -> None:
    check = named(judge(GOOD), f"retention of {SUPPORT}")
    # (z.95 + z.95) sqrt(.1 / 200) + 1 / 200 = 3.2897 * .02236 + .005
    assert check.bound == pytest.approx(-0.0786, abs=1e-4)
    assert "(margin widened from .03: on 200 prompts" in check.message


MUSIC = Stratum("default", "music", "any")
RISK = Stratum("default", "risk", "any")


def test_what_live_is_no_more_right_about_than_a_coin_is_not_lost_by_a_lean_that_swings() -> None:
    """.56 → .44 on 18 prompts and .65 → .45 on 20, nearly all of them turned over."""
    music = counted(gained=8, lost=10)
    music = replace(music, prompts=tuple(f"m{p}" for p in music.prompts))
    risk = counted(both=2, gained=7, lost=11)
    verdict = judge(replace(GOOD, retention={SUPPORT: KEPT, MUSIC: music, RISK: risk}))
    assert verdict.verdict == "passed", verdict.reasons
    said = named(verdict, f"retention of {MUSIC}").message
    assert said.startswith("live is right about 10 of 18 held-out prompts, which a coin may be")
    assert "8 became better, 10 worse: 1 in 2.5 by chance" in said
    together = judge(replace(GOOD, retention={MUSIC: music, RISK: risk}))
    assert together.verdict == "passed", together.reasons


def test_a_proven_loss_of_what_live_hardly_knew_is_refused() -> None:
    coin = counted(both=2, gained=1, lost=16, neither=19)
    verdict = judge(replace(GOOD, retention={SUPPORT: KEPT, MUSIC: coin}))
    assert f"retention of {MUSIC}" in failed(verdict)
    assert "a loss: raise replay.minimum" in verdict.reasons[0]
    allowed = judge(replace(GOOD, retention={MUSIC: coin}), GateSettings(retention_margin=0.5))
    assert allowed.verdict == "passed", "a loss that the settings allow"


def test_what_live_knows_is_not_lost_by_turning_it_over() -> None:
    for known in (counted(both=2, lost=16, gained=2), counted(both=16, lost=4)):
        verdict = judge(replace(GOOD, retention={MUSIC: known}))
        assert failed(verdict) == [f"retention of {MUSIC}"], known


def test_what_became_better_widens_the_margin_and_what_became_worse_does_not() -> None:
    s = GateSettings()
    assert retention_margin(20, 3, s, better=1) == retention_margin(20, 3, s)
    assert retention_margin(20, 3, s, better=5) > retention_margin(20, 3, s)
    turned = counted(both=10, gained=4, lost=5, neither=1)
    check = named(judge(replace(GOOD, retention={MUSIC: turned})), f"retention of {MUSIC}")
    assert check.passed
    assert "on 20 prompts, of which 4 became better, a smaller loss" in check.message


def test_margins_widen_with_fewer_prompts_and_more_checks_only() -> None:
    margins = [retention_margin(n, 3, GateSettings()) for n in (10, 50, 200, 1_000, 10_000)]
    assert margins == sorted(margins, reverse=True)
    assert retention_margin(100, 9, GateSettings()) > retention_margin(100, 3, GateSettings())
    strict = GateSettings(flip_rate=0.02)
    assert retention_margin(100, 3, strict) < retention_margin(100, 3, GateSettings())


@pytest.mark.guarantee(
    "proof",
    f"at most {RARELY:.0%} of 80 harmless ones refused, at least {MOSTLY:.0%} of 30 harmful ones",
)
def test_a_harmless_update_is_rarely_refused_and_a_harmful_one_mostly() -> None:
    """Four strata, one in ten pairs turned over: 5 % at most in theory, when nothing is lost."""
    rng = random.Random(11)
    harmless = [_any_refused(rng, loss=0.05, gain=0.05) for _ in range(80)]
    harmful = [_any_refused(rng, loss=0.13, gain=0.03) for _ in range(30)]
    assert sum(harmless) / len(harmless) <= RARELY
    assert sum(harmful) / len(harmful) >= MOSTLY


def _any_refused(rng: random.Random, loss: float, gain: float) -> bool:
    kinds = [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    strata = []
    for tag, size in enumerate((40, 80, 150, 300)):
        moves = rng.choices(kinds, [loss, gain, 1 - loss - gain], k=size)
        live, candidate = zip(*moves, strict=True)
        strata.append(Paired(live, candidate, tuple(f"{tag}-{i}" for i in range(size))))
    groups = [*strata, Paired.pooled(strata)]
    margins = [retention_margin(len(group), len(groups), GateSettings()) for group in groups]
    bounds = [lower_bound(g, resamples=400, seed=rng.randrange(2**32)).lower for g in groups]
    return any(bound <= -margin for bound, margin in zip(bounds, margins, strict=True))


@pytest.mark.parametrize(
    ("evidence", "name", "message"),
    [
        (replace(GOOD, kl=0.16), "KL budget", "over the budget of .15: raise kl.weight, or refit"),
        (replace(GOOD, kl=math.nan), "KL budget", "nan from the base"),
        (writing(finite=False), "finite", "NaN or infinite"),
        (writing(distinct_2=0.53), "distinct-2", "variety .60 -> .53, at least .54; 0 answers r"),
        (writing(mean_length=31.0), "length ratio", "40.0 -> 31.0 tokens, × .78, outside .80 to"),
        (writing(mean_length=51.0), "length ratio", "outside .80 to 1.25"),
        (answering(empty=1), "empty generations", "1 of 32 answers, live 0"),
        (answering(endless=4), "endless generations", "4 of 32 answers, live 1, at most 3"),
        (writing(tool_parse=0.8), "tool-call JSON", ".90 -> .80 of tool calls parse"),
        (
            replace(GOOD, user_checks=(UserCheckResult("tone", False, "too curt"),)),
            "check tone",
            "too curt",
        ),
    ],
)
def test_each_guard_refuses_alone_and_says_why(evidence: Evidence, name: str, message: str) -> None:
    verdict = judge(evidence)
    assert verdict.verdict == "refused"
    assert failed(verdict) == [name]
    assert message in verdict.reasons[0]


@pytest.mark.parametrize(
    "evidence",
    [
        replace(GOOD, kl=0.15),
        writing(distinct_2=0.55, mean_length=48.0, endless=0, tool_parse=1.0),
        writing(tool_parse=None),
        replace(GOOD, live=replace(LIVE, tool_parse=None)),
        replace(GOOD, user_checks=(UserCheckResult("tone", True),)),
    ],
)
def test_guards_leave_room_up_to_their_bounds(evidence: Evidence) -> None:
    assert judge(evidence).verdict == "passed"


def test_a_scorer_refuses_only_a_proven_loss() -> None:
    fell = ScorerResult("tone", 0.8, 0.6, 32, p=0.2)
    assert judge(replace(GOOD, scorers=(fell,))).verdict == "passed"
    proven = replace(GOOD, scorers=(replace(fell, p=0.01),))
    assert failed(judge(proven)) == ["scorer tone"]
    assert ".80 -> .60 in the mean of 32 prompts: a proven loss" in judge(proven).reasons[0]
    two = replace(GOOD, scorers=(replace(fell, p=0.04), replace(fell, name="other", p=0.9)))
    assert judge(two).verdict == "passed", "of two scorers each may err half as often"
    broken = replace(GOOD, scorers=(replace(fell, error="raised ValueError: no"),))
    assert judge(broken).reasons == ("scorer tone: raised ValueError: no",)


def test_settings_move_the_bounds() -> None:
    assert judge(GOOD, GateSettings(kl_budget=0.04)).verdict == "refused"
    few = counted(gained=8, both=2)
    assert judge(replace(GOOD, new=few)).verdict == "passed"
    sure = GateSettings(confidence=0.999)
    assert judge(replace(GOOD, new=few), sure).verdict == "insufficient"


@pytest.mark.parametrize(
    "setting", [{"length_ratio": [1.1, 1.2]}, {"length_ratio": [0.8]}, {"flip_rate": 2}]
)
def test_settings_out_of_range_are_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"gate\.{next(iter(setting))} is"):
        UpdateConfig.from_mapping({"gate": setting})


def test_the_same_evidence_gives_the_same_verdict() -> None:
    assert judge(GOOD, seed=4) == judge(GOOD, seed=4)


def test_a_verdict_is_plain_json_even_where_numbers_are_not() -> None:
    report = judge(replace(GOOD, kl=math.nan)).to_mapping()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["verdict"] == "refused"
    kl = next(check for check in report["checks"] if check["name"] == "KL budget")
    assert (kl["passed"], kl["value"], kl["bound"]) == (False, None, 0.15)


def test_importing_the_gate_loads_nothing_heavy() -> None:
    code = (
        "import sys, agentpref.prove.gate, agentpref.prefer.strata\n"
        "print({'numpy', 'scipy', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
