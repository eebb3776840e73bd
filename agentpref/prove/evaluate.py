"""Evidence from models: how far a candidate moved, and what it writes.

Measures and does not judge. Which prompts and pairs are asked about is the caller's choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentpref.learn.adapter import Policy
from agentpref.learn.encode import Encoded, EncodedPair, Ids, encode_prompt
from agentpref.learn.learner import Learner
from agentpref.prove.gate import Generations
from agentpref.prove.metrics import distinct_n
from agentpref.types import Message, Prompt

if TYPE_CHECKING:
    from torch import Tensor

FEWEST_TOKENS, MOST_TOKENS = 64, 256
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def kl_from_base(learner: Learner, rows: Sequence[Encoded]) -> float:
    """KL(π_0 ‖ π_θ) in nats per completion token, exact at each token of ``rows``.

    The mean over completions of each one's mean over its tokens, as in training: both answers of a
    pair, and the one of a thumb that was given to its prompt.
    """
    found = learner.divergences(rows)
    answers = [
        kl
        for row, kls in zip(rows, found, strict=True)
        for kl in (kls if isinstance(row, EncodedPair) else kls[:1])
    ]
    return sum(answers) / len(answers)


def token_limit(rows: Sequence[Encoded]) -> int:
    """How long an answer may be before it counts as endless: twice the longest that was logged."""
    longest = max(len(ids) for row in rows for ids in row.completions)
    return min(MOST_TOKENS, max(FEWEST_TOKENS, 2 * longest))


def generations(
    learner: Learner, policy: Policy, prompts: Sequence[Ids], *, limit: int
) -> Generations:
    """What a policy writes, greedily and at most ``limit`` tokens of it, on probe prompts.

    These come as the tokens of encoded rows, so that none is longer than those trained on.
    """
    tokenizer = learner.base.tokenizer
    answers, finite = _answer(learner, policy, prompts, limit)
    texts = [_text(learner, ids) for ids in answers]
    return Generations(
        distinct_2=distinct_n(answers, 2),
        mean_length=sum(map(len, answers)) / len(answers),
        empty=sum(not text.strip() for text in texts),
        endless=sum(tokenizer.eos_token_id not in answer for answer in answers),
        tool_parse=_parse_rate(texts),
        finite=finite,
    )


def answer(learner: Learner, messages: Sequence[Message]) -> str:
    """The candidate's greedy answer to a list of messages, as text."""
    asked = encode_prompt(Prompt("", tuple(messages)), learner.base.tokenizer)
    ((ids,), _) = _answer(learner, "candidate", [asked], MOST_TOKENS)
    return _text(learner, ids)


def _text(learner: Learner, ids: Ids) -> str:
    return str(learner.base.tokenizer.decode(list(ids), skip_special_tokens=True))


def _answer(
    learner: Learner, policy: Policy, asked: Sequence[Ids], limit: int
) -> tuple[list[Ids], bool]:
    """Token ids of each answer up to its end of turn, and whether all logits were finite."""
    import torch

    width = max(map(len, asked))
    ids = torch.tensor([[learner.pad] * (width - len(row)) + list(row) for row in asked])
    mask = torch.arange(width) >= torch.tensor([[width - len(row)] for row in asked])
    with torch.no_grad(), learner.speaking_as(policy) as model:
        out: Any = model.generate(  # type: ignore[no-untyped-call]
            input_ids=ids.to(model.device),
            attention_mask=mask.long().to(model.device),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=learner.pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
    finite = all(bool(torch.isfinite(step).all()) for step in out.logits)
    end = learner.base.tokenizer.eos_token_id
    return [_until(row, end) for row in _rows(out.sequences, width)], finite


def _rows(sequences: Tensor, width: int) -> list[list[int]]:
    rows: list[list[int]] = sequences[:, width:].tolist()
    return rows


def _until(row: list[int], end: Any) -> Ids:
    return tuple(row[: row.index(end) + 1] if end in row else row)


def _parse_rate(texts: Sequence[str]) -> float | None:
    """Share of the tool calls written that are JSON; ``None`` where none was written."""
    calls = [body for text in texts for body in _TOOL_CALL.findall(text)]
    return sum(map(_is_object, calls)) / len(calls) if calls else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
