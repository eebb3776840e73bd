"""A chat page that learns: thumbs below an answer are recorded on the run that wrote it.

    pip install 'agentpref[chainlit,train]'
    chainlit run examples/chainlit_chat.py

The home is `./.agentpref`, or $AGENTPREF_HOME. `agentpref update --model tiny` trains on what was
said there, and the page answers with what was learned.
"""

from __future__ import annotations

import chainlit as cl

import agentpref
from agentpref_adapters.chainlit import feedback_layer, turn
from agentpref_adapters.transformers import open_router

MODEL = "tiny"
log = agentpref.Log()
router = open_router(log.home.path, model=MODEL)
chat = agentpref.Chat(log, router, model=MODEL)

cl.data_layer(lambda: feedback_layer(log))


@cl.on_message
async def answer(message: cl.Message) -> None:
    """Answer in the thread of the page; the turn's id is what a thumb will name."""
    reply = await cl.make_async(chat.reply)(
        cl.chat_context.to_openai(),
        thread_id=cl.context.session.thread_id,
        trace_id=turn(),
    )
    await cl.Message(reply.text).send()


@cl.on_app_shutdown
async def close() -> None:
    """Write what is left, and stop the engine."""
    log.close()
    router.close()
