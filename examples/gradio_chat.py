"""A web chat in Gradio that learns: thumbs, edited answers and retries are recorded.

    pip install 'agentpref[gradio,train]'
    python examples/gradio_chat.py [HOME]

`agentpref update --model tiny` trains on what was said here, and the chat then answers with the new
revision.
"""

from __future__ import annotations

import sys

import agentpref
from agentpref_adapters.gradio import chat_interface
from agentpref_adapters.transformers import open_router

MODEL = "tiny"
SAMPLING = {"temperature": 0.7}  # at 0, a retry would give the same answer again


def main(home: str = "./.agentpref") -> None:
    """Serve the chat until Ctrl-C."""
    with agentpref.Log(home) as log, open_router(home, model=MODEL) as router:
        chat = agentpref.Chat(log, router, model=MODEL)
        chat_interface(chat, title="A chat that learns", sampling=SAMPLING).launch()


if __name__ == "__main__":
    main(*sys.argv[1:])
