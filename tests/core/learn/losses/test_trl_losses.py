"""Every kind of loss has the value that TRL's trainers give to the same log-probs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agentpref.config import LossSettings, ThumbSettings, UpdateConfig
from agentpref.learn.kernels.head import log_collision
from agentpref.learn.objective import Losses, TrainingRow
from agentpref.models.base import load_base

# TRL 1.16 asks transformers 5 by the old name; not ours to change.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)

BETA = 0.3
COMMON = {
    "beta": BETA,
    "use_cpu": True,
    "report_to": [],
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_dropout": True,
}


def shaken(model):
    """The model with other weights: policy and reference have moved apart."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    return model


@pytest.fixture
def rows(make_learner, pairs):
    return make_learner().encode(pairs[:6])


@pytest.fixture(scope="module")
def dpo(random_base, tmp_path_factory):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    folder, base = tmp_path_factory.mktemp("dpo"), load_base(str(random_base))
    return DPOTrainer(
        model=shaken(base.model),
        ref_model=load_base(str(random_base)).model,
        args=DPOConfig(output_dir=str(folder), use_weighting=True, **COMMON),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4),
        processing_class=base.tokenizer,
    )


@pytest.fixture(scope="module")
def their_kto(random_base, tmp_path_factory):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    folder, base = tmp_path_factory.mktemp("kto"), load_base(str(random_base))
    thumbs = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)] * 2
    return KTOTrainer(
        model=base.model,
        ref_model=shaken(load_base(str(random_base)).model),  # so that z0 is above 0
        args=KTOConfig(
            output_dir=str(folder), desirable_weight=1.5, undesirable_weight=0.7, **COMMON
        ),
        train_dataset=Dataset.from_list(thumbs),
        processing_class=base.tokenizer,
    )


def batch_of(trainer, rows):
    """The rows as DPOTrainer takes them."""
    return trainer.data_collator(
        [
            {
                "prompt_ids": list(row.prompt),
                "chosen_ids": list(row.completions[0]),
                "rejected_ids": list(row.completions[1]),
            }
            for row in rows
        ]
    )


def sums(model, batch):
    """Log-probs, collisions and lengths of the completions, from whole logits: ``[rows, 2]``."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["completion_mask"][:, 1:]
    found = (picked * mask, log_collision(logits[:, :-1]) * mask, mask)
    return [values.sum(-1).view(2, -1).T for values in found]  # TRL's batch: all chosen ones first


@pytest.mark.guarantee("learning")
@pytest.mark.parametrize("wpo", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "robust", "ipo", "hinge", "apo_zero"])
def test_the_loss_of_pairs_is_that_of_trl(dpo, rows, kind, wpo):
    batch = batch_of(dpo, rows)
    dpo.loss_types, dpo.loss_weights, dpo.use_weighting = [kind], [1.0], wpo
    dpo.label_smoothing = 0.1  # TRL's sigmoid has lost its noise term: ours is asked for none
    expected = float(dpo.compute_loss(dpo.model, batch).detach())

    noise = {"robust": 0.1, "sigmoid": 0.0}.get(kind)
    settings = LossSettings(kind=kind, beta=BETA, noise=noise, wpo=wpo, nll=0.0)
    logps, collision, lengths = sums(dpo.model, batch)
    ours = training_rows(rows, sums(dpo.ref_model, batch)[0])
    losses = Losses(UpdateConfig(loss=settings), [row.example for row in rows], None)
    found = losses(ours, logps, lengths, collision)
    assert found.loss.mean().item() == pytest.approx(expected, rel=1e-4)


def training_rows(rows, reference):
    return [TrainingRow(row, tuple(own)) for row, own in zip(rows, reference.tolist(), strict=True)]


def thumbs_of(rows):
    """Each row's chosen answer as a thumb, up and down in turn, and the next row's beside it."""
    thumbs = []
    for i, row in enumerate(rows):
        own = replace(row.example.completions[0], label=float(i % 3 == 0))
        example = replace(row.example, completions=(own,), origin="thumb")
        mismatched = rows[(i + 1) % len(rows)].completions[0]
        completions = (row.completions[0], mismatched)
        thumbs.append(replace(row, example=example, completions=completions))
    return thumbs


def test_the_loss_of_thumbs_is_that_of_trl(dpo, their_kto, rows):
    """On a second pass, since TRL takes its reference point from the batch itself."""
    thumbs = thumbs_of(rows)
    theirs = their_kto.data_collator(
        [
            {
                "prompt_ids": list(row.prompt),
                "completion_ids": list(row.completions[0]),
                "KL_completion_ids": list(row.completions[1]),
                "label": row.example.completions[0].label == 1.0,
            }
            for row in thumbs
        ]
    )
    expected = float(their_kto.compute_loss(their_kto.model, theirs).detach())

    batch = batch_of(dpo, thumbs)
    logps, _, lengths = sums(their_kto.model, batch)
    ours = training_rows(thumbs, sums(their_kto.ref_model, batch)[0])
    config = UpdateConfig(
        loss=LossSettings(beta=BETA), thumbs=ThumbSettings(desirable=1.5, undesirable=0.7)
    )
    losses = Losses(config, [row.example for row in thumbs], None)
    at_zero = losses(ours, logps, lengths).loss.mean().item()
    losses.end_batch(losses.seen())
    found = losses(ours, logps, lengths).loss.mean().item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert at_zero != pytest.approx(expected, rel=1e-3), "the reference point is above 0"
