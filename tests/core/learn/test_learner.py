"""A learner on a real model: what it starts from, what it changes, and that it repeats itself."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from agentpref.config import KLSettings, LossSettings
from agentpref.errors import TrainingDiverged
from agentpref.home import Home
from agentpref.learn.cache import LogpCache
from agentpref.models.base import load_base
from agentpref.record.database import connect
from agentpref.types import Thumb


def digest(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_fresh_candidate_is_the_base(make_learner, pairs):
    learner = make_learner()
    assert learner.margins("candidate", learner.encode(pairs)) == [0.0] * len(pairs)


def test_the_first_loss_of_a_fresh_candidate_is_log_2(make_learner, pairs):
    learner = make_learner(loss=LossSettings(nll=0.0), batch_size=12, epochs=1)
    report = learner.fit(learner.encode(pairs), new=12)
    assert report.first_loss == pytest.approx(math.log(2), abs=1e-5)


def test_a_file_that_is_written_to_does_not_change_a_run(
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


def test_training_teaches_the_pairs(make_learner, pairs):
    learner = make_learner(epochs=8)
    rows = learner.encode(pairs)
    report = learner.fit(rows, new=12)
    assert all(h > 0 for h in learner.margins("candidate", rows))
    assert report.last_loss < report.first_loss
    assert report.steps == 8 * 3


def test_training_leaves_base_and_live_alone(make_learner, pairs, tmp_path):
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


def test_saved_adapter_is_what_plain_peft_loads(make_learner, pairs, tmp_path, random_base):
    from peft import PeftModel

    learner = make_learner(epochs=2)
    rows = learner.encode(pairs)
    learner.fit(rows, new=12)
    learner.save(tmp_path)
    model = PeftModel.from_pretrained(load_base(str(random_base)).model, tmp_path).eval()
    ids = torch.tensor([rows[0].prompt + rows[0].chosen])
    with torch.no_grad(), learner.speaking_as("candidate") as candidate:
        torch.testing.assert_close(model(ids).logits, candidate(ids).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"]


def test_same_inputs_and_seed_give_the_same_bytes(make_learner, pairs, tmp_path):
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


def test_the_kl_penalty_holds_the_candidate_near_live(make_learner, pairs):
    moved = {}
    for kl in (KLSettings(weight=0.0), KLSettings(weight=100.0, target=0.001)):
        learner = make_learner(epochs=4, kl=kl)
        rows = learner.encode(pairs)
        learner.fit(rows, new=12)
        moved[kl.weight] = sum(map(abs, learner.margins("candidate", rows)))
    assert moved[100.0] < 0.7 * moved[0.0]


def test_the_anchor_keeps_chosen_answers_likely(make_learner, pairs):
    likely = {}
    for nll in (0.0, 2.0):
        learner = make_learner(epochs=4, loss=LossSettings(nll=nll), kl=KLSettings(weight=0))
        rows = learner.encode(pairs)
        learner.fit(rows, new=12)
        likely[nll] = sum(s.chosen for s in learner.score("candidate", rows))
    assert likely[2.0] > likely[0.0]


def test_a_loss_that_is_not_finite_ends_training(make_learner, pairs):
    learner = make_learner(epochs=1)
    rows = learner.encode(pairs)
    with learner.speaking_as("candidate") as model, torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="nan"):
        learner.fit(rows, new=12)


def test_what_is_drawn_is_encoded_once_and_nothing_else(make_learner, pairs, monkeypatch):
    learner, seen = make_learner(), []
    real = learner.encode

    def counted(asked):
        seen.extend(pair.pair_id for pair in asked)
        return real(asked)

    monkeypatch.setattr(learner, "encode", counted)
    rows = learner.draw({"a": pairs[:10], "b": pairs[10:]}, 4)
    assert len(rows) == len({row.pair.pair_id for row in rows}) == 4
    assert len(seen) == len(set(seen)) <= 4 + 2 * 2
    assert {row.pair.pair_id for row in rows} <= set(seen)


def test_what_cannot_be_encoded_is_not_drawn_and_counted_once(make_learner, pairs):
    learner = make_learner(max_length=16)
    assert learner.draw({"a": pairs}, len(pairs)) == []
    assert learner.left_out == {"too_long": len(pairs)}


def test_divergences_bring_the_candidates_scores_with_them(make_learner, pairs, tmp_path):
    """They are kept, and are what scoring gives; nothing else is known by them."""
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


def test_the_speed_of_scoring_is_of_what_was_scored_or_is_tried(make_learner, pairs):
    learner = make_learner()
    rows = learner.encode(pairs)
    assert learner.scoring_speed(rows) > 0
    scored = learner._scored_tokens
    assert scored == sum(row.width for row in rows)
    learner.scoring_speed(rows)
    assert learner._scored_tokens == scored, "it is tried once"


def lone(pair, number, liked):
    """A thumb on one of the answers of a pair."""
    said = pair.chosen if liked else pair.rejected
    thumb = Thumb(f"r{number}", pair.namespace, pair.created_at, pair.prompt, said, liked)
    return replace(thumb, thumb_id=f"t{number}")


def test_pairs_and_thumbs_are_trained_in_the_same_batches(make_learner, pairs):
    learner = make_learner(epochs=8, loss=LossSettings(beta=0.5))
    thumbs = learner.encode_thumbs([lone(p, n, n % 2 == 0) for n, p in enumerate(pairs[6:])])
    rows = [*learner.encode(pairs[:6]), *thumbs]
    report = learner.fit(rows, new=12)
    assert report.steps == 8 * 3
    assert all(h > 0 for h in learner.margins("candidate", rows[:6]))
    ratios = [ratio.chosen for ratio in learner.ratios("candidate", thumbs)]
    likes, dislikes = ratios[::2], ratios[1::2]
    assert min(likes) > max(dislikes)


def test_thumbs_that_cannot_be_encoded_are_counted(make_learner, pairs):
    learner = make_learner()
    assert learner.encode_thumbs([lone(pairs[0], 0, True)]) == []
    assert learner.left_out == {"no_mismatch": 1}


def test_wpo_leaves_answers_of_the_revision_that_serves_as_they_are(make_learner, pairs, tmp_path):
    """The live revision is known to the loss by its id, which is the name of its folder."""
    live = tmp_path / "rev-000001-0123456789ab"
    first = make_learner(epochs=1)
    first.fit(first.encode(pairs), new=12)
    first.save(live)

    def losses(writer, wpo):
        learner, seen = make_learner(live=live, epochs=1, loss=LossSettings(wpo=wpo)), []
        mine = [replace(pair, chosen_by=writer, rejected_by=writer) for pair in pairs]
        learner.fit(learner.encode(mine), new=12, observe=lambda step: seen.append(step.loss))
        return seen

    assert losses(live.name, wpo=True) == losses(live.name, wpo=False)
    assert losses("base", wpo=True)[0] < losses("base", wpo=False)[0]
