"""What people judged in a night, and how their judgements reach the log of a home."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentpref import Log
from agentpref.config import UpdateConfig
from agentpref.prefer.examples import is_held_out
from agentpref.types import Completion, Example, Message, Prompt, Tool
from benchmarks.streams.rules import Rule

SHARE = UpdateConfig().held_out

Thumb = Literal["up", "down"]


@dataclass(frozen=True, slots=True)
class Item:
    """One question with the answer that is liked and the one that is not.

    ``wanted`` is what the night's rule looks for. A ``flipped`` item is logged the wrong way round;
    one with a ``thumb`` is logged as a single run: the liked answer with a thumb up, or the other
    one with a thumb down.
    """

    messages: tuple[Message, ...]
    chosen: Message
    rejected: Message
    wanted: str = ""
    tools: tuple[Tool, ...] = ()
    flipped: bool = False
    thumb: Thumb | None = None

    @property
    def held_out(self) -> bool:
        """Whether an update holds this question out."""
        return is_held_out(self.messages, SHARE)

    def example(self, tag: str, number: int) -> Example:
        """The item as the pair that it is, with its true label, to measure a policy on."""
        name = f"{tag}/{number}"
        return Example(
            example_id=name,
            namespace="streams",
            created_at=0.0,
            prompt=Prompt(name, self.messages, self.tools),
            completions=(Completion(self.chosen, 1.0), Completion(self.rejected, 0.0)),
            origin="comparison",
            tag=tag,
            held_out=self.held_out,
        )


@dataclass(frozen=True, slots=True)
class Night:
    """A night's judgements: ``logged`` reach the home, ``measured`` are never seen by the product.

    The runs carry the ``tag``. Of the logged items, those whose question is held out are what the
    product proves with.
    """

    name: str
    tag: str
    rule: Rule
    logged: tuple[Item, ...]
    measured: tuple[Item, ...]

    def examples(self) -> list[Example]:
        """The measured items as pairs."""
        return _pairs(self.name, self.measured)

    def pairs(self) -> list[Example]:
        """The logged items as pairs, for what needs no home."""
        return _pairs(self.name, self.logged)


def _pairs(name: str, items: Iterable[Item]) -> list[Example]:
    return [item.example(name, number) for number, item in enumerate(items)]


def said(text: str) -> Message:
    """An answer of an assistant."""
    return {"role": "assistant", "content": text}


def asked(text: str, system: str = "") -> tuple[Message, ...]:
    """A question of a user, below a system message if there is one."""
    above = ({"role": "system", "content": system},) if system else ()
    return (*above, {"role": "user", "content": text})


def judge(log: Log, night: Night) -> None:
    """Log a night's runs, and what people said of them: a comparison of two, or a lone thumb."""
    for item in night.logged:
        about: Mapping[str, Any] = {"tools": item.tools, "tags": [night.tag], "user_id": night.tag}
        liked, disliked = (
            (item.rejected, item.chosen) if item.flipped else (item.chosen, item.rejected)
        )
        if item.thumb is not None:
            run = log.record(item.messages, liked if item.thumb == "up" else disliked, **about)
            log.thumbs(run, up=item.thumb == "up", user_id=night.tag)
            continue
        better, worse = (log.record(item.messages, answer, **about) for answer in (liked, disliked))
        log.compare(better, worse, winner="a", user_id=night.tag)
    log.flush()


def traffic(log: Log, prompts: Iterable[Sequence[Message]], answers: Iterable[str]) -> None:
    """Log ordinary requests with the agent's own answers, of which nobody says anything."""
    for messages, answer in zip(prompts, answers, strict=True):
        log.record(messages, answer, tags=["ordinary"])
    log.flush()
