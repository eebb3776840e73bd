"""Remarks in training: live, told what somebody said of an answer, teaches the candidate."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
import torch

from agentpref.config import CommentSettings, KLSettings, LossSettings
from agentpref.learn import adapter, logps
from agentpref.learn.encode import EncodedExample
from agentpref.learn.memory import Room
from agentpref.learn.objective import ForwardPlan, Leash, Losses, Objective, TrainingRow
from agentpref.learn.schedule import plan_batches
from agentpref.models.instructions import instructed
from agentpref.models.tokenizer import encode_prompt
from tests.core.learn.examples import make_pair
from tests.core.learn.test_objective_trl import lora_gradients, randomise
from tests.core.learn.test_ordinary_rows import make_ordinary

ADVICE = "A reader said: 'too long'."
REMARKS = [
    make_ordinary(n, "a longer answer, of many words", origin="remark", advice=ADVICE)
    for n in range(3)
]


def objective_of(learner, rows, **settings):
    config = replace(learner.config, kl=KLSettings(weight=0.0), **settings)
    judged = [row.encoded.example for row in rows if not row.encoded.example.ordinary]
    plan = ForwardPlan(
        logps.Choice(learner.route([row.encoded for row in rows]), "a test's"),
        learner.pad,
        Room(2**12, recomputes=False),
        "float32",
    )
    losses = Losses(config, judged, None)
    return Objective(learner._model, plan, losses, config, Leash("live", 0.05))


def test_live_is_told_the_remark_after_its_own_instructions(make_learner):
    learner = make_learner()
    template, remark = learner.base.template, REMARKS[0]
    messages = instructed(remark.prompt.messages, ADVICE)
    asked = encode_prompt(replace(remark.prompt, messages=messages), template)
    [row] = learner.encode([remark])
    assert row.advised == asked != row.prompt
    learner.instruct("Be kind.")
    both = instructed(instructed(remark.prompt.messages, "Be kind."), ADVICE)
    [row] = learner.encode([remark])
    assert row.advised == encode_prompt(replace(remark.prompt, messages=both), template)
    assert EncodedExample.thaw(row.freeze()).advised == row.advised
    assert ADVICE.encode() not in orjson.dumps(row.freeze()), "no words in the state of a training"


def test_a_remark_that_leaves_no_room_for_its_advice_is_left_out(make_learner):
    learner = make_learner(max_length=200)
    long = replace(REMARKS[0], example_id="long", advice="word " * 200)
    assert [row.example.example_id for row in learner.encode([long, REMARKS[1]])] == ["ordinary1"]
    assert learner.objections["long"].reason == "too_long"


def test_every_batch_gets_an_eighth_on_top(make_learner, pairs):
    rows = [TrainingRow(row, (0.0,)) for row in make_learner().encode([*pairs, *REMARKS])]
    batches = plan_batches(rows, size=16, epochs=3, seed=0)
    assert [sum(row.encoded.advised is not None for row in batch) for batch in batches] == [2] * 3


def test_the_lesson_and_its_gradient_are_those_of_trls_self_distillation(make_learner, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdft import loss_utils

    learner = make_learner()
    randomise(learner._model)
    rows = [TrainingRow(row, ()) for row in learner.encode(REMARKS)]
    found = objective_of(learner, rows, comments=CommentSettings(weight=0.5))(rows)
    ours = {name: grad.clone() for name, grad in lora_gradients(learner._model).items()}
    learner._model.zero_grad()

    def logits(model, prompt, completion):
        ids = torch.tensor([[*prompt, *completion]])
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]

    lessons = []
    for row in (row.encoded for row in rows):
        (completion,) = row.completions
        student = logits(learner._model, row.prompt, completion)
        with torch.no_grad(), adapter.policy(learner._model, "live") as live:
            teacher = logits(live, row.advised, completion)
        per_token = loss_utils.compute_full_logit_self_distillation_loss(
            student, teacher, distillation_alpha=0.0
        )
        lessons.append(per_token.mean())
    theirs = torch.stack(lessons).mean()
    assert found.lesson == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert found.loss == 0.0
    (0.5 * theirs).backward()
    for name, grad in lora_gradients(learner._model).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5)


def test_pairs_beside_remarks_have_the_loss_and_gradients_that_they_add_up_to(make_learner, pairs):
    learner = make_learner()
    randomise(learner._model)
    judged = learner.encode(pairs[:4])
    references = learner.score("base", judged)
    some = [TrainingRow(*both) for both in zip(judged, references, strict=True)]
    remarks = [TrainingRow(row, ()) for row in learner.encode(REMARKS)]
    found = []
    for rows in (some, remarks, [*some, *remarks]):
        learner._model.zero_grad()
        settings = {"comments": CommentSettings(weight=0.5), "loss": LossSettings(nll=0.0)}
        result = objective_of(learner, [*some, *remarks], **settings)(rows)
        found.append((result, {n: g.clone() for n, g in lora_gradients(learner._model).items()}))
    (pairs_alone, one), (alone, other), (both, whole) = found
    assert (both.loss, both.lesson) == (
        pytest.approx(pairs_alone.loss), pytest.approx(alone.lesson)
    )  # fmt: skip
    assert pairs_alone.lesson is None
    for name, grad in whole.items():
        torch.testing.assert_close(grad, one[name] + other[name], rtol=1e-4, atol=1e-6)


def test_a_candidate_comes_nearer_to_what_live_says_when_it_is_told(make_learner, pairs):
    learner = make_learner(
        comments=CommentSettings(weight=3.0), loss=LossSettings(nll=0.0), learning_rate=1e-2
    )
    rows = learner.encode([*pairs[:4], *REMARKS])
    report = learner.fit(rows, new=4, epochs=30)
    assert report.last_lesson < report.first_lesson / 2


def test_without_remarks_the_report_has_no_lesson(make_learner, pairs):
    report = make_learner().fit(make_learner().encode(pairs[:4]), new=4, epochs=1)
    assert (report.first_lesson, report.last_lesson) == (None, None)


def test_a_pair_is_no_remark(make_learner):
    [row] = make_learner().encode([make_pair(1, "yes", "no")])
    assert row.advised is None
