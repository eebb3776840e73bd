"""LangChain's own standard suites, on the bundled model in this process.

The suites' tests are coroutines and fixtures of theirs; pytest needs no plug-in for them here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_tests.integration_tests import ChatModelIntegrationTests, chat_models
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel
from taught import Lesson, teach

from agentpref.home import Home
from agentpref_adapters.langchain import AgentprefChatModel
from agentpref_adapters.transformers import open_router


class Joke(BaseModel):
    """Joke to tell user."""

    setup: str
    punchline: str


def get_weather(location: str) -> str:
    """Get weather at a location."""
    return "It's sunny."


def lesson(question: str, *, says: str = "", calls: Any = None, **arguments: Any) -> Lesson:
    tools = [] if calls is None else [convert_to_openai_tool(calls)]
    answer: dict[str, Any] = {"role": "assistant", "content": says}
    if calls is not None:
        function = {"name": tools[0]["function"]["name"], "arguments": arguments}
        answer["tool_calls"] = [{"type": "function", "id": "call00000", "function": function}]
    return [{"role": "user", "content": question}], tools, answer


MAGIC, CUSTOMER = chat_models.magic_function, chat_models.unicode_customer
JOKE = '{"setup": "Why?", "punchline": "Mice."}'
AS_JSON = (
    "Tell me a joke about cats. Return the result as a JSON with 'setup' and 'punchline' keys. "
    "Return nothing other than JSON."
)
CHINESE = "Create a customer named '你好啊集团' (Hello Group) - a Chinese technology company"
JAPANESE = "Create a customer named 'こんにちは株式会社' (Hello Corporation) - a Japanese company"
LESSONS = [
    lesson("What is the value of magic_function(3)? Use the tool.", calls=MAGIC, input=3),
    lesson("What is the weather in San Francisco, CA?", calls=get_weather, location="CA"),
    lesson(CHINESE, calls=CUSTOMER, customer_name="你", description="new"),
    lesson(JAPANESE, calls=CUSTOMER, customer_name="こ", description="new"),
    lesson("Tell me a joke about cats.", calls=Joke, setup="Why?", punchline="Mice."),
    lesson("Tell me a joke about cats.", says=JOKE),
    lesson(AS_JSON, says=JOKE),
    # What it must not unlearn: to say something where no tool is asked for.
    lesson("Hello", says="Hello."),
    lesson("hello, how are you", says="Hello."),
    lesson("What is my name?", says="Hello."),
]


@pytest.fixture(scope="module", autouse=True)
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The router that the suites' models ask; they take no fixtures of ours."""
    root = tmp_path_factory.mktemp("suites")
    Home.create(root / "home")
    model = teach(root / "taught", LESSONS)
    with open_router(root / "home", model=str(model)) as router:
        On.params = {"router": router, "model": "tiny"}
        yield
    On.params = {}


class On:
    params: ClassVar[dict[str, Any]] = {}

    @property
    def chat_model_class(self) -> type[AgentprefChatModel]:
        return AgentprefChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return self.params

    @property
    def supports_model_override(self) -> bool:
        return False  # a router serves one base


class TestUnit(On, ChatModelUnitTests):
    pass


class TestIntegration(On, ChatModelIntegrationTests):
    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


class TestIntegrationWithJsonSchema(TestIntegration):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}
