"""A web chat in Streamlit that learns: thumbs, edited answers and retries are recorded.

    pip install 'agentpref[streamlit,train]'
    streamlit run examples/streamlit_chat.py [-- HOME]

`agentpref update --model tiny` trains on what was said here, and the chat then answers with the new
revision.
"""

from __future__ import annotations

import sys

import streamlit as st

import agentpref
from agentpref_adapters.streamlit import chat_page
from agentpref_adapters.transformers import open_router

MODEL = "tiny"
SAMPLING = {"temperature": 0.7}  # at 0, a retry would give the same answer again


@st.cache_resource
def open_chat(home: str = "./.agentpref") -> agentpref.Chat:
    """One chat for all readers, open while the server runs."""
    return agentpref.Chat(agentpref.Log(home), open_router(home, model=MODEL), model=MODEL)


st.title("A chat that learns")
chat_page(open_chat(*sys.argv[1:]), sampling=SAMPLING)
