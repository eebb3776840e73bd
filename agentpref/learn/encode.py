"""From pairs to token ids: the prompt once, then the two completions.

Prompt and completions are tokenised apart, as they are when the model generates; only the
assistant's own tokens, up to the token that ends its turn, are ever trained. A pair that cannot be
encoded faithfully is left out and counted by reason. Knows nothing of models and padding.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentpref.types import Message, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair and the token ids of its prompt and of its two completions."""

    pair: Pair
    prompt: Ids
    chosen: Ids
    rejected: Ids

    @property
    def completions(self) -> tuple[Ids, Ids]:
        """Token ids of the chosen answer, then of the rejected one."""
        return self.chosen, self.rejected

    @property
    def width(self) -> int:
        """Tokens that the pair costs when prompt and completions stand in one row."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


Encoded = EncodedPair


def sequence_key(prompt: Ids, completion: Ids) -> str:
    """Content address of one completion after one prompt, as token ids; caches are keyed by it."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt, completion):
        digest.update(len(ids).to_bytes(4, "little") + array("I", ids).tobytes())
    return digest.hexdigest()


def encode_pairs(
    pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[EncodedPair], Counter[str]]:
    """Encode pairs; return them with a count, by reason, of those left out.

    Reasons: ``template_rewrites_prompt`` (the chat template renders the prompt differently once an
    answer follows, so that no token can be called the answer's), ``empty_completion``,
    ``too_long`` (prompt and longer completion exceed ``max_length`` tokens; nothing is ever cut),
    and ``same_tokens``.
    """
    encoded: list[EncodedPair] = []
    left_out: Counter[str] = Counter()
    for pair in pairs:
        result = _encode(pair, tokenizer, max_length)
        if isinstance(result, str):
            left_out[result] += 1
        else:
            encoded.append(result)
    return encoded, left_out


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The token ids that a model is given when it is to answer."""
    return _tokens(_render(tokenizer, prompt, ()), tokenizer)


def _encode(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedPair | str:
    asked = _render(tokenizer, pair.prompt, ())
    prompt = _tokens(asked, tokenizer)
    sides: list[Ids] = []
    for answer in (pair.chosen, pair.rejected):
        told = _render(tokenizer, pair.prompt, (answer,))
        if not told.startswith(asked):
            return "template_rewrites_prompt"
        sides.append(_until_end_of_turn(_tokens(told[len(asked) :], tokenizer), tokenizer))
    chosen, rejected = sides
    if not chosen or not rejected:
        return "empty_completion"
    if chosen == rejected:
        return "same_tokens"
    if len(prompt) + max(len(chosen), len(rejected)) > max_length:
        return "too_long"
    return EncodedPair(pair, prompt, chosen, rejected)


def _render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answers: Sequence[Message]) -> str:
    conversation: list[Any] = [_turn(message) for message in (*prompt.messages, *answers)]
    tools: Any = [dict(tool) for tool in prompt.tools] or None
    text = tokenizer.apply_chat_template(
        conversation, tools=tools, tokenize=False, add_generation_prompt=not answers
    )
    return str(text)


def _turn(message: Message) -> dict[str, Any]:
    """A message as chat templates take it, who differ from OpenAI's shape in two points.

    They join the content to other text, so that an assistant's ``None`` raises or comes out as
    "None"; and they write arguments with ``tojson``, which quotes JSON text a second time.
    """
    turn = dict(message)
    if turn["role"] == "assistant" and turn.get("content") is None:
        turn["content"] = ""
    if isinstance(turn.get("tool_calls"), (list, tuple)):
        turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
    return turn


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": _arguments(function["arguments"])}}


def _arguments(text: str) -> dict[str, Any] | str:
    """Parse arguments; what is no JSON object stays as the model wrote it."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _until_end_of_turn(ids: Ids, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Cut what a template writes after the turn's end, which no model is asked to generate."""
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return ids[: ends[-1] + 1] if ends else ids
