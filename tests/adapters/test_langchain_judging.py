"""What an app keeps of a LangChain call is enough to judge it: the trace, or the message."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from uuid import uuid4

from langchain_core.language_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate

import agentpref
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.store import Store
from agentpref_adapters.langchain import AgentprefCallback


def test_the_trace_and_the_message_name_the_run(tmp_path: Path) -> None:
    model = FakeListChatModel(responses=["Let me see.", "It is closed.", "Yes."])
    chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | model
    trace = uuid4()
    with agentpref.Log(tmp_path / "home") as log:
        callback = AgentprefCallback(log)
        config = {"callbacks": [callback], "run_id": trace}
        message = chain.invoke({"question": "Is it open?"}, config=config)
        answer = callback.answer_of(trace)
        assert message.id.startswith("lc_run--")
        *_, streamed = model.stream("And now?", config={"callbacks": [callback]})
        log.thumbs(trace_id=trace, up=False)
        log.thumbs(trace_id=str(trace).upper(), up=False)
        log.thumbs(message.id, up=False)
        log.thumbs(trace_id=message.id, up=False)
        log.thumbs(streamed.id, up=True)
    with closing(connect(Home.open(tmp_path / "home"), readonly=True)) as connection:
        *first, second = Store(connection).feedback("default")
        runs = [run.run_id for run in Store(connection).runs("default")]
    assert [row.run_id for row in first] == [answer] * 4
    assert [answer, second.run_id] == runs
