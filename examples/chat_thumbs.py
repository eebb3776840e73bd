"""A console chat that learns: each answer is recorded, and `+`, `-` or `= TEXT` judge the last one.

    python examples/chat_thumbs.py [HOME]

In your app, call :class:`agentpref.Chat` from your own buttons. `agentpref update --model tiny`
trains on what was said here.
"""

from __future__ import annotations

import sys

import agentpref
from agentpref_adapters.transformers import open_router

MODEL = "tiny"
HELP = "Ask something. Then: + good, - bad, = TEXT how it should have been. An empty line leaves."


def main(home: str = "./.agentpref") -> None:
    """Chat until an empty line."""
    with agentpref.Log(home) as log, open_router(home, model=MODEL) as router:
        chat = agentpref.Chat(log, router, model=MODEL)
        last = None
        print(HELP)
        for line in map(str.strip, iter(sys.stdin.readline, "")):
            if not line:
                break
            if line not in ("+", "-") and not line.startswith("= "):
                last = chat.reply([{"role": "user", "content": line}], thread_id="console")
                print(last.text or last.message["tool_calls"])
            elif last is None:
                print("nothing to judge yet")
            elif line.startswith("= "):
                chat.correct(last.run_id, line.removeprefix("= "))
                print("noted, thank you")
            else:
                chat.thumbs(last.run_id, up=line == "+")
                print("noted")


if __name__ == "__main__":
    main(*sys.argv[1:])
