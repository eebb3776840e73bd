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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from agentpref.models import template
from agentpref.record.messages import kept
from agentpref.types import Completion, Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The token ids that a model is given when it is to answer.

    Raises:
        jinja2.TemplateError: the chat template refuses the prompt.
    """
    rendered = template.render(tokenizer, prompt)
    return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])


class ExampleTokenizer:
    """Tokenizes examples; a prompt and its longest completion fit into ``max_length`` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._vocabulary, self._end = len(tokenizer), tokenizer.eos_token_id
        added = [(id_, t.content) for id_, t in tokenizer.added_tokens_decoder.items() if t.special]
        self._special_ids = frozenset(tokenizer.all_special_ids).union(id_ for id_, _ in added)
        self._special_texts = [text for _, text in added if text]

    def __call__(self, examples: Sequence[Example]) -> list[TokenizedExample | str]:
        """Tokenize every example; the reason, for one that cannot be tokenized faithfully."""
        prompts = self._rendered_prompts([example.prompt for example in examples])
        texts = iter(self._text_ids(examples, prompts))
        return [
            self._assemble(example, prompt, [next(texts) for _ in example.completions])
            for example, prompt in zip(examples, prompts, strict=True)
        ]

    def _assemble(
        self, example: Example, prompt: _RenderedPrompt | None, texts: Sequence[Ids | str]
    ) -> TokenizedExample | str:
        if prompt is None:
            return "template_refuses"
        completions: list[Ids] = []
        masks: list[Mask | None] = []
        retokenized: set[str] = set()
        for completion, text in zip(example.completions, texts, strict=True):
            ids, objection = self._choose(completion, text)
            if isinstance(ids, str):
                return ids
            mask = completion.loss_mask
            if not ids:
                return "empty_completion"
            if mask is not None and (ids != completion.token_ids or len(mask) != len(ids)):
                return "loss_mask_does_not_fit"
            if mask is not None and not any(mask):
                return "empty_loss_mask"
            completions.append(ids)
            masks.append(mask)
            retokenized.update([objection] if objection else [])
        room = self._max_length - max(map(len, completions))
        asked = prompt.ids if len(prompt.ids) <= room else self.shortened(example.prompt, room)
        if asked is None:
            return "too_long"
        return TokenizedExample(
            asked,
            tuple(completions),
            tuple(masks),
            shortened=asked is not prompt.ids,
            retokenized=frozenset(retokenized),
        )

    def _rendered_prompts(self, prompts: Iterable[Prompt]) -> list[_RenderedPrompt | None]:
        """Each prompt as text and tokens; ``None`` for one that the template refuses."""
        order, distinct = _numbered(prompts)
        texts = [template.render_or_none(self._tokenizer, prompt) for prompt in distinct]
        whole = self._tokenize({text for text in texts if text is not None})
        tails = {text: text[self._last_special(text) :] for text in whole}
        tail_ids = self._tokenize(set(tails.values()))
        found = [
            None
            if text is None
            else _RenderedPrompt(text, whole[text], tails[text], tail_ids[tails[text]])
            for text in texts
        ]
        return [found[number] for number in order]

    def _last_special(self, text: str) -> int:
        return max([0, *(text.rfind(token) for token in self._special_texts)])

    def shortened(self, prompt: Prompt, room: int) -> Ids | None:
        """The prompt without as few of its oldest turns as fit into the room; ``None`` if none."""
        prompts = template.shorter(prompt)
        fitting: dict[int, Ids] = {}

        def fits(number: int) -> bool:
            (rendered,) = self._rendered_prompts([prompts[number]])
            if rendered is not None and len(rendered.ids) <= room:
                fitting[number] = rendered.ids
            return number in fitting

        return fitting.get(bisect_left(range(len(prompts)), True, key=fits))

    def _text_ids(
        self, examples: Sequence[Example], prompts: Sequence[_RenderedPrompt | None]
    ) -> list[Ids | str]:
        """The tokens of every completion's text, or the reason why there are none."""
        rendered = [
            self._rendered(example.prompt, completion.message, prompt)
            for example, prompt in zip(examples, prompts, strict=True)
            for completion in example.completions
        ]
        written = [each for each in rendered if isinstance(each, _RenderedCompletion)]
        ids = self._tokenize({each.prompt.tail + each.text for each in written})
        return [
            each if isinstance(each, str) else self._completion_ids(each, ids) for each in rendered
        ]

    def _rendered(
        self, prompt: Prompt, message: Message, asked: _RenderedPrompt | None
    ) -> _RenderedCompletion | str:
        """The text of a completion, or the reason why its boundary is not certain."""
        spelled = kept(message).decode()
        if any(token in spelled for token in self._special_texts):
            return "special_token_inside"
        whole = None
        if asked is not None:
            whole = template.render_with_completion(self._tokenizer, prompt, message)
        if whole is None or asked is None:
            return "template_refuses"
        if not whole.text.startswith(asked.text):
            return "template_rewrites_prompt"
        if not self._is_marked(whole, len(asked.text)):
            return "template_marks_elsewhere"
        return _RenderedCompletion(asked, whole.text[len(asked.text) :])

    def _is_marked(self, whole: template.Rendered, start: int) -> bool:
        """Whether a template that marks the assistant's text marks all of it from ``start``.

        White space and the special tokens that end the turn may stand outside.
        """
        if whole.spans is None:
            return True
        for begin, end in whole.spans:
            if begin <= start <= end:
                start = end
        rest = whole.text[start:]
        for token in self._special_texts:
            rest = rest.replace(token, "")
        return not rest.strip()

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
        ends = [i for i, token in enumerate(ids) if token == self._end]
        if ends:
            return ids[: ends[-1] + 1]
        special = [i for i, token in enumerate(ids) if token in self._special_ids]
        if special and not self._plain_text(ids[special[-1] + 1 :]):
            return ids[: special[-1] + 1]
        return ids

    def _choose(self, completion: Completion, text: Ids | str) -> tuple[Ids | str, str | None]:
        """The logged tokens; where they cannot be used, those of the text, and the reason."""
        logged = completion.token_ids
        if not logged:
            return text, None
        if not all(0 <= token < self._vocabulary for token in logged):
            return text, "foreign_token_ids"
        if logged != text and not self._agree(logged, completion.message, text):
            return text, "ids_disagree"
        return logged, None

    def _agree(self, logged: Ids, message: Message, text: Ids | str) -> bool:
        """Whether logged tokens decode to the message's content, or to what the template renders.

        The content of a message with tool calls leaves the calls out, so only the rendering counts.
        """
        said = self._plain_text(logged)
        if not isinstance(text, str) and said == self._plain_text(text):
            return True
        content = message.get("content")
        shown = isinstance(content, str) and not message.get("tool_calls")
        return shown and said == _squeezed(str(content))

    def _plain_text(self, ids: Ids) -> str:
        """What tokens say, without special tokens and white space."""
        plain = [token for token in ids if token not in self._special_ids]
        return _squeezed(str(self._tokenizer.decode(plain, clean_up_tokenization_spaces=False)))

    def _tokenize(self, texts: Collection[str]) -> dict[str, Ids]:
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
