"""A learner on a real model: it encodes, scores, trains and saves, the same way every time."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from contextlib import closing

import pytest
import torch

from agentpref.config import KLSettings, LossSettings, ThumbSettings
from agentpref.errors import TrainingDiverged
from agentpref.home import Home
from agentpref.learn.cache import LogpCache
from agentpref.models.base import load_base
from agentpref.prove.metrics import ranking_accuracy
from agentpref.record.database import connect
from tests.core.learn.examples import answer, make_group, make_pair, make_thumb, with_completions


def digest(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def margins(learner, rows):
    """The candidate's h of each pair: how much likelier than the base it made the chosen answer."""
    return [chosen - rejected for chosen, rejected in learner.ratios("candidate", rows)]


def test_a_fresh_candidate_is_the_base(make_learner, pairs):
    learner = make_learner()
    rows = learner.encode([*pairs, make_group(99, {"a": 1.0, "b": 0.5, "c": 0.0})])
    assert learner.ratios("candidate", rows) == [*[(0.0, 0.0)] * len(pairs), (0.0, 0.0, 0.0)]


def test_a_base_is_as_new_once_its_learner_is_detached(make_learner, pairs, random_base):
    from agentpref.config import UpdateConfig
    from agentpref.learn.learner import Learner

    first = make_learner(epochs=2)
    rows = first.encode(pairs)
    fresh = first.score("base", rows)
    first.fit(rows, new=len(rows))
    first.detach()
    names = [name for name, _ in first.base.model.named_modules()]
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    assert not [m for m in first.base.model.modules() if "forward" in vars(m)]
    again = Learner(first.base, None, UpdateConfig(precision="float32"))
    assert again.score("base", rows) == fresh
    assert again.score("candidate", rows) == fresh


def test_the_first_loss_of_a_fresh_candidate_is_log_2(make_learner, pairs):
    learner = make_learner(loss=LossSettings(nll=0.0), batch_size=12, epochs=1)
    report = learner.fit(learner.encode(pairs), new=12)
    assert report.first_loss == pytest.approx(math.log(2), abs=1e-5)


def test_a_change_of_the_weights_file_does_not_change_a_run(
    make_learner, pairs, random_base, tmp_path
):
    base = shutil.copytree(random_base, tmp_path / "base")
    learner = make_learner(base=base)
    rows = learner.encode(pairs)
    before = learner.score("base", rows)
    weights = base / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(bytes(weights.stat().st_size // 2))
    assert learner.score("base", rows) == before


def test_training_makes_chosen_answers_likelier_than_rejected_ones(make_learner, pairs):
    learner = make_learner(epochs=8)
    rows = learner.encode(pairs)
    report = learner.fit(rows, new=12)
    assert min(margins(learner, rows)) > 0
    assert report.last_loss < report.first_loss
    assert report.steps == 8 * 3


def test_training_changes_neither_the_base_nor_live(make_learner, pairs, tmp_path):
    first = make_learner(epochs=2)
    rows = first.encode(pairs)
    first.fit(rows, new=12)
    first.save(tmp_path)
    second = make_learner(live=tmp_path, epochs=2)
    before = [second.score(policy, rows) for policy in ("base", "live")]
    assert second.score("candidate", rows) == second.score("live", rows)
    second.fit(rows, new=12)
    assert [second.score(policy, rows) for policy in ("base", "live")] == before
    assert second.score("candidate", rows) != second.score("live", rows)


def test_a_saved_adapter_loads_in_plain_peft(make_learner, pairs, tmp_path, random_base):
    from peft import PeftModel

    learner = make_learner(epochs=2)
    rows = learner.encode(pairs)
    learner.fit(rows, new=12)
    learner.save(tmp_path)
    model = PeftModel.from_pretrained(load_base(str(random_base)).model, tmp_path).eval()
    ids = torch.tensor([rows[0].prompt + rows[0].completions[0]])
    with torch.no_grad(), learner.policy("candidate") as candidate:
        torch.testing.assert_close(model(ids).logits, candidate(ids).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"]


def test_the_same_inputs_and_seed_give_the_same_bytes(make_learner, pairs, tmp_path):
    for name in ("one", "two"):
        learner = make_learner(epochs=2)
        learner.fit(learner.encode(pairs), new=12)
        learner.save(tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_another_seed_gives_other_bytes(make_learner, pairs, tmp_path):
    for seed in (0, 1):
        learner = make_learner(epochs=1, seed=seed)
        learner.fit(learner.encode(pairs), new=12)
        learner.save(tmp_path / str(seed))
    assert digest(tmp_path / "0") != digest(tmp_path / "1")


def test_the_kl_penalty_keeps_the_candidate_near_live(make_learner, pairs):
    moved = {}
    for kl in (KLSettings(weight=0.0), KLSettings(weight=100.0, target=0.001)):
        learner = make_learner(epochs=4, kl=kl)
        rows = learner.encode(pairs)
        learner.fit(rows, new=12)
        moved[kl.weight] = sum(map(abs, margins(learner, rows)))
    assert moved[100.0] < 0.7 * moved[0.0]


def test_the_anchor_keeps_chosen_answers_likely(make_learner, pairs):
    likely = {}
    for nll in (0.0, 2.0):
        learner = make_learner(epochs=4, loss=LossSettings(nll=nll), kl=KLSettings(weight=0))
        rows = learner.encode(pairs)
        learner.fit(rows, new=12)
        likely[nll] = sum(chosen for chosen, _ in learner.score("candidate", rows))
    assert likely[2.0] > likely[0.0]


def test_an_imitation_is_the_least_weight_of_that_anchor(make_learner, pairs):
    def learned(own, **more):
        learner = make_learner(epochs=2, loss=LossSettings(nll=own))
        rows = learner.encode(pairs)
        report = learner.fit(rows, new=12, **more)
        assert report.imitation == more.get("imitation", 0.0)
        return learner.score("candidate", rows)

    assert learned(0.1, imitation=2.0) == learned(2.0) == learned(2.0, imitation=0.5)
    assert learned(0.1, imitation=2.0) != learned(0.1)


def test_a_loss_that_is_not_finite_ends_training(make_learner, pairs):
    learner = make_learner(epochs=1)
    rows = learner.encode(pairs)
    with learner.policy("candidate") as model, torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="nan"):
        learner.fit(rows, new=12)


def test_divergences_also_cache_the_candidates_scores(make_learner, pairs, tmp_path):
    """They are cached, and equal to those that scoring gives; other rows are not cached."""
    learner = make_learner(epochs=2)
    rows = learner.encode(pairs)
    learner.fit(rows, new=12)
    expected = learner.score("candidate", rows)
    with closing(connect(Home.create(tmp_path / "home"))) as connection:
        learner._caches = {
            policy: LogpCache(connection, learner.base.numbers, policy)
            for policy in ("base", "candidate")
        }
        found = learner.divergences(rows[1:])
        assert all(kl > 0 for kls in found for kl in kls)
        computed = []
        compute = learner._compute
        learner._compute = lambda policy, rows: computed.append(rows) or compute(policy, rows)
        scores = learner.score("candidate", rows)
        assert computed == [rows[:1]]
        learner.score("base", rows)
        assert computed == [rows[:1], rows]
    for score, wanted in zip(scores, expected, strict=True):
        assert score == pytest.approx(wanted, abs=1e-3)


def test_scoring_speed_is_measured_on_scored_rows_or_on_a_trial(make_learner, pairs):
    learner = make_learner()
    rows = learner.encode(pairs)
    assert learner.scoring_speed(rows) > 0
    scored = learner._scored_tokens
    assert scored == sum(row.width for row in rows)
    learner.scoring_speed(rows)
    assert learner._scored_tokens == scored, "the trial is made once"


def lone(pair, number, liked):
    """A thumb on one of the answers of a pair."""
    own = pair.completions[not liked]
    return make_thumb(number, own.message, liked, prompt=pair.prompt)


def test_pairs_and_thumbs_are_trained_in_the_same_batches(make_learner, pairs):
    learner = make_learner(epochs=8, loss=LossSettings(beta=0.5))
    thumbs = learner.encode([lone(p, n, n % 2 == 0) for n, p in enumerate(pairs[6:])])
    rows = [*learner.encode(pairs[:6]), *thumbs]
    report = learner.fit(rows, new=12)
    assert report.steps == 8 * 3
    assert min(margins(learner, rows[:6])) > 0
    ratios = [own for own, _ in learner.ratios("candidate", thumbs)]
    likes, dislikes = ratios[::2], ratios[1::2]
    assert min(likes) > max(dislikes)


def test_thumbs_that_cannot_be_encoded_are_counted(make_learner, pairs):
    learner = make_learner()
    assert learner.encode([lone(pairs[0], 0, True)]) == []
    assert [o.reason for o in learner.objections.values()] == ["no_mismatch"]


GRADES = {"just right": 1.0, "good enough": 0.7, "not quite": 0.3, "quite wrong": 0.0}


def groups(count):
    return [
        make_group(100 + n, {f"{answer}, {n}": grade for answer, grade in GRADES.items()})
        for n in range(count)
    ]


def test_groups_pairs_and_thumbs_are_trained_in_one_update(make_learner, pairs):
    """Rows of two and of four completions are in the same batches."""
    learner = make_learner(epochs=8, loss=LossSettings(beta=0.5), thumbs=ThumbSettings(weight=0.5))
    examples = [
        *groups(4),
        *pairs[:4],
        *(lone(p, n, n % 2 == 0) for n, p in enumerate(pairs[4:8])),
    ]
    rows = learner.encode(examples)
    assert [row.example for row in rows] == examples
    assert {len(row.completions) for row in rows} == {2, 4}
    labels = list(GRADES.values())

    def accuracies():
        return [ranking_accuracy(own, labels) for own in learner.ratios("candidate", rows[:4])]

    assert accuracies() == [0.5] * 4, "the base ranks nothing"
    report = learner.fit(rows, new=len(rows))
    assert report.steps == 8 * 3
    assert report.last_loss < report.first_loss
    assert sum(accuracies()) / 4 > 0.9
    assert min(margins(learner, rows[4:8])) > 0
    likes, dislikes = (
        [own for own, _ in learner.ratios("candidate", rows[8:])][kind::2] for kind in (0, 1)
    )
    assert min(likes) > max(dislikes)


def test_a_group_is_ranked_right_by_the_share_of_its_comparisons_and_a_half_without_any():
    assert ranking_accuracy([3.0, 2.0, 1.0, 1.0], [1.0, 0.7, 0.7, 0.0]) == pytest.approx(4.5 / 5)
    assert ranking_accuracy([3.0, 1.0], [0.5, 0.5]) == 0.5


def test_the_first_loss_of_groups_pairs_and_thumbs_is_known(make_learner, pairs):
    """Log 2 for what is compared, and half of its weight for a thumb."""
    learner = make_learner(loss=LossSettings(nll=0.0), batch_size=12, epochs=1)
    thumbs = [lone(p, n, n % 2 == 0) for n, p in enumerate(pairs[:4])]
    rows = learner.encode([*groups(4), *pairs[:4], *thumbs])
    report = learner.fit(rows, new=12)
    assert report.first_loss == pytest.approx((8 * math.log(2) + 4 * 0.5) / 12, abs=1e-5)


def test_hardness_is_minus_the_margin_and_minus_infinity_where_there_is_no_row(
    make_learner, pairs, tmp_path
):
    first = make_learner(epochs=2)
    first.fit(first.encode(pairs), new=12)
    first.save(tmp_path)
    learner = make_learner(live=tmp_path)
    expected = [-h for h in margins(first, first.encode(pairs))]
    same = with_completions(make_pair(99, "no", "yes"), {"message": answer("yes", 1.0).message})
    found = learner.hardness([same, *pairs])
    assert found[0] == -math.inf
    assert found[1:] == pytest.approx(expected, abs=1e-3)
    assert not learner.objections, "what is tried for replay is not counted"


class TestLossMask:
    """A loss mask keeps tokens that somebody else wrote, such as a tool, out of the loss."""

    @pytest.fixture
    def three(self, make_learner, pairs):
        """A pair whose chosen answer is masked in three ways: not at all, its start, its end."""
        (row,) = make_learner().encode(pairs[3:4])
        ids = row.completions[0]
        start = tuple(at < 4 for at in range(len(ids)))
        masks = (None, start, tuple(not counts for counts in start))
        return [with_completions(pairs[3], {"token_ids": ids, "loss_mask": mask}) for mask in masks]

    def test_masked_tokens_are_in_no_score(self, make_learner, three):
        learner = make_learner()
        rows = learner.encode(three)
        (whole, other), (start, same), (end, same_too) = learner.score("base", rows)
        assert start + end == pytest.approx(whole, abs=1e-3)
        assert 0 > start > whole
        assert other == pytest.approx(same, abs=1e-3)
        assert other == pytest.approx(same_too, abs=1e-3)

    def test_masks_have_scores_of_their_own_in_the_cache(self, make_learner, three, tmp_path):
        learner = make_learner()
        rows = learner.encode(three)
        expected = [learner.score("base", [row])[0] for row in rows]
        with closing(connect(Home.create(tmp_path / "home"))) as connection:
            learner._caches = {"base": LogpCache(connection, learner.base.numbers, "base")}
            for _ in range(2):
                for row, scores in zip(rows, expected, strict=True):
                    assert learner.score("base", [row])[0] == pytest.approx(scores, abs=1e-3)
            keys = connection.execute("SELECT count(*) FROM logp").fetchone()[0]
        sums, deciding = 3 + 1, 2
        assert keys == sums + deciding, "the rejected answer is the same in all; one has no token"

    def test_masked_tokens_are_not_in_the_loss(self, make_learner, three):
        """The NLL anchor is a mean over the tokens that count."""
        for example in three:
            learner = make_learner(
                loss=LossSettings(nll=2.0), epochs=1, batch_size=1, kl=KLSettings(weight=0.0)
            )
            (row,) = learner.encode([example])
            ((chosen, _),) = learner.score("base", [row])
            counted = sum(row.masks[0] or (True,) * len(row.completions[0]))
            report = learner.fit([row], new=1)
            expected = math.log(2) - 2.0 * chosen / counted
            assert report.first_loss == pytest.approx(expected, abs=1e-4)

    def test_training_does_not_depend_on_masked_tokens_after_those_that_count(
        self, make_learner, three
    ):
        seen = []
        for ending in (" it is", " it was"):
            learner = make_learner(epochs=3, loss=LossSettings(nll=1.0), batch_size=1)
            example = with_completions(three[1], *self.ends_with(learner, three[1], ending))
            learner.fit(
                learner.encode([example]), new=1, observe=lambda step: seen.append(step.loss)
            )
            assert learner.retokenized == {}
        assert seen[:3] == seen[3:]

    @staticmethod
    def ends_with(learner, example, ending):
        """The chosen answer with another ending, which is masked."""
        call = learner.base.tokenizer
        tokens = [call(text, add_special_tokens=False)["input_ids"] for text in ("yes, 3", ending)]
        mask = (True,) * len(tokens[0]) + (False,) * len(tokens[1])
        message = {"role": "assistant", "content": f"yes, 3{ending}"}
        return [{"message": message, "token_ids": (*tokens[0], *tokens[1]), "loss_mask": mask}]


def test_wpo_does_not_weigh_answers_that_the_live_revision_wrote(make_learner, pairs, tmp_path):
    """The revision's id, the name of its folder, is compared with each answer's author."""
    live = tmp_path / "rev-000001-0123456789ab"
    first = make_learner(epochs=1)
    first.fit(first.encode(pairs), new=12)
    first.save(live)

    def losses(writer, wpo):
        learner, seen = make_learner(live=live, epochs=1, loss=LossSettings(wpo=wpo)), []
        mine = [with_completions(pair, {"author": writer}, {"author": writer}) for pair in pairs]
        learner.fit(learner.encode(mine), new=12, observe=lambda step: seen.append(step.loss))
        return seen

    assert losses(live.name, wpo=True) == losses(live.name, wpo=False)
    assert losses("base", wpo=True)[0] < losses("base", wpo=False)[0]


def test_a_restarted_candidate_trains_as_that_of_a_new_learner(make_learner, pairs, tmp_path):
    def trained(name, live=None, *restarts):
        learner = make_learner(live=live, epochs=1)
        rows = learner.encode(pairs)
        for start in restarts:
            learner.fit(rows, new=12)
            learner.restart(start)
        learner.fit(rows, new=12)
        learner.save(tmp_path / name)
        return digest(tmp_path / name)

    first = trained("first")
    assert trained("first again", None, "live") == first == trained("first anew", None, "base")
    live = tmp_path / "first"
    second = trained("second", live)
    assert second != first
    assert trained("second again", live, "base", "live") == second


def test_a_refit_starts_from_the_base_and_is_compared_with_live(make_learner, pairs, tmp_path):
    first = make_learner(epochs=2)
    rows = first.encode(pairs)
    first.fit(rows, new=12)
    first.save(tmp_path)
    learner = make_learner(live=tmp_path, epochs=2)
    live = learner.score("live", rows)
    learner.fit(rows, new=12)
    learner.restart("base")
    assert learner.score("candidate", rows) == learner.score("base", rows)
    assert learner.score("live", rows) == live != learner.score("base", rows)
    learner.fit(rows, new=12)
    assert learner.score("candidate", rows) != learner.score("base", rows)


def test_scores_of_a_candidate_that_is_gone_are_not_used(make_learner, pairs, tmp_path):
    learner = make_learner(epochs=2)
    rows = learner.encode(pairs)
    with closing(connect(Home.create(tmp_path / "home"))) as connection:
        learner._caches = {"candidate": LogpCache(connection, learner.base.numbers, "candidate")}
        learner.fit(rows, new=12)
        trained = learner.score("candidate", rows)
        learner.restart("base")
        assert learner.score("candidate", rows) == learner.score("base", rows) != trained
