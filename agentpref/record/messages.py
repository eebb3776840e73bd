"""Messages as a Merkle chain, the rows of a run, and ids.

A message's id is a hash of its canonical JSON and of its parent's id. So the id of a prompt's last
message stands for the whole prompt, and two runs of one prompt share its rows. Tools, if there are
any, are the root of the chain. Only the content decides the id; author, time and model belong to
the run.

The store keeps a body with its keys in the order they came in, because a chat template that dumps a
tool as JSON makes other tokens of another order. Bodies that differ only in the order of their keys
share an id; the store keeps the first one.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeAlias

import orjson

from agentpref.errors import InvalidMessage, described
from agentpref.types import Comparison, Feedback, Message, Prompt, Run, Tool

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
TOOLS = "tools"
"""The only key of a chain's root that lists tools, and what such a root has instead of a role."""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""The largest message that is kept, as JSON."""

REMEMBERED_BYTES = 1024 * 1024
"""How much text a :class:`Linker` remembers."""


class Node(NamedTuple):
    """One link of a chain: ``id`` hashes ``parent`` and the canonical form of ``body``.

    ``body`` is the JSON that is kept, its keys in their own order.
    """

    id: str
    parent: str | None
    body: bytes


def canonical(body: Mapping[str, Any]) -> bytes:
    """Write a mapping as the JSON that is hashed: UTF-8, sorted keys, no spaces.

    Like ``kept``, this raises ``TypeError`` for what JSON or UTF-8 cannot hold.
    """
    return orjson.dumps(body, default=plain, option=orjson.OPT_SORT_KEYS)


def kept(body: Mapping[str, Any]) -> bytes:
    """Write a mapping as the JSON that is stored: like ``canonical``, with keys as they come."""
    return orjson.dumps(body, default=plain)


def plain(value: Any) -> dict[str, Any]:
    """Turn any mapping into a dict; pass it as ``default`` to ``orjson.dumps``."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value of type {type(value).__name__} is not JSON")


def node_id(parent: str | None, body: Mapping[str, Any]) -> str:
    """Hash a body's canonical form under its parent: blake2b, 128 bits, hexadecimal."""
    text = b"%s\n%s" % ((parent or "").encode(), canonical(body))
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def reread(key: str, parent: str | None, text: bytes) -> Any:
    """Parse the stored body of a message; ``ValueError`` if it is not what its id stands for.

    The text must also be written as ``kept`` writes it: with a repeated key, for example, one
    parser would read what another one had not hashed.
    """
    try:
        body = orjson.loads(text)
        if kept(body) == text and node_id(parent, body) == key:
            return body
    except (orjson.JSONDecodeError, TypeError):  # not JSON, or nested too deep to be written
        pass
    raise ValueError("its text is not what was recorded")


class Linker:
    """Links messages into chains and remembers the latest links.

    A conversation comes again with every turn, and a system prompt with every conversation.
    Looking a message up is cheaper than hashing it. Not safe to share between threads. All methods
    raise ``InvalidMessage`` for a message that cannot be stored; the error names it.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str | None, bytes], Node] = {}
        self._bytes = 0

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Tool], output: Message
    ) -> tuple[Node, ...]:
        """Link a prompt from its root to its last message, and the answer to it."""
        nodes = self.chain(messages, tools)
        return (*nodes, self.answer(nodes[-1].id, output))

    def chain(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Node]:
        """Link a prompt, which has at least one message, from its root to its last message."""
        check_shapes(messages)
        nodes: list[Node] = []
        parent: str | None = None
        if tools:
            check_tool_shapes(tools)
            nodes.append(self.child(None, {TOOLS: tuple(tools)}, "the list of tools"))
            parent = nodes[0].id
        for index, message in enumerate(messages):
            nodes.append(self.child(parent, message, index))
            parent = nodes[-1].id
        return nodes

    def answer(self, prompt_id: str, output: Message) -> Node:
        """Link an output, an assistant's message, under the prompt that it answers."""
        check_output_shape(output)
        return self.child(prompt_id, output, "the output")

    def child(
        self, parent: str | None, body: Mapping[str, Any], where: int | str = "the message"
    ) -> Node:
        """Link one body under a parent; an error names the body by ``where``."""
        key = (parent, _text(body, where))
        node = self._made.get(key)
        if node is None:
            node = Node(node_id(parent, body), *key)
            self._bytes += len(node.body)
            if self._bytes > REMEMBERED_BYTES:
                self._made.clear()
                self._bytes = len(node.body)
            self._made[key] = node
        return node


def prompt_of(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
    """Make a prompt, with its content address, of messages and the tools that were offered.

    >>> prompt_of([{"role": "user", "content": "hello"}]).id
    'c9a0f457786f263ee5ac976323e4ab09'
    """
    return Prompt(Linker().chain(messages, tools)[-1].id, tuple(messages), tuple(tools))


def check_output(output: Message) -> None:
    """Refuse an output that is not an assistant's message, or that cannot be stored."""
    check_output_shape(output)
    _text(output, "the output")


def check_shapes(messages: Sequence[Message]) -> None:
    """Refuse messages of the wrong shape, without looking at their text."""
    if not isinstance(messages, (list, tuple)):
        raise InvalidMessage(
            f"messages is a {type(messages).__name__}; pass a list such as "
            "[{'role': 'user', 'content': 'hello'}]"
        )
    if not messages:
        raise InvalidMessage("messages is an empty list; pass at least one message")
    for index, message in enumerate(messages):
        _check_shape(message, index)


def check_output_shape(message: Message) -> None:
    """Like ``check_output``, without looking at the text."""
    _check_shape(message, "the output")
    if message["role"] != "assistant":
        raise InvalidMessage(
            f"the output has role {message['role']!r}; pass a string or a message whose role is "
            "'assistant'"
        )


def check_tool_shapes(tools: Sequence[Tool]) -> None:
    """Refuse tools that are not a list of mappings, without looking at their text."""
    if not isinstance(tools, (list, tuple)):
        raise InvalidMessage(
            f"tools is a {type(tools).__name__}; pass a list of mappings, one for each tool"
        )
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidMessage(
                f"tool {index} is a {type(tool).__name__}; pass a mapping in OpenAI's shape"
            )


def _check_shape(message: Message, where: int | str) -> None:
    if type(message) is not dict and not isinstance(message, Mapping):  # the first is quicker
        raise InvalidMessage(
            f"{_name(where)} is a {type(message).__name__}; pass a mapping with a role and a "
            "content (most libraries' message objects have .model_dump())"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidMessage(
            f"{_name(where)} has role {described(role)}; use one of {', '.join(sorted(ROLES))}"
        )
    content = message.get("content")
    if not isinstance(content, (str, list, tuple)) and (content is not None or role != "assistant"):
        raise InvalidMessage(
            f"{_name(where)} has content of type {type(content).__name__}; pass a string or a list "
            "of parts (only an assistant's may be None); decode bytes with .decode('utf-8')"
        )


def _text(body: Mapping[str, Any], where: int | str) -> bytes:
    try:
        text = kept(body)
    except TypeError as error:
        raise InvalidMessage(
            f"{_name(where)} is not JSON in UTF-8: {error}; keep to strings, numbers, lists and "
            "mappings, and clean text with .encode('utf-8', 'replace').decode()"
        ) from error
    if len(text) > MAX_MESSAGE_BYTES:
        raise InvalidMessage(
            f"{_name(where)} takes {len(text):,} bytes, more than the {MAX_MESSAGE_BYTES:,} that "
            "are kept; store the file elsewhere and log a reference to it"
        )
    return text


def _name(where: int | str) -> str:
    return f"message {where}" if isinstance(where, int) else where


# Rows: the columns of the tables are the fields of the records in `types`.


class RunRow(NamedTuple):
    """A run as its table holds it, and ``nodes``: its chain and its answer.

    ``prompt`` and ``output`` are ids of messages; ``params``, ``token_ids``, ``logprobs``,
    ``tags`` and ``metadata`` are JSON text.
    """

    run_id: str
    namespace: str
    created_at: float
    prompt: str
    output: str
    model: str | None
    revision: str | None
    thread_id: str | None
    trace_id: str | None
    user_id: str | None
    params: str
    token_ids: str | None
    logprobs: str | None
    tags: str
    metadata: str
    nodes: tuple[Node, ...]


StoredRecord: TypeAlias = "RunRow | Feedback | Comparison"
"""What goes into the database, checked, redacted and under pseudonyms."""

IMPORT_ID = "import-"
"""How the ids of imported rows begin, which are hashes of their content."""

RUN_COLUMNS = RunRow._fields[:-1]
FEEDBACK_COLUMNS = tuple(field.name for field in fields(Feedback))
COMPARISON_COLUMNS = tuple(field.name for field in fields(Comparison))

EMPTY_JSON = {"params": "{}", "token_ids": None, "logprobs": None, "tags": "[]", "metadata": "{}"}
"""The columns of a run that hold JSON, and what they hold where the app gave nothing."""


def run_row(run: Run, nodes: Sequence[Node] = ()) -> RunRow:
    """Make the row of a run; the prompt's id is always computed from its messages.

    ``nodes`` are its chain and its answer, if they are linked already; nodes of the chain that the
    store has may be left out.
    """
    nodes = nodes or Linker().conversation(run.prompt.messages, run.prompt.tools, run.output)
    values = {name: getattr(run, name) for name in RUN_COLUMNS}
    values |= {"prompt": nodes[-1].parent, "output": nodes[-1].id}
    for name, empty in EMPTY_JSON.items():
        values[name] = empty if values[name] is None else as_json(values[name])
    return RunRow(**values, nodes=tuple(nodes))


def as_json(value: Any) -> str:
    """Write a column that holds JSON."""
    return orjson.dumps(value, default=plain).decode()


_VARIANT = 0b10 << 14

_generator = random.Random()
_random_bits = _generator.getrandbits
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_generator.seed)


def new_id(now: int | None = None) -> str:
    """Make an id, such as ``0198c2a4-7d1e-7b3f-9c55-0a1b2c3d4e5f``, that sorts by its time.

    It is a UUID version 7 (RFC 9562) whose ``rand_a`` bits carry the fraction of the millisecond.
    The other 62 bits come from a generator that is seeded by the operating system, again in every
    forked child. Asking the system for each id would release the interpreter's lock in the middle
    of the app's call. ``now`` is the time in nanoseconds since 1970; by default the present.
    """
    milliseconds, rest = divmod(time.time_ns() if now is None else now, 1_000_000)
    bits = _random_bits(62)
    return "%08x-%04x-7%03x-%04x-%012x" % (  # noqa: UP031  a quarter quicker than an f-string
        milliseconds >> 16,
        milliseconds & 0xFFFF,
        (rest << 12) // 1_000_000,
        bits >> 48 | _VARIANT,
        bits & 0xFFFFFFFFFFFF,
    )
