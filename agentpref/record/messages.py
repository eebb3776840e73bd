"""Messages as a Merkle chain: what one is, what it is called, and which ones are refused.

A message's id is a hash of its canonical JSON and of its parent's id, so that the id of a prompt's
last message stands for the whole prompt, and two runs of one prompt share its rows. Tools, where
there are any, are the root of the chain. Identity is by content alone: who said it, when and to
which model is the run's business.

What is kept is not what is hashed: a body keeps its keys in the order they came in, since a chat
template that dumps a tool as JSON makes other tokens of another order. Bodies that differ in the
order of keys alone share an id, and the store keeps the one that came first. Pure functions;
nothing here reads a database.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from agentpref.errors import InvalidMessage
from agentpref.types import Message, Prompt, Tool

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""The largest message that is kept, as JSON."""

REMEMBERED_BYTES = 1024 * 1024
"""How much text a linker remembers the links of."""


class Node(NamedTuple):
    """One link of a chain: ``id`` is the hash of ``parent`` and of the body's canonical form.

    ``body`` is the JSON that is kept, its keys in their own order.
    """

    id: str
    parent: str | None
    body: bytes


def canonical(body: Mapping[str, Any]) -> bytes:
    """Write a mapping as JSON in the one form that is hashed: UTF-8, sorted keys, no spaces.

    Raises:
        TypeError: for what JSON or UTF-8 cannot hold.
    """
    return orjson.dumps(body, default=plain, option=orjson.OPT_SORT_KEYS)


def kept(body: Mapping[str, Any]) -> bytes:
    """Write a mapping as JSON in the form that is stored: as ``canonical``, keys as they come.

    Raises:
        TypeError: for what JSON or UTF-8 cannot hold.
    """
    return orjson.dumps(body, default=plain)


def plain(value: Any) -> dict[str, Any]:
    """Turn a mapping that is no dict into one, for ``orjson.dumps(default=…)``."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value of type {type(value).__name__} is not JSON")


def node_id(parent: str | None, body: Mapping[str, Any]) -> str:
    """Hash a body's canonical form under its parent: blake2b, 128 bits, hexadecimal.

    Raises:
        TypeError: for what JSON or UTF-8 cannot hold.
    """
    text = b"%s\n%s" % ((parent or "").encode(), canonical(body))
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class Linker:
    """Links messages into chains, and remembers the links that it made last.

    A conversation comes again with every turn, and a system prompt with every conversation: to
    know a message again is cheaper than to hash it. Has one user at a time.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str | None, bytes], Node] = {}
        self._bytes = 0

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Tool], output: Message
    ) -> tuple[Node, ...]:
        """Link a prompt from its root to its last message, and the answer to it.

        Raises:
            InvalidMessage: there is no message, or one that cannot be stored.
        """
        nodes = self.chain(messages, tools)
        check_output_shape(output)
        return (*nodes, self.child(nodes[-1].id, output, "the output"))

    def chain(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Node]:
        """Link a prompt from its root to its last message.

        Raises:
            InvalidMessage: there is no message, or one that cannot be stored.
        """
        check_shapes(messages)
        nodes: list[Node] = []
        parent: str | None = None
        if tools:
            check_tool_shapes(tools)
            nodes.append(self.child(None, {"tools": tuple(tools)}, "the list of tools"))
            parent = nodes[0].id
        for index, message in enumerate(messages):
            nodes.append(self.child(parent, message, index))
            parent = nodes[-1].id
        return nodes

    def child(
        self, parent: str | None, body: Mapping[str, Any], where: int | str = "the message"
    ) -> Node:
        """Link one body under a parent; ``where`` says in an error which one it is."""
        key = (parent, _text(body, where))
        node = self._made.get(key)
        if node is None:
            node = Node(node_id(parent, body), *key)
            self._remember(key, node)
        return node

    def _remember(self, key: tuple[str | None, bytes], node: Node) -> None:
        self._bytes += len(node.body)
        if self._bytes > REMEMBERED_BYTES:
            self._made.clear()
            self._bytes = len(node.body)
        self._made[key] = node


def chain(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[list[Node], str]:
    """Link a prompt from its root to its last message; return the nodes and the prompt's id.

    Raises:
        InvalidMessage: there is no message, or one that cannot be stored.
    """
    nodes = Linker().chain(messages, tools)
    return nodes, nodes[-1].id


def answer(prompt_id: str, output: Message) -> Node:
    """Link an output under the prompt that it answers.

    Raises:
        InvalidMessage: it is no message of an assistant, or cannot be stored.
    """
    check_output_shape(output)
    return Linker().child(prompt_id, output, "the output")


def prompt_of(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
    """Make a prompt, with its content address, of messages and the tools that were offered."""
    return Prompt(chain(messages, tools)[1], tuple(messages), tuple(tools))


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse a prompt that cannot be stored and read back as it is.

    Raises:
        InvalidMessage: naming the message by its index, and the cure.
    """
    check_shapes(messages)
    for index, message in enumerate(messages):
        _text(message, index)


def check_output(output: Message) -> None:
    """Refuse an output that is no message of an assistant, or that cannot be stored."""
    check_output_shape(output)
    _text(output, "the output")


def check_tools(tools: Sequence[Tool]) -> None:
    """Refuse tools that are no list of mappings, or that cannot be stored."""
    check_tool_shapes(tools)
    _text({"tools": tuple(tools)}, "the list of tools")


def check_shapes(messages: Sequence[Message]) -> None:
    """Refuse messages of the wrong shape, without looking at their text.

    This is the part that ``Log.record`` can afford at every call.
    """
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
    """Refuse an output that is no message of an assistant, without looking at its text."""
    _check_shape(message, "the output")
    if message["role"] != "assistant":
        raise InvalidMessage(
            f"the output has role {message['role']!r}; pass a string or a message whose role is "
            "'assistant'"
        )


def check_tool_shapes(tools: Sequence[Tool]) -> None:
    """Refuse tools that are no list of mappings, without looking at their text."""
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
            f"{_name(where)} has role {reprlib.repr(role)}; use one of {', '.join(sorted(ROLES))}"
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
