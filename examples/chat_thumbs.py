"""A console chat that learns: every answer is logged, and `+`, `-` or `= TEXT` judge the last one.

    python examples/chat_thumbs.py [HOME]

Copy :class:`Chat` into your app and call its methods from your own buttons. It knows nothing of
training: `agentpref update --model tiny` does that, tonight, from what was said here.
"""

from __future__ import annotations

import sys

import agentpref
from agentpref.serve.backend import GenerationRequest
from agentpref_adapters.transformers import open_router

MODEL = "tiny"
HELP = "Ask something. Then: + good, - bad, = TEXT how it should have been. An empty line leaves."


class Chat:
    """One user's conversation with the live revision."""

    def __init__(self, log: agentpref.Log, router: agentpref.Router, thread_id: str) -> None:
        self.log, self.router, self.thread_id = log, router, thread_id
        self.last_run: str | None = None

    def ask(self, question: str) -> str:
        """Answer a question, and record who answered what."""
        messages = [{"role": "user", "content": question}]
        reply = self.router.generate(GenerationRequest(tuple(messages)), thread_id=self.thread_id)
        self.last_run = self.log.record(
            messages,
            reply.message,
            model=MODEL,
            revision=reply.revision,
            thread_id=self.thread_id,
            token_ids=reply.token_ids,
            logprobs=reply.logprobs,
        )
        return str(reply.message.get("content") or reply.message.get("tool_calls"))

    def thumbs(self, up: bool) -> str:
        """Judge the last answer."""
        if self.last_run is None:
            return "nothing to judge yet"
        self.log.feedback(self.last_run, key="thumbs", score=up)
        return "noted"

    def correct(self, text: str) -> str:
        """Say what the last answer should have been."""
        if self.last_run is None:
            return "nothing to correct yet"
        self.log.correct(self.last_run, text)
        return "noted, thank you"

    def say(self, line: str) -> str:
        """Take one line from the user, whatever it is."""
        if line in ("+", "-"):
            return self.thumbs(line == "+")
        if line.startswith("= "):
            return self.correct(line[2:])
        return self.ask(line)


def main(home: str = "./.agentpref") -> None:
    """Chat until an empty line."""
    with agentpref.Log(home) as log, open_router(home, model=MODEL) as router:
        chat = Chat(log, router, thread_id="console")
        print(HELP)
        for line in iter(sys.stdin.readline, ""):
            if not line.strip():
                break
            print(chat.say(line.strip()))


if __name__ == "__main__":
    main(*sys.argv[1:])
