"""Which tokens are the prompt's, and which are the assistant's own.

A *question* is a prompt with the answers to it that are to be trained on. Its prompt is what a
model is given when it is to answer; its answers are the tokens that a model writes then, up to the
one that ends its turn, and nothing else of the conversation: earlier turns of the assistant, tool
results and what a template writes after the turn are never trained.

*Logged tokens* are used as they are, since the same text can be written in other tokens. One that
does not end its turn was cut off, and is not taught to stop. They must be the model's own: every id
is of the tokenizer's vocabulary, and they decode to the answer's text (special tokens and white
space apart, which engines trim). Otherwise the text is tokenised, and that is counted.

*Text* is found by its place: the template renders prompt and answer, the first part is what it
renders of the prompt alone, and the rest is the answer. A template that says with
``{% generation %}`` which tokens are the assistant's must say the same. Nothing hangs on what the
text says, so that a message that spells ``<|im_end|>`` moves no boundary.

A prompt that comes more than once is rendered and tokenised once, and all texts are tokenised
together. That takes a third of a millisecond for a short pair, and two microseconds for each token
of a long prompt, so no tokens are kept for another night: they would be one more copy of what users
said, for ``forget`` to find.

Knows nothing of pairs, thumbs and models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from agentpref.models import template as render
from agentpref.models.template import Told
from agentpref.record.messages import kept
from agentpref.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids: TypeAlias = "tuple[int, ...]"


class Answer(NamedTuple):
    """An assistant's message, and its tokens as the engine wrote them, where they were logged."""

    message: Message
    logged: Ids | None = None


class Question(NamedTuple):
    """A prompt, and the answers to it that are to be trained on."""

    prompt: Prompt
    answers: tuple[Answer, ...]


class Tokens(NamedTuple):
    """A question as token ids.

    ``shortened`` says that old turns of the prompt were dropped; ``retokenised`` says why logged
    tokens were not used: ``foreign_token_ids`` or ``ids_disagree``.
    """

    prompt: Ids
    answers: tuple[Ids, ...]
    shortened: bool
    retokenised: frozenset[str]


class _Asked(NamedTuple):
    """A prompt as text and as tokens; ``tail`` is the text from its last special token on.

    Special tokens are cut out before anything is tokenised, so that what stands after one is
    tokenised as it would be after all that stands before it.
    """

    text: str
    ids: Ids
    tail: str
    tail_ids: Ids


class _Written(NamedTuple):
    """The text of an answer, as its template writes it after a prompt."""

    asked: _Asked
    text: str


class Tokeniser:
    """Turns questions into token ids, prompt and longest answer at most ``max_length`` together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._vocabulary, self._end = len(tokenizer), tokenizer.eos_token_id
        added = [(id_, t.content) for id_, t in tokenizer.added_tokens_decoder.items() if t.special]
        self._special = frozenset(tokenizer.all_special_ids).union(id_ for id_, _ in added)
        self._spelt = [text for _, text in added if text]

    def __call__(self, questions: Sequence[Question]) -> list[Tokens | str]:
        """Encode every question; the reason, for one that cannot be encoded faithfully."""
        asked = self._asked([question.prompt for question in questions])
        written = iter(self._written(questions, asked))
        return [
            self._put_together(question, start, [next(written) for _ in question.answers])
            for question, start in zip(questions, asked, strict=True)
        ]

    def _put_together(
        self, question: Question, asked: _Asked | None, written: Sequence[Ids | str]
    ) -> Tokens | str:
        if asked is None:
            return "template_refuses"
        chosen = [self._choose(*each) for each in zip(question.answers, written, strict=True)]
        sides: list[Ids] = []
        for ids, _ in chosen:
            if isinstance(ids, str):
                return ids
            sides.append(ids)
        if not all(sides):
            return "empty_completion"
        room = self._max_length - max(map(len, sides))
        prompt = asked.ids if len(asked.ids) <= room else self._shortened(question.prompt, room)
        if prompt is None:
            return "too_long"
        objections = frozenset(why for _, why in chosen if why)
        return Tokens(prompt, tuple(sides), prompt is not asked.ids, objections)

    def _asked(self, prompts: Iterable[Prompt]) -> list[_Asked | None]:
        """Each prompt as text and tokens; ``None`` for one that the template refuses."""
        order, distinct = _numbered(prompts)
        texts = [render.asked(self._tokenizer, prompt) for prompt in distinct]
        whole = self._ids({text for text in texts if text is not None})
        tails = {text: text[self._last_special(text) :] for text in whole}
        ends = self._ids(set(tails.values()))
        found = [
            None if text is None else _Asked(text, whole[text], tails[text], ends[tails[text]])
            for text in texts
        ]
        return [found[number] for number in order]

    def _last_special(self, text: str) -> int:
        return max([0, *(text.rfind(token) for token in self._spelt)])

    def _shortened(self, prompt: Prompt, room: int) -> Ids | None:
        """The prompt without as few of its oldest turns as give it room; ``None`` if none do."""
        prompts = render.shorter(prompt)
        fitting: dict[int, Ids] = {}

        def fits(number: int) -> bool:
            (asked,) = self._asked([prompts[number]])
            if asked is not None and len(asked.ids) <= room:
                fitting[number] = asked.ids
            return number in fitting

        return fitting.get(bisect_left(range(len(prompts)), True, key=fits))

    def _written(
        self, questions: Sequence[Question], asked: Sequence[_Asked | None]
    ) -> list[Ids | str]:
        """Every answer's tokens as its text gives them, or why it gives none."""
        told = [
            self._told(question.prompt, answer.message, start)
            for question, start in zip(questions, asked, strict=True)
            for answer in question.answers
        ]
        found = [each for each in told if isinstance(each, _Written)]
        ids = self._ids({each.asked.tail + each.text for each in found})
        return [each if isinstance(each, str) else self._completion(each, ids) for each in told]

    def _told(self, prompt: Prompt, message: Message, asked: _Asked | None) -> _Written | str:
        """The text of an answer, or why no text is surely the answer's."""
        words = kept(message).decode()
        if any(token in words for token in self._spelt):
            return "special_token_inside"
        told = None if asked is None else render.told(self._tokenizer, prompt, message)
        if told is None or asked is None:
            return "template_refuses"
        if not told.text.startswith(asked.text):
            return "template_rewrites_prompt"
        if not self._is_marked(told, len(asked.text)):
            return "template_marks_elsewhere"
        return _Written(asked, told.text[len(asked.text) :])

    def _is_marked(self, told: Told, start: int) -> bool:
        """Say whether a template that marks the assistant's text marks all of it from ``start``.

        White space and the special tokens that end the turn may stand outside.
        """
        if told.spans is None:
            return True
        for begin, end in told.spans:
            if begin <= start <= end:
                start = end
        rest = told.text[start:]
        for token in self._spelt:
            rest = rest.replace(token, "")
        return not rest.strip()

    def _completion(self, answer: _Written, ids: Mapping[str, Ids]) -> Ids:
        """The tokens after the prompt's, up to the end of the turn.

        Where one token would span both, the answer is tokenised apart, as it is when a model goes
        on from the prompt's tokens.
        """
        asked = answer.asked
        both = ids[asked.tail + answer.text]
        if both[: len(asked.tail_ids)] != asked.tail_ids:
            return self._until_end_of_turn(self._ids([answer.text])[answer.text])
        return self._until_end_of_turn(both[len(asked.tail_ids) :])

    def _until_end_of_turn(self, ids: Ids) -> Ids:
        """Cut what a template writes after the turn's end, which no model is asked to generate."""
        ends = [i for i, token in enumerate(ids) if token == self._end]
        if ends:
            return ids[: ends[-1] + 1]
        special = [i for i, token in enumerate(ids) if token in self._special]
        if special and not self._words(ids[special[-1] + 1 :]):
            return ids[: special[-1] + 1]
        return ids

    def _choose(self, answer: Answer, text: Ids | str) -> tuple[Ids | str, str | None]:
        """The logged tokens; where they cannot be used, those of the text, and why."""
        if not answer.logged:
            return text, None
        if not all(0 <= token < self._vocabulary for token in answer.logged):
            return text, "foreign_token_ids"
        if answer.logged != text and not self._agree(answer.logged, answer.message, text):
            return text, "ids_disagree"
        return answer.logged, None

    def _agree(self, logged: Ids, message: Message, text: Ids | str) -> bool:
        """Say whether logged tokens decode to the words that the message shows or is rendered as.

        Of a message with tool calls the rendering alone is whole: its content leaves them out.
        """
        words = self._words(logged)
        if not isinstance(text, str) and words == self._words(text):
            return True
        content = message.get("content")
        shown = isinstance(content, str) and not message.get("tool_calls")
        return shown and words == _squeezed(str(content))

    def _words(self, ids: Ids) -> str:
        """What tokens say, without special tokens and white space."""
        plain = [token for token in ids if token not in self._special]
        return _squeezed(str(self._tokenizer.decode(plain, clean_up_tokenization_spaces=False)))

    def _ids(self, texts: Collection[str]) -> dict[str, Ids]:
        """Texts as tokens, all in one call."""
        if not texts:
            return {}
        rows: Any = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return {text: tuple(row) for text, row in zip(texts, rows, strict=True)}


def _numbered(prompts: Iterable[Prompt]) -> tuple[list[int], list[Prompt]]:
    """Which of the distinct prompts each one is, and the distinct prompts."""
    distinct: list[Prompt] = []
    numbers: dict[str, list[int]] = {}
    order: list[int] = []
    for prompt in prompts:
        alike = numbers.setdefault(prompt.id, [])
        number = next((n for n in alike if distinct[n] == prompt), len(distinct))
        if number == len(distinct):
            distinct.append(prompt)
            alike.append(number)
        order.append(number)
    return order, distinct


def _squeezed(text: str) -> str:
    return "".join(text.split())


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, configured: int | Sequence[int] | None
) -> frozenset[int]:
    """The tokens that end a turn: the tokenizer's, and those of the model's generation settings.

    Args:
        tokenizer: its ``eos_token_id`` ends a turn.
        configured: ``eos_token_id`` of the generation settings, which may be a list.
    """
    ids = configured if isinstance(configured, Sequence) else [configured]
    return frozenset(int(token) for token in (tokenizer.eos_token_id, *ids) if token is not None)
