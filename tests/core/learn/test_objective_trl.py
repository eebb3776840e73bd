"""A batch has the loss and the gradients that TRL's DPOTrainer gives it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agentpref.config import KLSettings, LoraSettings, LossSettings, UpdateConfig
from agentpref.learn import adapter, logps
from agentpref.learn.memory import Room
from agentpref.learn.objective import ForwardPlan, Leash, Losses, Objective, TrainingRow
from agentpref.models.base import load_base


def randomise(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def lora_gradients(model):
    return {
        name.replace(".candidate.", ".").replace(".default.", "."): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@pytest.fixture
def ours(make_learner, pairs):
    learner = make_learner()
    randomise(learner._model)
    rows = learner.encode(pairs[:4])
    return learner, [
        TrainingRow(r, s) for r, s in zip(rows, learner.score("base", rows), strict=True)
    ]


# TRL 1.16 asks transformers 5 by the old name; not ours to change.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def theirs(random_base, tmp_path, ours):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    base = load_base(str(random_base))
    settings = LoraSettings()
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    trainer = DPOTrainer(
        model=base.model,
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=0.3,
            use_cpu=True,
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    randomise(trainer.model)
    return trainer


@pytest.mark.parametrize("plainly", [True, False])
def test_the_loss_and_gradients_of_pairs_are_those_of_trl(ours, theirs, plainly):
    learner, rows = ours
    route = logps.ORACLE if plainly else learner.route([row.encoded for row in rows])
    choice = logps.Choice(route, "it is asked for")
    rows = [row._replace(encoded=_certain(row.encoded)) for row in rows]
    config = UpdateConfig(loss=LossSettings(beta=0.3, nll=0.0), kl=KLSettings(weight=0.0))
    objective = Objective(
        learner._model,
        ForwardPlan(choice, learner.pad, Room(2048, recomputes=False), "float32"),
        Losses(config, [row.encoded.example for row in rows], None),
        config,
        Leash.of(config, "live", live=False, spent=0.0),
    )
    with adapter.policy(learner._model, "candidate"):
        found = objective(rows)

    batch = theirs.data_collator(
        [
            {
                "prompt_ids": list(row.encoded.prompt),
                "chosen_ids": list(row.encoded.completions[0]),
                "rejected_ids": list(row.encoded.completions[1]),
            }
            for row in rows
        ]
    )
    expected = theirs.compute_loss(theirs.model, batch)
    expected.backward()

    assert found.loss == pytest.approx(float(expected.detach()), abs=1e-5)
    mine, other = lora_gradients(learner._model), lora_gradients(theirs.model)
    assert mine.keys() == other.keys()
    for name in mine:
        apart = (mine[name] - other[name]).norm() / other[name].norm()
        assert apart < 1e-4, (name, apart)


def _certain(encoded):
    return replace(encoded, example=replace(encoded.example, noise=0.0))
