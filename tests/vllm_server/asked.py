"""What the server is started with, and what it is asked."""

from __future__ import annotations

from agentpref.serve.backend import GenerationRequest

MAX_LORAS = 4
RANK = 16
EXTRA = (
    *("--enforce-eager", "--max-num-seqs", "8", "--dtype", "float32", "--max-model-len", "512"),
    *("--max-lora-rank", str(RANK)),
)

LONG = "Remember all of this, please, since I am going to ask about it later on. " * 12


def ask(question: str, **settings: object) -> GenerationRequest:
    """A request whose prompt fills several blocks before the question comes."""
    how = {"max_tokens": 24} | settings
    return GenerationRequest(messages=({"role": "user", "content": LONG + question},), **how)


QUESTIONS = ["What is the capital of France?", "When does the tide come in?", "Thank you!"]
