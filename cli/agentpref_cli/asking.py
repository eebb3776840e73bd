"""What commands that ask a judge share: its options, how it is asked, and what that took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli.terminal import BAD, say

if TYPE_CHECKING:
    from agentpref.evaluation.duels import Answer
    from agentpref.judging import Asking
    from agentpref.judging.running import Generate
    from agentpref.prefer.judges.hearing import Spending
    from agentpref.serve.registry import Registry
    from agentpref.types import Progress

Concurrency = Annotated[
    int, typer.Option(min=1, max=256, metavar="N", help="So many calls at a time.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Stop when so many tokens are spent.", show_default=False
    ),
]
MaxCost = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="DOLLARS",
        help="Stop when so much is spent, by the rubric's price.",
        show_default=False,
    ),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(min=0, metavar="M", help="Stop after so many minutes.", show_default=False),
]
Recheck = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="First put N of people's comparisons to it again; 0: none."
    ),
]
AnswerModel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The base model that answers [default: that of what serves].",
        show_default=False,
    ),
]


def asking_of(
    concurrency: int,
    max_tokens: int | None,
    max_cost: float | None,
    max_minutes: float | None,
    report: Progress | None,
) -> Asking:
    """How questions are asked, by the options of a command."""
    from agentpref.judging import Asking
    from agentpref.prefer.judges.hearing import Limits

    seconds = None if max_minutes is None else 60 * max_minutes
    return Asking(concurrency, Limits(max_tokens, max_cost, seconds), progress=report)


@contextmanager
def sampler(home: Any, namespace: str, model: str | None) -> Iterator[Generate]:
    """Answers requests with what serves, in this process."""
    from agentpref.errors import ConfigError
    from agentpref.serve.registry import Registry
    from agentpref.serve.router import Router
    from agentpref_adapters.transformers import TransformersBackend

    registry = Registry(home, namespace=namespace)
    if model is None:
        live = registry.live()
        if live is None:
            raise ConfigError("nothing serves yet; name the base model that answers with --model")
        model = str(live.manifest["base"]["name"])
    with Router(registry, TransformersBackend(model)) as router:
        yield router.generate


def revisions_of(model: str | None) -> Callable[[Registry, Sequence[str]], Answer]:
    """Makes revisions ready in this process, to answer requests.

    ``model`` is where their base is; by default it has the name that they were trained with, or,
    where there are none, that of the namespace's reward model.
    """

    def answer(registry: Registry, names: Sequence[str]) -> Answer:
        from agentpref.reward import Shelf
        from agentpref.types import BASE
        from agentpref_adapters.transformers import TransformersBackend

        found = [registry.get(name) for name in names if name != BASE]
        base = model or (found[-1].manifest["base"]["name"] if found else None)
        if base is None:
            base = Shelf(registry.home, registry.namespace).read().about["base"]["name"]
        backend = TransformersBackend(base)
        for revision in found:
            backend.validate(revision)
            backend.load(revision)
        return backend.generate

    return answer


def show_spending(spending: Spending) -> None:
    """Print what asking a judge took, and what failed."""
    tokens = spending.prompt_tokens + spending.completion_tokens
    cost = "" if spending.cost is None else f"{spending.cost:.2f} dollars, "
    if spending.asked or spending.known:
        say(
            f"{spending.asked:,} verdicts, {tokens:,} tokens, {cost}{spending.seconds:.1f} s; "
            f"{spending.known:,} were known"
        )
    for reason, count in spending.failed.most_common():
        say(f"failed {count:,} times: {reason}", BAD)
