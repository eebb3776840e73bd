"""The columns of the tables that notebooks read: names, types, and where each value comes from.

The names are part of the public interface: they stay, and new ones come at the end. Texts are what
a person would read: the text of the last question and of the answer. Beside them, columns of JSON
hold everything as it was recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import orjson

from agentpref.record.messages import plain
from agentpref.types import Example, Message, UpdateReport

Kind: TypeAlias = Literal["runs", "feedback", "comparisons", "pairs", "updates", "revisions"]
Type: TypeAlias = Literal["text", "texts", "json", "flag", "count", "number", "time"]
"""``json`` is text that holds JSON, ``time`` is in UTC, to the microsecond."""

Value: TypeAlias = Callable[[Any], Any]


class Column(NamedTuple):
    """One column; ``value`` takes it from a record, ``None`` takes the attribute of its name."""

    name: str
    type: Type
    meaning: str
    value: Value | None = None

    def cell(self, record: object, beside: Mapping[str, Any]) -> Any:
        """The value of the column for a record, or what is known ``beside`` it."""
        if self.name in beside:
            return beside[self.name]
        found = getattr(record, self.name) if self.value is None else self.value(record)
        if found is None:
            return None
        if self.type == "json":
            return orjson.dumps(found, default=plain).decode()
        return _microseconds(found) if self.type == "time" else found


def _microseconds(at: float) -> int | None:
    """A time as Arrow holds it; a damaged home may have any number, which is then missing."""
    return round(at * 1e6) if math.isfinite(at) and abs(at) < 9e12 else None


def text_of(message: Message) -> str | None:
    """The text of a message: of several parts, each text on a line, and the type of each other."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return None if content is None else str(content)
    parts = (part if isinstance(part, Mapping) else {"text": part} for part in content)
    return "\n".join(str(part.get("text") or f"[{part.get('type')}]") for part in parts)


def question_of(messages: Sequence[Message]) -> str | None:
    """The text of the last message of the user."""
    asked = (message for message in reversed(messages) if message.get("role") == "user")
    return next(map(text_of, asked), None)


def _side(number: int, part: str) -> Value:
    """The text or the author of the completion of a pair at a place."""

    def value(pair: Example) -> Any:
        completion = pair.completions[number]
        if part == "author":
            return completion.author
        return text_of(completion.message) if part == "text" else completion.message

    return value


def _counted(*names: str) -> Value:
    """The number of examples that an update counts under some names, thumbs among them."""

    def value(report: UpdateReport) -> int:
        counts = (report.counts.get(f"{n}{end}", 0) for n in names for end in ("", "_thumbs"))
        return sum(counts)

    return value


def _accuracy(when: str) -> Value:
    """The held-out accuracy over all tags, each counted by its pairs."""

    def value(report: UpdateReport) -> float | None:
        tags = [tag for tag in report.accuracy.values() if tag.get("pairs") and when in tag]
        pairs = sum(tag["pairs"] for tag in tags)
        return sum(tag["pairs"] * tag[when] for tag in tags) / pairs if pairs else None

    return value


_NAMESPACE = Column("namespace", "text", "the namespace that was read")
_PROMPT = (
    Column("messages", "json", "the messages of the prompt", lambda r: r.prompt.messages),
    Column("tools", "json", "the tools that were offered", lambda r: r.prompt.tools or None),
)
_JUDGED = (
    Column("source", "text", "who judged: `human`, `model` or `code`"),
    Column("user_id", "text", "the pseudonym of the person or the judge"),
)

COLUMNS: Mapping[Kind, tuple[Column, ...]] = {
    "runs": (
        Column("run_id", "text", "the id that `record` returned"),
        _NAMESPACE,
        Column("created_at", "time", "when it was recorded"),
        Column("thread_id", "text", "the conversation"),
        Column("trace_id", "text", "the task"),
        Column("user_id", "text", "the pseudonym of the user"),
        Column("model", "text", "the model that was asked"),
        Column("revision", "text", "the revision that answered, or `base`"),
        Column("tag", "text", "the first tag, or `untagged`"),
        Column("tags", "texts", "all tags", lambda r: [*r.tags]),
        Column(
            "question",
            "text",
            "the last text of the user",
            lambda r: question_of(r.prompt.messages),
        ),
        Column("answer", "text", "the text of the answer", lambda r: text_of(r.output)),
        Column(
            "tool_calls", "json", "the calls in the answer", lambda r: r.output.get("tool_calls")
        ),
        *_PROMPT,
        Column("output", "json", "the answer, whole"),
        Column("params", "json", "how the model was asked, such as its temperature"),
        Column("metadata", "json", "what the app noted"),
        Column(
            "tokens",
            "count",
            "how many tokens the engine wrote",
            lambda r: None if r.token_ids is None else len(r.token_ids),
        ),
        Column(
            "logprob",
            "number",
            "the natural log of the probability of the whole answer",
            lambda r: None if r.logprobs is None else math.fsum(r.logprobs),
        ),
    ),
    "feedback": (
        Column("feedback_id", "text", "its id"),
        _NAMESPACE,
        Column("created_at", "time", "when it was given"),
        Column("run_id", "text", "the run that it is about"),
        Column("key", "text", "what was judged, such as `thumbs`"),
        Column("score", "number", "the score"),
        Column(
            "scale_low", "number", "the lowest possible score", lambda f: f.scale and f.scale[0]
        ),
        Column(
            "scale_high", "number", "the highest possible score", lambda f: f.scale and f.scale[1]
        ),
        Column("value", "json", "what was given beside a score"),
        Column("comment", "text", "the words of the person"),
        Column(
            "correction",
            "text",
            "the text of the answer as it should have been",
            lambda f: None if f.correction is None else text_of(f.correction),
        ),
        *_JUDGED,
    ),
    "comparisons": (
        Column("comparison_id", "text", "its id"),
        _NAMESPACE,
        Column("created_at", "time", "when it was given"),
        Column("run_a", "text", "the one run"),
        Column("run_b", "text", "the other run"),
        Column("winner", "text", "`a`, `b` or `tie`"),
        Column("comment", "text", "the words of the person"),
        *_JUDGED,
    ),
    "pairs": (
        Column("pair_id", "text", "the hash of its content", lambda p: p.example_id),
        _NAMESPACE,
        Column("created_at", "time", "when the judgement was given that made it"),
        Column("tag", "text", "the first tag of its run, or `untagged`"),
        Column(
            "origin",
            "text",
            "`correction`, `comparison`, `thumbs`, `comment`, `critique` or `judge`",
        ),
        Column("held_out", "flag", "whether it proves adapters and never trains them"),
        Column(
            "question",
            "text",
            "the last text of the user",
            lambda p: question_of(p.prompt.messages),
        ),
        Column("chosen", "text", "the text of the better answer", _side(0, "text")),
        Column("rejected", "text", "the text of the worse answer", _side(-1, "text")),
        Column("chosen_revision", "text", "the revision that wrote it", _side(0, "author")),
        Column("rejected_revision", "text", "the revision that wrote it", _side(-1, "author")),
        Column("weight", "number", "its weight in training"),
        Column("noise", "number", "the assumed probability that it is the other way round"),
        Column("trace_id", "text", "the task"),
        Column("provenance", "texts", "ids of the judgements behind it", lambda p: [*p.provenance]),
        *_PROMPT,
        Column("chosen_message", "json", "the better answer, whole", _side(0, "message")),
        Column("rejected_message", "json", "the worse answer, whole", _side(-1, "message")),
    ),
    "updates": (
        Column("update_id", "text", "its id"),
        _NAMESPACE,
        Column("created_at", "time", "when it began"),
        Column("verdict", "text", "what became of it, such as `promoted`"),
        Column("seconds", "number", "how long it took"),
        Column("model", "text", "the base model"),
        Column("parent", "text", "the revision that it started from"),
        Column("revision", "text", "the candidate, if it was published"),
        Column("trained", "count", "new examples that it trained on", _counted("trained")),
        Column("replayed", "count", "old examples that it trained on", _counted("replayed")),
        Column(
            "evaluated",
            "count",
            "held-out examples that it was examined on",
            _counted("new_evaluated", "old_evaluated"),
        ),
        Column("waiting", "count", "examples that wait for the next", _counted("waiting")),
        Column(
            "set_aside",
            "count",
            "new examples that it set aside",
            lambda u: sum(
                one["examples"] for one in u.set_aside if one["update_id"] == u.update_id
            ),
        ),
        Column(
            "left_out",
            "count",
            "examples and judgements that it could not use",
            lambda u: sum(u.left_out.values()),
        ),
        Column("accuracy_before", "number", "held-out accuracy before", _accuracy("before")),
        Column(
            "accuracy_after", "number", "held-out accuracy of the candidate", _accuracy("after")
        ),
        Column("failed", "texts", "the checks that failed, and why", lambda u: u.reasons),
        Column("config", "json", "the settings"),
        Column("report", "json", "the whole report, as `agentpref report --json` prints it"),
    ),
    "revisions": (
        Column("revision_id", "text", "its name"),
        _NAMESPACE,
        Column("created_at", "time", "when it was published"),
        Column("parent", "text", "the revision that its training started from"),
        Column("serves", "text", "`live`, `canary` or nothing"),
        Column("base", "text", "the base model", lambda r: r.manifest.get("base", {}).get("name")),
        Column(
            "update_id",
            "text",
            "the update that made it",
            lambda r: r.manifest.get("watermark", {}).get("update_id"),
        ),
        Column("tainted_at", "time", "since when it is tainted"),
        Column("quarantined_at", "time", "since when it must not serve"),
        Column("quarantine_reason", "text", "why"),
        Column("pruned_at", "time", "when its files were removed"),
        Column("path", "text", "its folder", lambda r: str(r.path)),
        Column("manifest", "json", "its manifest"),
    ),
}
