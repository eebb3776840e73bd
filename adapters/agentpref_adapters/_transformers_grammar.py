"""Holds an answer to a grammar while it is generated, with llguidance.

A :class:`Constraint` follows one answer. It says before each token which ones may come next, and
is told which one came. Where the grammar is fulfilled, the base's end tokens may come.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from agentpref.errors import GenerationFailed
from agentpref.models.base import BaseModel
from agentpref.models.decoding import Decoding
from agentpref.models.grammar import AnswerGrammars
from agentpref.serve.backend import GenerationRequest, write_grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from torch import Tensor


class Constraint:
    """Which tokens may continue one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allow(self, logits: Tensor) -> Tensor:
        """A copy of one row of logits, in which tokens that may not come are -inf."""
        import torch

        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        forbidden = torch.ones_like(logits, dtype=torch.bool)  # of a padded row, all further ones
        wide = min(len(allowed), len(logits))
        forbidden[:wide] = (allowed[:wide] == 0).to(logits.device)
        self._require_sound()
        return logits.masked_fill(forbidden, -torch.inf)

    def take(self, token: int) -> None:
        """Go on after a token.

        Raises:
            GenerationFailed: the grammar does not allow it, or is too complex to follow.
        """
        self._matcher.consume_token(token)
        self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise GenerationFailed(
                f"the grammar of the answer cannot be followed: {self._matcher.get_error()[:300]}; "
                "make its schema simpler"
            )


class Constraints:
    """Makes the constraints of one base's answers. Its tokenizer is read when first needed."""

    def __init__(self, base: BaseModel, decoding: Decoding) -> None:
        self._base, self._decoding = base, decoding
        self._grammars = AnswerGrammars(base.template)
        self._reading = threading.Lock()
        self._tokenizer: Any = None

    def of(self, request: GenerationRequest) -> Constraint | None:
        """The constraint of a request; ``None`` if the answer may be anything.

        Raises:
            ConfigError, GenerationFailed, MissingDependency: as
                :func:`~agentpref.serve.backend.write_grammar`.
        """
        grammar = write_grammar(request, self._grammars, self._base.name)
        if grammar is None:
            return None
        from llguidance import LLMatcher

        constraint = Constraint(LLMatcher(self._vocabulary(), grammar, log_level=0))
        constraint._require_sound()
        return constraint

    def _vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._reading:
            if self._tokenizer is None:
                tokenizer: Any = self._base.tokenizer
                size = max(self._base.embedded, len(tokenizer))
                ends = sorted(self._decoding.end_tokens)
                try:
                    self._tokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)
                except ValueError as error:
                    raise GenerationFailed(
                        f"the tokenizer of {self._base.name!r} cannot be held to a grammar "
                        f"({error}); use a model with a tokenizer.json"
                    ) from error
            return self._tokenizer
