"""Every kind of loss on the same log-probs as TRL's trainers take them: the same values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from agentpref.learn.criterion import Criterion
from agentpref.learn.loss import log_collision

from agentpref.config import LossSettings, ThumbSettings
from agentpref.learn.encode import EncodedPair
from agentpref.learn.kernels.head import log_collision
from agentpref.learn.logps import PairLogps
from agentpref.learn.objective import TrainingRow
from agentpref.models.base import load_base
from agentpref.types import Thumb

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
                "chosen_ids": list(row.chosen),
                "rejected_ids": list(row.rejected),
            }
            for row in rows
        ]
    )


def sums(model, batch):
    """Log-probs and collisions of the completions, from whole logits: ``[2·rows]`` twice."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["completion_mask"][:, 1:]
    return (picked * mask).sum(-1), (log_collision(logits[:, :-1]) * mask).sum(-1)


@pytest.mark.parametrize("wpo", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "robust", "ipo", "hinge", "apo_zero"])
def test_losses_of_pairs_equal_trl(dpo, rows, kind, wpo):
    batch = batch_of(dpo, rows)
    dpo.loss_types, dpo.loss_weights, dpo.use_weighting = [kind], [1.0], wpo
    dpo.label_smoothing = 0.1  # TRL's sigmoid has lost its noise term: ours is asked for none
    expected = float(dpo.compute_loss(dpo.model, batch).detach())

    noise = {"robust": 0.1, "sigmoid": 0.0}.get(kind)
    settings = LossSettings(kind=kind, beta=BETA, noise=noise, wpo=wpo, nll=0.0)
    logps, collision = sums(dpo.model, batch)
    reference = sums(dpo.ref_model, batch)[0].tolist()
    ours = [
        TrainingRow(row, PairLogps(*both))
        for row, *both in zip(rows, reference[:6], reference[6:], strict=True)
    ]
    criterion = Criterion(settings, ThumbSettings(), desirable=0, undesirable=0, live=None)
    found = criterion(ours, logps, collision)
    assert found.loss.mean().item() == pytest.approx(expected, rel=1e-4)


@dataclass(frozen=True)
class Judgement:
    """An encoded thumb, as far as a criterion looks at one."""

    thumb: Thumb


def thumbs_of(rows):
    """Each row's chosen answer as a thumb, up and down in turn, and the next row's beside it."""
    thumbs, encoded = [], []
    for i, row in enumerate(rows):
        pair, other = row.pair, rows[(i + 1) % len(rows)]
        thumbs.append(Thumb(f"run{i}", "test", 0.0, pair.prompt, pair.chosen, i % 3 == 0))
        encoded.append(EncodedPair(pair, row.prompt, row.chosen, other.chosen))
    return thumbs, encoded


def test_the_loss_of_thumbs_equals_trl(dpo, their_kto, rows):
    """On a second look at the batch, since TRL's reference point comes from the batch itself."""
    thumbs, encoded = thumbs_of(rows)
    theirs = their_kto.data_collator(
        [
            {
                "prompt_ids": list(row.prompt),
                "completion_ids": list(row.chosen),
                "KL_completion_ids": list(row.rejected),
                "label": thumb.desirable,
            }
            for row, thumb in zip(encoded, thumbs, strict=True)
        ]
    )
    expected = float(their_kto.compute_loss(their_kto.model, theirs).detach())

    batch = batch_of(dpo, encoded)
    logps = sums(their_kto.model, batch)[0]
    reference = sums(their_kto.ref_model, batch)[0].tolist()
    ours = [
        TrainingRow(Judgement(thumb), PairLogps(*both))
        for thumb, *both in zip(thumbs, reference[:6], reference[6:], strict=True)
    ]
    settings = ThumbSettings(desirable=1.5, undesirable=0.7)
    criterion = Criterion(LossSettings(beta=BETA), settings, desirable=2, undesirable=4, live=None)
    at_zero = criterion(ours, logps).loss.mean().item()
    criterion.end_batch()
    assert criterion(ours, logps).loss.mean().item() == pytest.approx(expected, rel=1e-4)
    assert at_zero != pytest.approx(expected, rel=1e-3)  # or the reference point went untested
