"""The online loop: what serves answers, a judge compares, the pairs train, and what passes serves.

Each round draws answers from live to prompts of the log, lets a judge compare them, and is one
update. Held-out prompts among them prove, and never train. After each round, live and the base
answer other held-out prompts, always the same, and the judge says how often live's are better. The
loop ends by itself: when that no longer rises, when updates bring nothing, when the KL budget is
spent, when an update loses what people said themselves, or when an independent judge no longer
agrees with the first one. In the last case the policy has learned to please its judge: what the
round brought is rolled back, the judge's verdicts train nothing any more, and the report has the
words.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.config import UpdateConfig
from agentpref.errors import ConfigError
from agentpref.home import Home
from agentpref.judging.opened import ASKING, Asking, open_judge
from agentpref.online.loop import Loop
from agentpref.online.report import OnlineReport as OnlineReport
from agentpref.online.report import Round as Round
from agentpref.online.report import Train
from agentpref.prefer.judges.verdicts import Judge
from agentpref.prove import kl_budget
from agentpref.record.database import connect, translated
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.types import Progress

if TYPE_CHECKING:
    from agentpref.serve.backend import ServingBackend


def run_online(
    home: str | Path | None,
    *,
    model: str,
    judge: str | Judge,
    backend: ServingBackend,
    check: str | Judge | None = None,
    namespace: str = "default",
    config: UpdateConfig | None = None,
    rounds: int = 3,
    prompts: int = 64,
    samples: int = 2,
    temperature: float = 0.9,
    max_tokens: int = 256,
    probes: int = 48,
    offline: bool = True,
    max_minutes: float | None = None,
    train: Train | None = None,
    asking: Asking = ASKING,
    progress: Progress | None = None,
    heard: Callable[[Round], object] | None = None,
) -> OnlineReport:
    """Let what serves learn from what a judge says of its own answers, round after round.

    Args:
        home: a home folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        model: the base model, as for :func:`agentpref.update`.
        judge: a judge of the home, calibrated in this namespace, or a rule.
        backend: an engine with this base; the loop serves the live revision on it.
        check: a second judge, which sees the first one being deceived.
        namespace: whose prompts and live revision.
        config: settings of the updates.
        rounds: so many at most.
        prompts: so many prompts to train on in each round, as equally of each tag as possible;
            held-out ones come beside them, by their share, to prove by.
        samples: so many answers to each prompt, of which each pair is compared.
        temperature: at which they are drawn.
        max_tokens: so many tokens at most in an answer whose run does not say.
        probes: so many held-out prompts, on which live is compared with the base.
        offline: first learn from what is logged already.
        max_minutes: begin no round after so many minutes, and keep each update within the rest.
        train: trains by reinforcement instead of on pairs; what it makes goes through the gate.
        asking: how the judge is asked; its limits are for the whole loop.
        progress: called with ``(stage, done, total)``.
        heard: called with each round as it ends.

    Raises:
        ConfigError: a number is out of range.
        UncalibratedJudge: nobody knows how right a judge is, or it is trusted nowhere.
        JudgeError: there is no such judge, or no prompt to answer.
        Everything that :func:`agentpref.update` raises.
    """
    least_of = {"rounds": 1, "prompts": 1, "samples": 2, "probes": 0}
    given = {"rounds": rounds, "prompts": prompts, "samples": samples, "probes": probes}
    for name, value in given.items():
        least = least_of[name]
        if value < least:
            raise ConfigError(f"{name} is {value}, but must be {least} or more")
    place = Home.open(home)
    settled = kl_budget.settled(config or UpdateConfig(), place, namespace)
    with translated(place), closing(connect(place)) as connection:
        Store(connection).require_namespace(namespace)
        registry = Registry(place, namespace=namespace)
        opened = open_judge(place, connection, judge, namespace)
        opened.require_trusted(namespace)
        second = None if check is None else open_judge(place, connection, check, namespace)
        if second is not None and second.voter == opened.voter:
            raise ConfigError(f"check is {second.name!r}, which is the judge; name another one")
        with Router(registry, backend) as router, Log(place.path, namespace=namespace) as log:
            loop = Loop(
                place, connection, router, log, opened, second, model, settled,
                prompts, samples, temperature, max_tokens, train, asking,
                progress or (lambda stage, done, total: None),
                None if max_minutes is None else time.monotonic() + 60 * max_minutes,
            )  # fmt: skip
            return loop.run(rounds, probes, offline=offline, heard=heard or (lambda one: None))
