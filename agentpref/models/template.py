"""Renders conversations with a model's chat template, and says what the template would lose.

Templates differ in what they can read: content as a string or in parts, the role ``developer``, the
name of the reasoning's key. A :class:`ChatTemplate` renders small conversations and looks at the
result, so no list of model families has to be kept. Training, evaluation and serving render with
the same one.

A template that writes today's date is given a clock. In training the clock is the run's, so that a
row has the same tokens tomorrow. It is UTC, in serving too: the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from agentpref.errors import ConfigError, TemplateRefused, UnsupportedModel
from agentpref.models import fidelity
from agentpref.models.reasons import LEFT_OUT, Objection
from agentpref.models.turns import END_OF_THOUGHT, REASONING_KEYS, START_OF_THOUGHT, Turn, read_turn
from agentpref.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = "strftime_now"
_OWN = frozenset({"messages", "tools", "documents", "add_generation_prompt", _CLOCK})
"""The arguments that are not the user's to give."""

# The words of the small conversations; no template writes them of its own accord.
_ASK, _SAY, _MORE, _THINK = "Qaaq", "Waaw", "Vaav", "Taat"
_TOOL = {"description": _SAY, "parameters": {"type": "object", "properties": {}}}
_CALL = {"type": "function", "id": "call00001", "function": {"name": _ASK, "arguments": {}}}


_Form: TypeAlias = Literal["string", "part", "parts"]
"""How a message's content is written: as a string, as a list of one part, or of several."""


class Rendered(NamedTuple):
    """A conversation as text, and the spans that the template marks as the assistant's.

    Spans are ``(start, end)`` in characters, in order; ``None`` where the template marks none.
    """

    text: str
    spans: Sequence[tuple[int, int]] | None = None


class ChatTemplate:
    """The chat template of a tokenizer, with the arguments that it is always given.

    Args:
        tokenizer: has the template, and the special tokens that it writes.
        chat_template_kwargs: arguments of the template, such as ``{"enable_thinking": False}``. A
            prompt's own take precedence.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._readers: dict[str, _Reader] = {}

    @cached_property
    def special(self) -> list[str]:
        """The texts of the special tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special and token.content]

    def require_arguments(self, chat_template_kwargs: Mapping[str, Any]) -> None:
        """Refuse an argument that the template does not read.

        Raises:
            ConfigError: with the argument's name.
        """
        found = self.tokenizer.chat_template
        texts = [*found.values()] if isinstance(found, Mapping) else [found]
        words = {word for text in texts for word in re.findall(r"\w+", str(text))}
        for name in chat_template_kwargs.keys() - (words - _OWN):
            raise ConfigError(
                f"chat_template_kwargs.{name} has no effect: the chat template reads no "
                f"{name!r}; leave it out, or spell it as the template does"
            )

    def render(self, prompt: Prompt, *, at: float | None = None) -> str:
        """Write a prompt as text, up to where the assistant begins.

        ``at`` (POSIX seconds; ``None``: now) is what the template's clock shows.

        Raises:
            TemplateRefused: the template raises, or loses words of the conversation.
        """
        text = self.try_render(prompt, at=at)
        if isinstance(text, Objection):
            where = "the conversation"
            if text.message is not None:
                where = f"message {text.message} ({prompt.messages[text.message]['role']})"
            raise TemplateRefused(f"{where} cannot be rendered: {LEFT_OUT[text.reason]}")
        return text

    def try_render(self, prompt: Prompt, *, at: float | None = None) -> str | Objection:
        """Write a prompt as :meth:`render` does; say why not, where it cannot be written whole."""
        turns = [read_turn(message) for message in prompt.messages]
        foreign = next((n for n, turn in enumerate(turns) if turn.foreign), None)
        if foreign is not None:
            return Objection("content_not_text", foreign)
        rendered = self._reader(prompt).write(turns, prompt, at, self.chat_template_kwargs)
        if rendered is None:
            return Objection("template_refuses")
        lost = fidelity.lost_of_prompt(rendered.text, turns, prompt.tools)
        if lost is None and prompt.tools and not self._reader(prompt).writes_tools:
            return Objection("template_drops_tools", 0)
        return rendered.text if lost is None else Objection(lost.reason, lost.message)

    def try_complete(
        self, prompt: Prompt, asked: str, completion: Message, *, at: float | None = None
    ) -> str | Objection:
        """Write what the template adds to ``asked``, the rendered prompt, for a completion.

        A template that marks the assistant's text with ``{% generation %}`` must mark all of it.
        """
        turns, answer = [read_turn(m) for m in prompt.messages], read_turn(completion)
        if answer.foreign:
            return Objection("content_not_text", -1)
        reader = self._reader(prompt)
        if reader.takes_reasoning:
            opened = asked.rstrip().endswith(START_OF_THOUGHT)
            answer = answer.with_thought_apart(opened=opened)
        words = [word for piece in fidelity.pieces_of_answer(answer) for word in piece.words]
        if any(token in word for word in words for token in self.special):
            return Objection("special_token_inside", -1)
        whole = reader.write([*turns, answer], prompt, at, self.chat_template_kwargs, answered=True)
        if whole is None:
            return Objection("template_refuses", -1)
        if not whole.text.startswith(asked):
            thoughts, before = (t.count(reader.end_of_thought) for t in (whole.text, asked))
            adds = not answer.reasoning and thoughts > before
            return Objection("template_adds_reasoning" if adds else "template_rewrites_prompt", -1)
        text = whole.text[len(asked) :]
        left = fidelity.lost_of_answer(text, answer)
        if not isinstance(left, str):
            return Objection(left.reason, left.message)
        if answer.calls and not reader.writes_calls(len(answer.calls), beside=bool(answer.text)):
            return Objection("template_drops_tool_calls", -1)
        if not answer.reasoning and reader.end_of_thought in left:
            return Objection("template_adds_reasoning", -1)
        if not (answer.reasoning or answer.calls or fidelity.is_bare(left, self.special)):
            return Objection("template_adds_text", -1)
        if not self._is_marked(whole, len(asked)):
            return Objection("template_marks_elsewhere", -1)
        return text

    def _is_marked(self, whole: Rendered, start: int) -> bool:
        """Whether a template that marks the assistant's text marks all of it from ``start``.

        White space and the special tokens that end the turn may stand outside.
        """
        if whole.spans is None:
            return True
        for begin, end in whole.spans:
            if begin <= start <= end:
                start = end
        rest = whole.text[start:]
        for token in self.special:
            rest = rest.replace(token, "")
        return not rest.strip()

    @property
    def has_clock(self) -> bool:
        """Whether the template writes the time, so that a prompt's text depends on it."""
        return _CLOCK in self._reader(Prompt("", ())).template

    @cached_property
    def turn_end(self) -> int | None:
        """The token that ends an answer, where the template writes one; it may not be the eos.

        It is what stands right after an answer, whether or not another turn follows: Phi 3 writes
        its eos after the last turn only, and stops at another token.
        """
        conversation = [_user(_ASK), {"role": "assistant", "content": _SAY}, _user(_MORE)]
        last, inner = (self._after_answer(conversation[:n]) for n in (2, 3))
        both = [token for token in last if token in inner] or last
        eos = self.tokenizer.eos_token_id
        return eos if eos in both else next(iter(both), None)

    def require_plain_answers(self, name: str) -> None:
        """Refuse a template that writes words of its own before an answer, to name a channel.

        A server that knows no channels would send them to the user as part of the answer.

        Raises:
            UnsupportedModel: with ``name``, the model's.
        """
        prompt = Prompt("", (_user(_ASK),))
        asked = self.try_render(prompt, at=0.0)
        if isinstance(asked, Objection):
            return
        answer = {"role": "assistant", "content": _SAY}
        written = self.try_complete(prompt, asked, answer, at=0.0)
        channel = written.partition(_SAY)[0] if isinstance(written, str) else ""
        for token in self.special:
            channel = channel.replace(token, "")
        if channel.strip():
            raise UnsupportedModel(
                f"{name!r} writes {channel.strip()!r} before its answers, to name a channel, and "
                "channels are not taken apart here; serve it with an engine that does, and log its "
                "answers with reasoning_content and token_ids"
            )

    def _after_answer(self, messages: Sequence[Message]) -> list[int]:
        """The added tokens right after the answer's text."""
        prompt = Prompt("", tuple(messages))
        turns = [read_turn(message) for message in messages]
        whole = self._reader(prompt).write(
            turns, prompt, 0.0, self.chat_template_kwargs, answered=True
        )
        rest = "" if whole is None else whole.text.partition(_SAY)[2].lstrip()
        added = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items() if t.content}
        found: list[int] = []
        while token := max((t for t in added if rest.startswith(t)), key=len, default=""):
            found.append(added[token])
            rest = rest[len(token) :].lstrip()
        return found

    def _reader(self, prompt: Prompt) -> _Reader:
        """The template for a prompt: some models have another one where there are tools."""
        text = self.tokenizer.get_chat_template(tools=_tools(prompt))
        if text not in self._readers:
            self._readers[text] = _Reader(text, dict(self.tokenizer.special_tokens_map))
        return self._readers[text]


class _Reader:
    """One template, and what it can read."""

    def __init__(self, template: str, special: Mapping[str, Any]) -> None:
        self.template = template
        self._special = special
        self._taken: dict[tuple[str, _Form], bool] = {}
        self._written: dict[tuple[int, bool], bool] = {}

    def write(
        self,
        turns: Sequence[Turn],
        prompt: Prompt,
        at: float | None,
        arguments: Mapping[str, Any],
        *,
        answered: bool = False,
    ) -> Rendered | None:
        """Write turns as text; ``None`` where the template refuses them."""
        return self._render(
            [self._shape(turn) for turn in turns],
            answered=answered,
            tools=_tools(prompt),
            arguments={**arguments, **prompt.chat_template_kwargs},
            at=at,
        )

    def _shape(self, turn: Turn) -> dict[str, Any]:
        """A turn as this template reads it.

        ``developer`` is OpenAI's later word for ``system``; few templates know it.
        """
        role = turn.role
        known = role in self.template and self._takes(role, "string")
        if role == "developer" and not known:
            role = "system"
        # The parts of an answer are pieces of one text, and some templates trim each.
        divided = turn.in_parts and role != "assistant" and self._takes(role, "parts")
        content: Any = turn.text
        if divided or (not self._takes(role, "string") and self._takes(role, "part")):
            texts = turn.texts if divided else (turn.text,)
            content = [{"type": "text", "text": text} for text in texts]
        return turn.write(role, content, reasoning_key=self._reasoning_key or REASONING_KEYS[0])

    def _takes(self, role: str, form: _Form) -> bool:
        """Whether the template writes content of this form in messages of a role."""
        if (role, form) not in self._taken:
            texts = [_SAY, _MORE] if form == "parts" else [_SAY + _MORE]
            parts = [{"type": "text", "text": text} for text in texts]
            message = {"role": role, "content": texts[0] if form == "string" else parts}
            calling = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
            conversations: Mapping[str, Sequence[Message]] = {
                "user": [message],
                "assistant": [_user(_ASK), message],
                "tool": [_user(_ASK), calling, {**message, "tool_call_id": _CALL["id"]}],
            }
            around = conversations.get(role, [message, _user(_ASK)])
            shown = self._render(around, answered=role == "assistant")
            text = "" if shown is None else shown.text
            # A list that is written as Python or JSON writes it was not read as parts.
            listed = any(f"{quote}text{quote}" in text for quote in "'\"")
            self._taken[role, form] = all(said in text for said in texts) and not listed
        return self._taken[role, form]

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes tools: their names may stand in it by chance."""
        tool = {"type": "function", "function": {**_TOOL, "name": _MORE}}
        shown = self._render([_user(_ASK)], answered=False, tools=[tool])
        return shown is None or _MORE in shown.text

    def writes_calls(self, number: int, *, beside: bool) -> bool:
        """Whether the template writes so many calls, and the text beside them if there is any."""
        kind = min(number, 2), beside
        if kind not in self._written:
            calls = [
                {**_CALL, "function": {"name": name, "arguments": {_ASK: name}}}
                for name in (_MORE, _THINK)[: kind[0]]
            ]
            answer = {"role": "assistant", "content": _SAY if beside else "", "tool_calls": calls}
            shown = self._render([_user(_ASK), answer], answered=True)
            words = [_MORE, _THINK][: kind[0]] + [_SAY] * beside
            self._written[kind] = shown is None or all(word in shown.text for word in words)
        return self._written[kind]

    @cached_property
    def _reasoning_key(self) -> str | None:
        return next((key for key in REASONING_KEYS if self._thought(key)), None)

    @property
    def takes_reasoning(self) -> bool:
        """Whether the template writes the reasoning of an answer."""
        return self._reasoning_key is not None

    @cached_property
    def end_of_thought(self) -> str:
        """What the template writes between reasoning and answer; it shows that there is some."""
        return self._thought(self._reasoning_key) if self._reasoning_key else END_OF_THOUGHT

    def _thought(self, key: str) -> str:
        """What the template writes between the reasoning of a key and the answer, if it does."""
        answer = {"role": "assistant", "content": _SAY, key: _THINK}
        shown = self._render([_user(_ASK), answer], answered=True)
        _, found, after = ("", "", "") if shown is None else shown.text.partition(_THINK)
        return after.partition(_SAY)[0].strip() if found else ""

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        answered: bool,
        tools: Any = None,
        arguments: Mapping[str, Any] | None = None,
        at: float | None = 0.0,
    ) -> Rendered | None:
        """Render as ``apply_chat_template`` does, which has no way to pass a clock.

        The spans come from the same function as in transformers. The token mask that the latter
        makes of them is lost where a token begins with white space.
        """
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils

        jinja: Any = chat_template_utils
        compiled: Any = jinja._compile_jinja_template(self.template)
        given = {**self._special, **(arguments or {}), "messages": list(messages), "tools": tools}
        try:
            values = jinja._plain_template_data(given)  # a template is a stranger's code
            values |= {"documents": None, "add_generation_prompt": not answered, _CLOCK: _clock(at)}
            if answered and _GENERATION.search(self.template):
                return Rendered(*jinja._render_with_assistant_indices(compiled, **values))
            return Rendered(compiled.render(**values))
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ):  # what a template does to a message that it was not written for
            return None


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _tools(prompt: Prompt) -> Any:
    return [dict(tool) for tool in prompt.tools] or None


def _clock(at: float | None) -> Any:
    now = datetime.now(timezone.utc)
    return (now if at is None else datetime.fromtimestamp(at, timezone.utc)).strftime
