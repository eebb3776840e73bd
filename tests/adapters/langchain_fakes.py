"""Chat models for tests of the callback: they answer, raise, wait, or say what nobody knows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from langchain_core.language_models import (
    BaseChatModel,
    GenericFakeChatModel,
    ParrotFakeChatModel,
)
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable

PROMPT = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")])


class Scripted(GenericFakeChatModel):
    """Says what it is told to, one message after another, and takes tools."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        return self.bind(tools=list(tools), **kwargs)


class Echo(ParrotFakeChatModel):
    """Answers with the last message."""

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        answer = AIMessage(messages[-1].text)
        return ChatResult(generations=[ChatGeneration(message=answer)])


class Broken(ParrotFakeChatModel):
    """Raises instead of answering."""

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        raise RuntimeError("the engine is down")


class Slow(ParrotFakeChatModel):
    """Never answers."""

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        await asyncio.Event().wait()
        raise AssertionError


class Unheard(BaseMessage):
    """A kind of message that LangChain does not know."""

    type: str = "unheard"


class Mute(ParrotFakeChatModel):
    """Answers with such a message."""

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        answer = ChatGeneration(message=AIMessage("?"))
        answer.message = Unheard("?")
        return ChatResult(generations=[answer])


class Several(ParrotFakeChatModel):
    """Gives ``n`` answers to one prompt."""

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        answers = [AIMessage(f"answer {index}") for index in range(kwargs["n"])]
        return ChatResult(generations=[ChatGeneration(message=answer) for answer in answers])


def chain_of(model: BaseChatModel) -> Runnable[dict[str, str], str]:
    return PROMPT | model | StrOutputParser()
