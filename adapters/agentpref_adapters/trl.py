"""TRL: a new adapter by online reinforcement learning, from answers that it samples and you judge.

:func:`train_online` lets TRL's GRPO or RLOO trainer write several answers to each prompt, asks a
reward for a number per answer, and moves the adapter towards what was better within its group. The
folder that it writes is one that :func:`agentpref.adopt` takes to the gate; nothing serves before.

What is set here because TRL's own defaults are others, or are traps:

- GRPO's KL penalty is off (β 0) unless asked for; here it is on.
- Its reference is a copy of the adapter that training starts from: live, not the base. The distance
  from the base is the gate's to limit.
- Answers end with every token that ends them when they are served, and are decoded as then. The
  base's own penalties and minimum lengths apply to neither.
- TRL saves the reference beside the adapter (``ref/``); here the adapter is saved alone.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentpref.config import LoraSettings, Precision
from agentpref.errors import ConfigError, InvalidAdapter, MissingDependency, TrainingDiverged
from agentpref.learn import adapter
from agentpref.learn.process import LOADING
from agentpref.learn.schedule import learning_rate_for
from agentpref.learn.team import shares
from agentpref.models.base import BaseModel, load_base
from agentpref.models.decoding import Decoding
from agentpref.models.threads import sharing
from agentpref.models.tokenizer import encode_prompt
from agentpref.serve.folders import exporting
from agentpref.serve.validate import check_adapter
from agentpref.types import Message, Progress, Prompt

try:
    import datasets
    import numpy as np
    import torch
    import transformers
    import trl
except ImportError as error:
    raise MissingDependency(
        f"agentpref_adapters.trl needs {error.name}, which is not installed: "
        "run pip install 'agentpref[rl]' with Python 3.11 or newer"
    ) from error

__all__ = ["Reward", "Step", "Trained", "train_online"]

Reward = Callable[[Sequence[Message], Sequence[str]], Sequence[float]]
"""Judges the answers to one prompt: ``(messages, answers)`` gives a finite number for each."""

Method = Literal["grpo", "rloo"]

TRAINING = "train online"
"""The stage of the work after the model was loaded."""

_TINY = 1e-9  # the least of what must be above 0
_TRL: Any = trl
_TRANSFORMERS: Any = transformers
_TRAINERS = {
    "grpo": (_TRL.GRPOConfig, _TRL.GRPOTrainer),
    "rloo": (_TRL.RLOOConfig, _TRL.RLOOTrainer),
}


@dataclass(frozen=True, slots=True)
class Step:
    """What one step saw: means over its answers.

    ``reward`` is the mean of the rewards, and ``spread`` their standard deviation. ``kl`` is the
    distance from the start in nats per token (of RLOO, per answer); ``None`` if β is 0. ``tokens``
    is the length, and ``cut`` the share of answers that did not end within ``max_tokens``.
    """

    number: int
    reward: float
    spread: float
    kl: float | None
    tokens: float
    cut: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained adapter: its folder, what each step saw, and how many prompts were too long."""

    folder: Path
    steps: tuple[Step, ...]
    too_long: int = 0


def train_online(
    folder_out: str | Path,
    *,
    model: str,
    prompts: Sequence[Sequence[Message]],
    reward: Reward,
    start: str | Path | None = None,
    method: Method = "grpo",
    steps: int = 100,
    prompts_per_step: int = 8,
    answers: int = 8,
    beta: float = 0.04,
    learning_rate: float | None = None,
    max_tokens: int = 256,
    temperature: float = 1.0,
    lora: LoraSettings | None = None,
    precision: Precision | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    observe: Callable[[Step], object] | None = None,
) -> Trained:
    """Train an adapter on rewards for answers that it samples.

    Args:
        folder_out: a folder that is missing or empty, outside of a home. It gets its name once all
            of it is on disk: an error or Ctrl-C leaves nothing.
        model: the base model, as for :func:`agentpref.update`.
        prompts: lists of messages to answer; those without room for an answer are left out.
        reward: judges the answers to one prompt. All alike, they teach nothing.
        start: the folder of the adapter to start from, such as the live revision's; it is only
            read. ``None`` starts from the base.
        method: GRPO (2402.03300) or RLOO (2402.14740).
        steps: how often the weights change.
        prompts_per_step: different prompts in each step.
        answers: answers to each of them, which are compared with one another; 2 or more.
        beta: weight of the KL penalty to the start; 0 turns it off, and its measurement.
        learning_rate: at its peak; ``None`` takes that of an update.
        max_tokens: length of an answer at most.
        temperature: that answers are sampled at.
        lora: the shape of a fresh adapter; not with ``start``, which has one.
        precision: the number format of the base; as its settings in an update.
        chat_template_kwargs: what its chat template is always given.
        seed: the same seed gives the same adapter on the same CPU, if the reward does.
        progress: called with ``(stage, done, total)``.
        observe: called with each step's figures.

    Returns:
        The folder, and the figures of all steps.

    Raises:
        ConfigError: an argument is out of range, the folder is not free, no prompt has room for an
            answer, TRL would write a prompt otherwise than it is served, or a reward is no number.
        InvalidAdapter: the adapter to start from is broken, or does not fit the base.
        TrainingDiverged: weights are no longer finite.
        ModelNotFound: the model resolves to nothing.
    """
    _require_least(steps=(steps, 1), prompts_per_step=(prompts_per_step, 1), answers=(answers, 2))
    _require_least(max_tokens=(max_tokens, 1), beta=(beta, 0.0), temperature=(temperature, _TINY))
    _require_least(learning_rate=(_TINY if learning_rate is None else learning_rate, _TINY))
    if method not in _TRAINERS:
        raise ConfigError(f"method is {method!r}, but must be one of {', '.join(_TRAINERS)}")
    if start is not None and lora is not None:
        raise ConfigError("lora is without effect beside start, which has a shape; leave one out")
    if shares() or torch.cuda.device_count() > 1:
        raise ConfigError(
            "it trains in one process on one GPU: start it without a launcher, with "
            "CUDA_VISIBLE_DEVICES=0"
        )
    report: Progress = progress or (lambda stage, done, total: None)
    with exporting(folder_out) as draft, tempfile.TemporaryDirectory() as scratch, sharing():
        report(LOADING, 0, 1)
        base = load_base(model, precision=precision, chat_template_kwargs=chat_template_kwargs)
        layers = adapter.layer_shapes(base)
        given = None if start is None else check_adapter(Path(start), layers=layers)
        report(LOADING, 1, 1)
        decoding = Decoding.of(base)
        fitting = _fitting(prompts, base, decoding, max_tokens)
        policy = adapter.wrapped(base, given, lora or LoraSettings(), seed=seed)
        base.model.generation_config = _TRANSFORMERS.GenerationConfig(
            eos_token_id=sorted(decoding.end_tokens), pad_token_id=decoding.pad
        )
        settings, trainer_of = _TRAINERS[method]
        gpu = torch.cuda.is_available()
        size = min(prompts_per_step, len(fitting))
        watcher = _Watcher(steps, report, observe)
        with _randomness_of_its_own(), warnings.catch_warnings():
            # transformers and peft call each other by names of before; not ours to change.
            warnings.simplefilter("ignore", FutureWarning)
            trainer = trainer_of(
                model=policy,
                reward_funcs=_rewards(reward, fitting, answers, decoding),
                args=settings(
                    output_dir=scratch,
                    max_steps=steps,
                    per_device_train_batch_size=answers,  # one prompt at a time
                    gradient_accumulation_steps=size,
                    num_generations=answers,
                    max_completion_length=max_tokens,
                    temperature=temperature,
                    beta=beta,
                    learning_rate=learning_rate or learning_rate_for(base.model),
                    chat_template_kwargs=dict(base.chat_template_kwargs),
                    seed=seed,
                    bf16=base.precision != "float32",
                    use_cpu=not gpu,
                    gradient_checkpointing=gpu,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    dataloader_pin_memory=gpu,
                ),
                train_dataset=_dataset(fitting),
                processing_class=_tokenizer(base, decoding),
                callbacks=[watcher],
            )
            trainer.remove_callback(_TRANSFORMERS.PrinterCallback)  # it prints on standard output
            trainer.train()
        adapter.save(policy, base, draft, name="default")
        try:
            check_adapter(draft)
        except InvalidAdapter as error:
            cure = "lower learning_rate, or raise beta"
            raise TrainingDiverged(f"the trained adapter is broken: {error}; {cure}") from error
    return Trained(Path(folder_out), tuple(watcher.steps), len(prompts) - len(fitting))


def _require_least(**numbers: tuple[float, float]) -> None:
    """Refuse what is smaller than it may be, or is not finite; each is a number and its least."""
    for name, (value, least) in numbers.items():
        if not least <= value < math.inf:
            raise ConfigError(f"{name} is {value!r}, but must be finite, and {least:g} or more")


def _fitting(
    prompts: Sequence[Sequence[Message]], base: BaseModel, decoding: Decoding, max_tokens: int
) -> list[list[Message]]:
    """The prompts with room for an answer, each of which TRL writes just as servers do."""
    most = math.inf if decoding.positions is None else decoding.positions - max_tokens
    tokenizer: Any = base.tokenizer
    found: list[list[Message]] = []
    for number, messages in enumerate(prompts, 1):
        ids = encode_prompt(Prompt("", tuple(messages)), base.template)
        if len(ids) > most:
            continue
        found.append([dict(message) for message in messages])
        written = tokenizer.apply_chat_template(
            [found[-1]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **base.chat_template_kwargs,
        )
        if list(written["input_ids"][0]) != list(ids):
            raise ConfigError(
                f"TRL would give prompt {number} to the model in other tokens than servers do "
                "(its tool calls or parts, say); leave it out"
            )
    if not found:
        raise ConfigError(
            f"none of {len(prompts)} prompts has room for an answer of {max_tokens} tokens; give "
            "shorter ones, or lower max_tokens"
        )
    return found


def _dataset(prompts: Sequence[Sequence[Message]]) -> Any:
    """The prompts by number: Arrow would fill up the keys that some messages do not have."""
    numbers = datasets.Dataset.from_dict({"number": list(range(len(prompts)))})

    def as_given(rows: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        chosen = rows["number"]
        return {"number": chosen, "prompt": [copy.deepcopy(prompts[n]) for n in chosen]}

    return numbers.with_transform(as_given)


def _tokenizer(base: BaseModel, decoding: Decoding) -> Any:
    """A copy of the base's tokenizer, which TRL pads to the left."""
    tokenizer: Any = copy.deepcopy(base.tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(decoding.pad)
    return tokenizer


def _rewards(
    reward: Reward, prompts: Sequence[Sequence[Message]], size: int, decoding: Decoding
) -> Callable[..., list[float]]:
    """The reward as TRL calls it: for several prompts together, each in a row for all its answers.

    Answers are what servers would send of their tokens.
    """

    def rewards(completion_ids: Sequence[Sequence[int]], number: Sequence[int], **_: Any) -> Any:
        found: list[float] = []
        for first in range(0, len(number), size):
            texts = [decoding.text(ids) for ids in completion_ids[first : first + size]]
            given = [float(one) for one in reward(prompts[number[first]], texts)]
            if len(given) != len(texts) or not all(map(math.isfinite, given)):
                raise ConfigError(
                    f"the reward gave {len(given)} numbers for {len(texts)} answers, "
                    f"{sum(map(math.isfinite, given))} of them finite; give a finite one for each"
                )
            found += given
        return found

    return rewards


class _Watcher(transformers.TrainerCallback):
    """Passes on what each step saw."""

    def __init__(
        self, planned: int, report: Progress, observe: Callable[[Step], object] | None
    ) -> None:
        self.steps: list[Step] = []
        self._planned, self._report, self._observe = planned, report, observe

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training begins."""
        self._report(TRAINING, 0, self._planned)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A step is done; the log after the last one says nothing of answers."""
        if not logs or "reward" not in logs:
            return
        step = Step(
            int(state.global_step),
            float(logs["reward"]),
            float(logs["reward_std"]),
            float(logs["kl"]) if "kl" in logs else None,
            float(logs["completions/mean_length"]),
            float(logs["completions/clipped_ratio"]),
        )
        self.steps.append(step)
        if self._observe is not None:
            self._observe(step)
        self._report(TRAINING, step.number, self._planned)


@contextmanager
def _randomness_of_its_own() -> Iterator[None]:
    """Give the host its random numbers back: TRL sets the seeds of the whole process."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
