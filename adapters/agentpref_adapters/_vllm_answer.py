"""An answer of vLLM's while it comes in, from pieces of token ids to text and to the reply.

Decoding is our own, as it is where a model is served inside the process, so that both engines give
the same text for the same tokens. Knows nothing of servers.
"""

from __future__ import annotations

import math

from agentpref.errors import GenerationFailed, ServerUnreachable
from agentpref.models.text_stream import TextStream
from agentpref.models.tool_calls import assistant_message
from agentpref.serve.backend import Reply
from agentpref_adapters._vllm_server import Piece


class Answer:
    """One answer while it comes in.

    Args:
        revision: who writes it.
        turn: the number of messages before it.
        text: makes text of its tokens.
        ends: the tokens that end a turn, which are no text.
    """

    def __init__(self, revision: str, turn: int, text: TextStream, ends: frozenset[int]) -> None:
        """Begin with nothing."""
        self._revision, self._turn, self._text, self._ends = revision, turn, text, ends
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._piece = Piece((), (), None)

    def take(self, piece: Piece) -> str:
        """Add a piece; return the text that became certain by it."""
        if not finite(piece):
            raise GenerationFailed(
                f"{self._revision} gave logprobs of {list(piece.logprobs)}; roll it back"
            )
        self._piece = piece
        self._tokens += piece.token_ids
        self._logprobs += [value for value in piece.logprobs if value is not None]
        return self._text.push(*(token for token in piece.token_ids if token not in self._ends))

    def rest(self) -> str:
        """The text that was held back."""
        return self._text.finish()

    def reply(self) -> Reply:
        """The whole answer."""
        self.rest()
        if self._piece.finish_reason is None:
            raise ServerUnreachable(f"{self._revision} was broken off; ask again")
        return Reply(
            revision=self._revision,
            message=assistant_message(self._text.text, turn=self._turn),
            token_ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            finish_reason=self._piece.finish_reason,
        )


def finite(piece: Piece) -> bool:
    """Whether there is one log-probability for each token, and each is a number."""
    return len(piece.logprobs) == len(piece.token_ids) and all(
        value is not None and math.isfinite(value) for value in piece.logprobs
    )
