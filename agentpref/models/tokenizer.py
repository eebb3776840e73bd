"""Turns prompts and completions into token ids.

The prompt's tokens are what a model is given when it is to answer, earlier turns and tool results
included. A completion's tokens are what a model writes then, up to the one that ends its turn. Only
these are trained.

*Logged tokens* are used as they are, since the same text can be written in other tokens. A
completion that does not end its turn was cut off, and is not taught to stop. Logged tokens must be
in the tokenizer's vocabulary, and decode to the completion's text (special tokens and white space
apart, which engines trim). Otherwise the text is tokenized instead, and that is counted.

*Text* is found by its place: what the template renders after the prompt is the completion. A
template that marks the assistant's tokens with ``{% generation %}`` must mark the same ones. So a
message that spells ``<|im_end|>`` cannot move the boundary.

Each prompt is rendered and tokenized once, and all texts are tokenized in one call. Tokens are not
stored from one update to the next: they would be one more copy of users' text to forget.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from agentpref.models import fidelity
from agentpref.models.reasons import Objection
from agentpref.models.template import ChatTemplate
from agentpref.models.turns import read_turn, shorter
from agentpref.types import Completion, Example, Message, Prompt

Ids: TypeAlias = "tuple[int, ...]"
Mask: TypeAlias = "tuple[bool, ...]"


class TokenizedExample(NamedTuple):
    """The token ids of a prompt and of its completions.

    ``masks`` says of each completion which of its tokens are trained (``None``: all).
    ``shortened`` says that old turns of the prompt were dropped. ``retokenized`` holds the reasons
    why logged tokens were not used: ``foreign_token_ids`` or ``ids_disagree``.
    """

    prompt: Ids
    completions: tuple[Ids, ...]
    masks: tuple[Mask | None, ...]
    shortened: bool
    retokenized: frozenset[str]


class _RenderedPrompt(NamedTuple):
    """A prompt as text and as tokens; ``tail`` is the text from its last special token on.

    Tokenizers cut special tokens out first, so the text after one gives the same tokens with or
    without the text before it.
    """

    text: str
    ids: Ids
    tail: str
    tail_ids: Ids


class _RenderedCompletion(NamedTuple):
    """The text of a completion, as the template writes it after its prompt."""

    prompt: _RenderedPrompt
    text: str


def encode_prompt(prompt: Prompt, template: ChatTemplate, *, at: float | None = None) -> Ids:
    """The token ids that a model is given when it is to answer.

    ``at`` (POSIX seconds; ``None``: now) is what the template's clock shows.

    Raises:
        TemplateRefused: the chat template does not render the prompt, or not all of it.
    """
    rendered = template.render(prompt, at=at)
    return tuple(template.tokenizer(rendered, add_special_tokens=False)["input_ids"])


class ExampleTokenizer:
    """Tokenizes examples; a prompt and its longest completion fit into ``max_length`` tokens."""

    def __init__(self, template: ChatTemplate, max_length: int) -> None:
        self._template, self._max_length = template, max_length
        self._tokenizer = template.tokenizer
        self._vocabulary = len(self._tokenizer)
        added = self._tokenizer.added_tokens_decoder.items()
        special = {id_ for id_, token in added if token.special}
        self._special_ids = special.union(self._tokenizer.all_special_ids)

    def __call__(self, examples: Sequence[Example]) -> list[TokenizedExample | Objection]:
        """Tokenize every example; say why, for one that cannot be tokenized faithfully."""
        prompts = self._rendered_prompts([(e.prompt, e.run_at) for e in examples])
        texts = iter(self._text_ids(examples, prompts))
        return [
            self._assemble(example, prompt, [next(texts) for _ in example.completions])
            for example, prompt in zip(examples, prompts, strict=True)
        ]

    def _assemble(
        self,
        example: Example,
        prompt: _RenderedPrompt | Objection,
        texts: Sequence[Ids | Objection],
    ) -> TokenizedExample | Objection:
        if isinstance(prompt, Objection):
            return prompt
        completions: list[Ids] = []
        masks: list[Mask | None] = []
        retokenized: set[str] = set()
        for completion, text in zip(example.completions, texts, strict=True):
            ids, objection = self._choose(completion, text)
            if isinstance(ids, Objection):
                return ids
            mask = completion.loss_mask
            if not ids:
                return Objection("empty_completion", -1)
            if mask is not None and (ids != completion.token_ids or len(mask) != len(ids)):
                return Objection("loss_mask_does_not_fit", -1)
            if mask is not None and not any(mask):
                return Objection("empty_loss_mask", -1)
            completions.append(ids)
            masks.append(mask)
            retokenized.update([objection] if objection else [])
        room = self._max_length - max(map(len, completions))
        asked = prompt.ids if len(prompt.ids) <= room else self.shortened(example, room)
        if asked is None:
            return Objection("too_long")
        return TokenizedExample(
            asked,
            tuple(completions),
            tuple(masks),
            shortened=asked is not prompt.ids,
            retokenized=frozenset(retokenized),
        )

    def _rendered_prompts(
        self, asked: Iterable[tuple[Prompt, float]]
    ) -> list[_RenderedPrompt | Objection]:
        """Each prompt, asked at a time, as text and tokens; or why it cannot be written."""
        order, distinct = _numbered(asked, timed=self._template.has_clock)
        texts = [self._template.try_render(prompt, at=at) for prompt, at in distinct]
        whole = self._tokenize({text for text in texts if isinstance(text, str)})
        tails = {text: text[self._last_special(text) :] for text in whole}
        tail_ids = self._tokenize(set(tails.values()))
        found = [
            _RenderedPrompt(text, whole[text], tails[text], tail_ids[tails[text]])
            if isinstance(text, str)
            else text
            for text in texts
        ]
        return [found[number] for number in order]

    def _last_special(self, text: str) -> int:
        return max([0, *(text.rfind(token) for token in self._template.special)])

    def shortened(self, example: Example, room: int) -> Ids | None:
        """The prompt without as few of its oldest turns as fit into the room; ``None`` if none."""
        prompts = shorter(example.prompt)
        fitting: dict[int, Ids] = {}

        def fits(number: int) -> bool:
            (rendered,) = self._rendered_prompts([(prompts[number], example.run_at)])
            if isinstance(rendered, _RenderedPrompt) and len(rendered.ids) <= room:
                fitting[number] = rendered.ids
            return number in fitting

        return fitting.get(bisect_left(range(len(prompts)), True, key=fits))

    def _text_ids(
        self, examples: Sequence[Example], prompts: Sequence[_RenderedPrompt | Objection]
    ) -> list[Ids | Objection]:
        """The tokens of every completion's text, or the reason why there are none."""
        rendered = [
            self._rendered(example, completion.message, prompt)
            for example, prompt in zip(examples, prompts, strict=True)
            for completion in example.completions
        ]
        written = [each for each in rendered if isinstance(each, _RenderedCompletion)]
        ids = self._tokenize({each.prompt.tail + each.text for each in written})
        return [
            self._completion_ids(each, ids) if isinstance(each, _RenderedCompletion) else each
            for each in rendered
        ]

    def _rendered(
        self, example: Example, message: Message, asked: _RenderedPrompt | Objection
    ) -> _RenderedCompletion | Objection:
        """The text of a completion, or the reason why its boundary is not certain."""
        if isinstance(asked, Objection):
            return asked
        text = self._template.try_complete(example.prompt, asked.text, message, at=example.run_at)
        return _RenderedCompletion(asked, text) if isinstance(text, str) else text

    def _completion_ids(self, completion: _RenderedCompletion, ids: Mapping[str, Ids]) -> Ids:
        """The tokens after the prompt's, up to the end of the turn.

        Where one token would span both, the completion is tokenized by itself, as it is when a
        model continues the prompt's tokens.
        """
        prompt = completion.prompt
        both = ids[prompt.tail + completion.text]
        if both[: len(prompt.tail_ids)] != prompt.tail_ids:
            return self._until_end_of_turn(self._tokenize([completion.text])[completion.text])
        return self._until_end_of_turn(both[len(prompt.tail_ids) :])

    def _until_end_of_turn(self, ids: Ids) -> Ids:
        """Cut what a template writes after the turn's end, which a model never generates."""
        for end in (self._template.turn_end, self._tokenizer.eos_token_id):
            places = [i for i, token in enumerate(ids) if token == end]
            if places:
                return ids[: places[-1] + 1]
        special = [i for i, token in enumerate(ids) if token in self._special_ids]
        if special and not self._plain_text(ids[special[-1] + 1 :]):
            return ids[: special[-1] + 1]
        return ids

    def _choose(
        self, completion: Completion, text: Ids | Objection
    ) -> tuple[Ids | Objection, str | None]:
        """The logged tokens; where they cannot be used, those of the text, and the reason."""
        logged = completion.token_ids
        if not logged:
            return text, None
        if not all(0 <= token < self._vocabulary for token in logged):
            return text, "foreign_token_ids"
        if logged != text and not self._agree(logged, completion.message, text):
            return text, "ids_disagree"
        return logged, None

    def _agree(self, logged: Ids, message: Message, text: Ids | Objection) -> bool:
        """Whether logged tokens decode to what the template renders, or to the message's words.

        The words of a message with tool calls leave their syntax out, so only the rendering counts.
        """
        said = self._plain_text(logged)
        if not isinstance(text, Objection) and said == self._plain_text(text):
            return True
        turn = read_turn(message).with_thought_apart()
        if turn.calls or turn.foreign:
            return False
        for tag in ("<think>", "</think>") if turn.reasoning else ():
            said = said.replace(tag, "")
        return said == fidelity.squeezed(turn.reasoning + turn.text)

    def _plain_text(self, ids: Ids) -> str:
        """What tokens say, without special tokens and white space."""
        plain = [token for token in ids if token not in self._special_ids]
        text = str(self._tokenizer.decode(plain, clean_up_tokenization_spaces=False))
        return fidelity.squeezed(text)

    def _tokenize(self, texts: Collection[str]) -> dict[str, Ids]:
        if not texts:
            return {}
        rows: Any = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return {text: tuple(row) for text, row in zip(texts, rows, strict=True)}


def _numbered(
    asked: Iterable[tuple[Prompt, float]], *, timed: bool
) -> tuple[list[int], list[tuple[Prompt, float]]]:
    """Which of the distinct prompts each one is, and the distinct prompts.

    ``timed`` says whether the time at which a prompt was asked makes it another one.
    """
    distinct: list[tuple[Prompt, float]] = []
    numbers: dict[str, list[int]] = {}
    order: list[int] = []
    for prompt, at in asked:
        alike, known = numbers.setdefault(prompt.id, []), (prompt, at if timed else 0.0)
        number = next((n for n in alike if distinct[n] == known), len(distinct))
        if number == len(distinct):
            distinct.append(known)
            alike.append(number)
        order.append(number)
    return order, distinct
