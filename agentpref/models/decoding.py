"""How a base decodes: what ends its answers, how long they may be, and what they say.

The evaluation, the user's checks and both serving backends decode by this value, so what is proven
is what is served. Of a base's own generation settings only the end tokens are read. Penalties,
minimum lengths, stop strings, forced tokens and the like are defaults for chat programs. They would
change what a policy writes, and every engine applies others of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.errors import GenerationFailed, UnsupportedModel
from agentpref.home import reading
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agentpref.models.base import BaseModel

_GENERATION, _CONFIG = "generation_config.json", "config.json"


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the answers of one base end, how long they may be, and how they read as text.

    Each of ``end_tokens`` ends an answer, and is its last token. ``positions`` is how many tokens a
    prompt and its answer may have together (``None``: any number). ``pad`` fills rows up where a
    mask hides it.
    """

    tokenizer: PreTrainedTokenizerBase
    end_tokens: frozenset[int]
    positions: int | None = None

    @classmethod
    def of(cls, base: BaseModel) -> Decoding:
        """The decoding of a loaded base; raises as :meth:`read` does."""
        return cls.read(base.template, base.path, base.positions)

    @classmethod
    def read(cls, template: ChatTemplate, folder: Path, positions: int | None = None) -> Decoding:
        """The decoding of a base from its chat template and its folder, without torch.

        An answer ends with the tokenizer's end token, with any of those that the base's generation
        settings list, or with the token that the chat template writes after an assistant's turn.

        Raises:
            UnsupportedModel: a file of the folder is damaged, or its end tokens are no token ids.
        """
        tokenizer = template.tokenizer
        ends = {tokenizer.eos_token_id, *_configured_ends(folder), template.turn_end}
        return cls(tokenizer, frozenset(int(e) for e in ends if e is not None), positions)

    @property
    def pad(self) -> int:
        """The token that fills rows up; masks hide it everywhere."""
        return int(self.tokenizer.pad_token_id or 0)

    def room(self, prompt: Ids, limit: int) -> int:
        """How many tokens an answer to a prompt may have: ``limit``, or as many as there is room.

        Raises:
            GenerationFailed: there is room for none.
        """
        if self.positions is None:
            return limit
        if len(prompt) >= self.positions:
            raise GenerationFailed(
                f"the prompt has {len(prompt)} tokens, the model takes {self.positions}; shorten it"
            )
        return min(limit, self.positions - len(prompt))

    def decode(self, tokens: Sequence[int], *, whole: bool = False) -> str:
        """Token ids as text; special tokens are left out, unless it is to be ``whole``."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=not whole))

    def text(self, answer: Sequence[int]) -> str:
        """What an answer says, tool calls included: the text that servers send."""
        return self.decode([token for token in answer if token not in self.end_tokens])


def _configured_ends(folder: Path) -> Sequence[int]:
    """The end tokens in a base's generation settings; in its configuration, where it has none.

    Transformers and vLLM read the same two files in this order.
    """
    settings = _read_object(folder / _GENERATION)
    file = _CONFIG if settings is None else _GENERATION
    if settings is None:
        settings = _read_object(folder / _CONFIG) or {}
        text: Any = settings.get("text_config")
        if settings.get("eos_token_id") is None and isinstance(text, Mapping):
            settings = text
    ends: Any = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int and token >= 0 for token in ends):
        raise UnsupportedModel(
            f"eos_token_id in {folder / file} is {settings['eos_token_id']!r}; make it a token id, "
            "or a list of them"
        )
    return list[int](ends)


def _read_object(file: Path) -> Mapping[str, Any] | None:
    """A file's JSON object; ``None`` where there is no file."""
    if not file.is_file():
        return None
    try:
        with reading(file) as stream:
            value = json.loads(stream.read())
    except ValueError as error:
        raise UnsupportedModel(f"{file} is damaged ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{file} holds no JSON object; fetch the model again")
    return value
