"""What nights of one-word preferences do to answers that nobody judged, and to the KL budget.

Run as ``python -m benchmarks.ordinary``. Night after night, the bundled model learns a trait of
yes/no statements. After each night, requests of everyday life
(``benchmarks.tiny_model.dialogues``), which were neither judged nor trained, are answered greedily.
An answer is in good form if it is one of the request's kind, in any of the five styles, with any
names and numbers in it.

    python -m benchmarks.ordinary --nights 5 --arms "naive,plain,anchored" --seeds 0,1
    python -m benchmarks.ordinary --nights 20 --arms anchored

Arms: ``naive`` has neither replay nor KL nor anchor, ``plain`` has no anchor, ``anchored`` has the
defaults. ``--set kl.target=0.02`` changes settings of all. Reported of each night: the mean
accuracy on held-out pairs of all traits so far, KL from the base, what the leash was, the share in
good form, and how much less likely the base's own ordinary answers are, in nats per token. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentpref.config import AnchorSettings, KLSettings, ReplaySettings, UpdateConfig
from agentpref.home import Home
from agentpref.learn.cache import LogpCache
from agentpref.learn.data import Available, prepare
from agentpref.learn.learner import Learner
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import BUNDLED, load_base
from agentpref.models.continuation import greedy
from agentpref.models.tokenizer import encode_prompt
from agentpref.prefer.examples import is_held_out
from agentpref.prove.evaluate import kl_from_base, policy_scores
from agentpref.prove.metrics import accuracy
from agentpref.record.database import connect
from agentpref.types import BASE, Completion, Example, Prompt
from benchmarks._report import print_report
from benchmarks.persona import questions
from benchmarks.tiny_model import dialogues
from benchmarks.train.runs import say

TRAITS = ("agreeableness", "conscientiousness", "interest-in-art", "openness", "risk-averse",
          "interest-in-music", "interest-in-science", "optionality-preservation",
          "has-strong-aesthetic-preferences", "subscribes-to-deontology")  # fmt: skip
LOGGED, ASKED = 150, 96
MOST_TOKENS = 96
_SLOT = "\x00"
NEW, PROVING = 200, 150


def requests(number: int, seed: int) -> list[dialogues.Request]:
    """Different requests, all kinds alike."""
    rng = random.Random(seed)
    found: dict[str, dialogues.Request] = {}
    while len(found) < number:
        request = dialogues.draw_request(rng)
        found.setdefault(request.text, request)
    return list(found.values())


def in_good_form(request: dialogues.Request, answer: str) -> bool:
    """Whether an answer is one to a request of this kind, whatever its names and numbers."""
    return any(re.fullmatch(form, answer.strip()) for form in _forms(request))


def _forms(request: dialogues.Request) -> Iterator[str]:
    """The five styles of a request's answer as patterns, with any words where its own stand."""
    own = sorted({*request.arguments.values(), "sunny", "rainy", "cloudy", "windy", "cold", "mild"},
                 key=len, reverse=True)  # fmt: skip
    hide = re.compile("|".join(rf"\b{re.escape(word)}(?!\w)" for word in own))
    for style in dialogues.STYLES:
        text = dialogues.answer(request, style)
        yield re.escape(hide.sub(_SLOT, text)).replace(_SLOT, r"[\w': ]{1,40}")


def pairs_of(trait: str, config: UpdateConfig) -> list[Example]:
    """The comparisons of a trait's night; those held out are the same for every seed."""
    pairs = []
    for number, (text, liked, disliked) in enumerate(questions(trait)):
        asked, name = ({"role": "user", "content": text},), f"{trait}/{number}"
        answers = tuple(
            Completion({"role": "assistant", "content": said}, label)
            for said, label in ((liked, 1.0), (disliked, 0.0))
        )
        pairs.append(
            Example(
                name, "ordinary", 0.0, Prompt(name, asked), answers,
                "comparison", tag=trait, held_out=is_held_out(asked, config.held_out),
            )
        )  # fmt: skip
    proving = [pair for pair in pairs if pair.held_out]
    training = [pair for pair in pairs if not pair.held_out]
    proving = random.Random(0).sample(proving, PROVING)
    return random.Random(config.seed).sample(training, NEW) + proving


def ordinary(request: dialogues.Request, answer: str, *, held_out: bool) -> Example:
    """A logged answer that nobody judged."""
    name = f"ordinary/{request.text}"
    return Example(
        name, "sweep", 0.0, Prompt(name, ({"role": "user", "content": request.text},)),
        (Completion({"role": "assistant", "content": answer}),), "ordinary", held_out=held_out,
    )  # fmt: skip


def answers(learner: Learner, policy: Any, asked: Sequence[dialogues.Request]) -> list[str]:
    """The greedy answers of a policy."""
    prompts = [
        encode_prompt(Prompt("", ({"role": "user", "content": r.text},)), learner.base.template)
        for r in asked
    ]
    with learner.policy(policy) as model:
        found = greedy(model, prompts, learner.decoding, limit=MOST_TOKENS).tokens
    return [learner.decoding.text(ids) for ids in found]


ARMS: dict[str, dict[str, Any]] = {
    "naive": {"kl": KLSettings(weight=0.0), "replay": ReplaySettings(minimum=0),
              "anchor": AnchorSettings(size=0)},
    "plain": {"anchor": AnchorSettings(size=0)},
    "anchored": {},
}  # fmt: skip


def nights(arm: str, config: UpdateConfig, number: int, connection: Any) -> list[dict[str, Any]]:
    """One stream: what is measured after each night."""
    sides = [pairs_of(trait, config) for trait in TRAITS]
    known, asked = requests(LOGGED + ASKED, 0)[:LOGGED], requests(LOGGED + ASKED, 0)[LOGGED:]
    learner, live, rows = _learner(None, config, connection), None, []
    logged = [
        ordinary(r, a, held_out=False)
        for r, a in zip(known, answers(learner, "base", known), strict=True)
    ][: config.anchor.size]
    of_base = answers(learner, "base", asked)
    probes = [ordinary(r, a, held_out=True) for r, a in zip(asked, of_base, strict=True)]
    good = sum(map(in_good_form, asked, of_base))
    say(f"base: {good} of {len(asked)} in good form")
    with tempfile.TemporaryDirectory() as folder:
        for night in range(number):
            # After all traits, the same statements in other groups: what is asked for goes on.
            new = [pair for pair in sides[night % len(TRAITS)] if not pair.held_out]
            before = {p.example_id for n in range(night) for p in sides[n % len(TRAITS)]}
            old = [p for side in sides for p in side if not p.held_out and p.example_id in before]
            new = [p for p in new if p.example_id not in before] or new
            seen = {n % len(TRAITS) for n in range(night + 1)}
            held_out = [[p for p in sides[n] if p.held_out] for n in sorted(seen)]
            learner = _learner(live, config, connection)
            if arm == "naive":
                old = []
            started = time.process_time()
            data = prepare(
                learner,
                Available(tuple(new), tuple(old), ordinary=lambda _: logged),
                None,
                config,
            )
            report = learner.fit(data.trained, new=len(data.new))
            seconds = time.process_time() - started
            by_trait = [_accuracy(learner, side) for side in held_out]
            found = answers(learner, "candidate", asked)
            lost = losses(learner, probes)
            probe = learner.encode(random.Random(0).sample([p for s in held_out for p in s], 128))
            row = {
                "night": night + 1,
                "new": by_trait[night % len(TRAITS)],
                "accuracy": statistics.fmean(by_trait),
                "kl": kl_from_base(learner, probe, seed=0),
                "spent": report.kl_spent, "target": report.kl_target, "pull": report.kl_pull,
                "kl_to_live": report.kl,
                "good_form": sum(map(in_good_form, asked, found)) / max(1, good),
                "same": sum(a == b for a, b in zip(of_base, found, strict=True)) / len(asked),
                "lost": statistics.fmean(lost), "worst": max(lost),
                "fell": statistics.fmean(max(0.0, x) for x in lost),
                "lost_.5": sum(x > 0.5 for x in lost) / len(lost),
                "nll": [report.first_nll, report.last_nll],
                "steps": report.steps, "seconds": seconds,
            }  # fmt: skip
            bad = [b for r, b in zip(asked, found, strict=True) if not in_good_form(r, b)]
            say(f"{arm}: {json.dumps({k: _short(v) for k, v in row.items()})} {bad[:2]}")
            rows.append(row)
            live = Path(folder) / str(night)
            learner.save(live)
    return rows


def losses(learner: Learner, probes: Sequence[Example]) -> list[float]:
    """How much less likely than under the base each ordinary answer is, in nats per token."""
    rows = learner.encode(probes)
    return [
        -ratio[0] / max(16, len(row.completions[0]))
        for row, ratio in zip(rows, learner.ratios("candidate", rows), strict=True)
    ]


def _learner(live: Path | None, config: UpdateConfig, connection: Any) -> Learner:
    base = load_base(BUNDLED, precision=config.precision)
    known = LogpCache(connection, base.numbers, BASE)
    files = None if live is None else read_adapter(live)
    return Learner(base, files, config, caches={"base": known})


def _accuracy(learner: Learner, pairs: Sequence[Example]) -> float:
    return accuracy(policy_scores(learner, "candidate", learner.encode(pairs)))


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Run what was asked for, and end with the JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ordinary", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--nights", type=int, default=5)
    parser.add_argument("--arms", default="plain,anchored")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], metavar="GROUP.KEY=VALUE")
    options = parser.parse_args()
    changes: dict[str, Any] = {}
    for one in options.set:
        name, _, value = one.partition("=")
        group, _, key = name.rpartition(".")
        place = changes.setdefault(group, {}) if group else changes
        place[key] = json.loads(value)
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(connect(Home.create(folder))) as connection,  # keeps the scores of the base
    ):
        for arm in options.arms.split(","):
            for seed in map(int, options.seeds.split(",")):
                config = UpdateConfig.from_mapping(changes)
                config = replace(config, seed=seed, **ARMS[arm])
                figures[f"{arm}/{seed}"] = nights(arm, config, options.nights, connection)
    print_report("ordinary", figures, [])


if __name__ == "__main__":
    main()
