"""How far bfloat16 is from float32: log-probs of each layout, and the accuracy of trained adapters.

Run as ``python -m benchmarks.rounding --model FOLDER`` with a folder of real weights; without it
the bundled model is measured, whose weights are rounded to bfloat16 first. Rows have one-word
answers, answers of 90 tokens that the model samples itself, both, and prompts of ten statements.
The adapter is random and not small. Each arm scores all rows, and its errors to float32 with the
same weights are root mean squares: per token, and of the sum over an answer, in nats. The arms:

- ``bfloat16``: the model's own modules, nothing in float32 (what agentpref did before);
- ``autocast``: the model's own modules, weights in float32, under torch's autocast;
- ``plain`` and ``shared``: what agentpref does, by layout of the rows.

``--seeds 0,1`` also trains an adapter per seed in bfloat16 and in float32, on the same pairs, and
compares their mean accuracies on held-out pairs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.config import UpdateConfig
from agentpref.models.base import BUNDLED
from benchmarks._report import Target, at_most, print_report
from benchmarks.streams.catalogue import Sizes, trait_night

if TYPE_CHECKING:
    from torch import Tensor

    from agentpref.learn.learner import Learner
    from agentpref.learn.logps import Route
    from agentpref.models.tokenizer import Ids, Mask

ANSWER, LONG_PROMPT = 90, 10
"""Tokens of a sampled answer, and statements of a long prompt."""

_TRAIT = "risk-averse"
_SPREAD = 0.02
"""Standard deviation of the random adapter's B."""


class Row(NamedTuple):
    """A prompt and its completions, as :class:`~agentpref.learn.batch.Sequences` has them."""

    prompt: Ids
    completions: tuple[Ids, ...]
    masks: tuple[Mask | None, ...] = (None, None)

    @property
    def width(self) -> int:
        """Tokens of prompt and completions."""
        return len(self.prompt) + sum(map(len, self.completions))


class Scores(NamedTuple):
    """Log-probs of tokens and of whole answers, one after another."""

    tokens: Tensor
    sums: Tensor

    def error(self, true: Scores) -> dict[str, float]:
        """Root mean squares of the differences to the true ones, in nats."""
        pairs = zip(("token", "answer"), self, true, strict=True)
        return {name: float((own - one).square().mean().sqrt()) for name, own, one in pairs}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and end with the report."""
    options = _options(argv)
    errors = {kind: dict(arms) for kind, arms in measure(options.model, options.rows)}
    targets: list[Target] = []
    for kind, arms in errors.items():
        for layout in ("plain", "shared"):
            ratio = arms[layout]["token"] / arms["autocast"]["token"]
            targets.append(at_most(f"{kind}, {layout}: error per token / autocast's", ratio, 1.0))
    accuracies = {}
    for seed in options.seeds:
        found = {p: accuracy(options.model, p, seed, options) for p in ("bfloat16", "float32")}
        say(f"accuracy, seed {seed}: {found}")
        accuracies[str(seed)] = found
    if accuracies:
        apart = fmean(own["bfloat16"] - own["float32"] for own in accuracies.values())
        targets.append(at_most("mean accuracy, bfloat16 to float32", abs(apart), 0.01))
    print_report("rounding", {"errors": errors, "accuracies": accuracies}, targets)


def measure(model: str, rows: int) -> Iterator[tuple[str, list[tuple[str, dict[str, float]]]]]:
    """For each kind of rows, the errors of all arms."""
    from agentpref.learn import batch as layouts
    from agentpref.learn import logps
    from agentpref.learn.kernels.fuse import unfused
    from agentpref.learn.precision import exact

    narrow, wide = _adapted(model, "bfloat16"), _adapted(model, "float32")
    kinds = _rows(narrow, rows)
    found: dict[str, list[tuple[str, dict[str, float]]]] = {kind: [] for kind in kinds}
    with unfused(narrow._model), exact(narrow._model):
        true = {kind: _scores(narrow, own, logps.ORACLE) for kind, own in kinds.items()}

    def add(arm: str, score: Callable[[list[Row]], Scores]) -> None:
        for kind, own in kinds.items():
            found[kind].append((arm, error := score(own).error(true[kind])))
            say(f"{kind:12} {arm:9} {error['token']:.4f} a token, {error['answer']:.3f} an answer")

    with unfused(narrow._model), unfused(wide._model):
        add("bfloat16", lambda own: _scores(narrow, own, logps.UNMIXED))
        add("autocast", lambda own: _scores(wide, own, logps.ORACLE, autocast=True))
    choice = logps.choose_route(
        narrow._model, [*chain(*kinds.values())], pad=narrow.pad, longest=narrow.max_length
    )
    say(f"{choice.route.name}: {choice.reason}, {choice.errors}")
    plain = logps.Route("", layouts.plain, choice.route.head)
    for name, route in (("plain", plain), ("shared", choice.route)):
        add(name, lambda own, route=route: _scores(narrow, own, route))  # type: ignore[misc]
    yield from found.items()


def accuracy(model: str, precision: Any, seed: int, options: argparse.Namespace) -> float:
    """The held-out accuracy of an adapter that was trained in a precision."""
    from agentpref.learn.learner import Learner
    from agentpref.models.base import load_base
    from agentpref.prove import metrics
    from agentpref.prove.evaluate import policy_scores

    config = UpdateConfig(seed=seed, precision=precision)
    learner = Learner(load_base(model, precision=precision), None, config)
    sizes = Sizes(options.pairs, options.held_out, measured=0)
    pairs = trait_night(_TRAIT, "", sizes, config.seed).pairs()
    trained = learner.encode([pair for pair in pairs if not pair.held_out])
    held_out = learner.encode([pair for pair in pairs if pair.held_out])
    report = learner.fit(trained, new=len(trained))
    say(f"{precision}: {report}")
    return metrics.accuracy(policy_scores(learner, "candidate", held_out))


def say(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


def _adapted(model: str, precision: Any) -> Learner:
    """A model with a random adapter, and base weights that bfloat16 has."""
    import torch

    from agentpref.learn.learner import Learner
    from agentpref.models.base import load_base

    learner = Learner(load_base(model, precision=precision), None, UpdateConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in learner._model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=_SPREAD, generator=generator)
            elif "lora_" not in name:
                weight.copy_(weight.bfloat16())
    return learner


def _rows(learner: Learner, count: int) -> dict[str, list[Row]]:
    """Rows of each kind."""
    config = UpdateConfig()
    examples = trait_night(_TRAIT, "", Sizes(count, 0, 0), config.seed).pairs()
    encoded = learner.encode(examples)
    words = [Row(row.prompt, row.completions) for row in encoded]
    prompts = [row.prompt for row in encoded]
    fewer = max(2, count // 2)
    long = [tuple(chain(*prompts[i : i + LONG_PROMPT])) for i in range(max(2, count // 8))]
    sampled = [Row(prompt, _sample(learner, prompt)) for prompt in prompts[:fewer]]
    return {
        "one word": words,
        "90 tokens": sampled,
        "both": words[:fewer] + sampled[: fewer // 2],
        "long prompts": [Row(prompt, _sample(learner, prompt)) for prompt in long],
    }


def _sample(learner: Learner, prompt: Ids) -> tuple[Ids, ...]:
    """Two answers that the model samples."""
    import torch

    model: Any = learner.base.model
    torch.manual_seed(0)
    with torch.no_grad(), learner.policy("candidate"):
        ids = model.generate(
            input_ids=torch.tensor([prompt, prompt]),
            attention_mask=torch.ones(2, len(prompt), dtype=torch.long),
            do_sample=True,
            min_new_tokens=ANSWER,
            max_new_tokens=ANSWER,
            pad_token_id=learner.pad,
        )
    return tuple(tuple(own[len(prompt) :]) for own in ids.tolist())


def _scores(
    learner: Learner, rows: Sequence[Row], route: Route, *, autocast: bool = False
) -> Scores:
    """Score rows one at a time by a route, with the candidate active."""
    import torch

    tokens, sums = [], []
    with torch.no_grad(), learner.policy("candidate") as model:
        for row in rows:
            batch = route.layout([row], learner.pad)
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                states = route.states(model, batch)
            logps = route.read(states, batch).logps
            tokens.append(logps.double())
            sums.append(batch.sums(logps).flatten())
    return Scores(torch.cat(tokens), torch.cat(sums))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=BUNDLED, help="the bundled model unless given")
    parser.add_argument("--rows", type=int, default=32, help="rows of one-word answers")
    parser.add_argument("--seeds", type=_numbers, default=(), help="train with these, such as 0,1")
    parser.add_argument("--pairs", type=int, default=200, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=150, help="pairs to evaluate on")
    return parser.parse_args(argv)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
