"""The chat templates of many model families, and the shapes of messages that people log.

TRL ships the templates in ``trl/chat_templates``, as the models on the hub have them. Each is given
the bundled tokenizer, with the special tokens that the template writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer

from agentpref.models.base import find_base
from agentpref.models.reasons import Objection
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import ExampleTokenizer, TokenizedExample
from agentpref.types import Completion, Example, Message, Prompt

_FOLDER = Path(str(find_spec("trl").origin)).parent / "chat_templates"
FAMILIES = sorted(
    file.stem for file in _FOLDER.glob("*.jinja") if not file.stem.endswith("_training")
)
MARKED = sorted(file.stem for file in _FOLDER.glob("*_training.jinja"))
"""The same, with ``{% generation %}`` around what the assistant says."""

_BAR = "\uff5c"  # which DeepSeek writes instead of |
_TOKENS = re.compile(
    rf"<[|{_BAR}][^<>{{}}'\" ]*?[|{_BAR}]>|<\|[a-z_]+>|<[a-z_]+\|>"
    r"|</?(?:start|end)_of_[a-z]+>|</s>|\[/?[A-Z_]+\]"
)
_THOUGHTS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # which models do not hide
_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "</s>",
    f"<{_BAR}end▁of▁sentence{_BAR}>", "<|endoftext|>",
)  # fmt: skip
_OTHER_ENDS = {"gemma": "<eos>", "phi3": "<|endoftext|>", "phi3_5": "<|endoftext|>"}


@cache
def tokenizer_of(family: str) -> Any:
    """A tokenizer with a family's template and special tokens."""
    template = (_FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(find_base("tiny"))
    named = set(_TOKENS.findall(template))
    shown = [token for token in _THOUGHTS if token in template]
    for tokens, special in ((sorted(named), True), (shown, False)):
        tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in tokens])
    tokenizer.chat_template = template
    tokenizer.bos_token = "<s>"
    ends = (end for end in _ENDS if end in named)
    known = _OTHER_ENDS.get(family.removesuffix("_training"))
    tokenizer.eos_token = known or next(ends, "<|endoftext|>")
    return tokenizer


def tokenize(
    family: str, shape: str, max_length: int = 2048, **chat_template_kwargs: Any
) -> TokenizedExample | Objection:
    """What an example of a shape becomes under a family's template."""
    template = ChatTemplate(tokenizer_of(family), chat_template_kwargs)
    (found,) = ExampleTokenizer(template, max_length)([SHAPES[shape]])
    return found


def outcome(family: str, shape: str, **chat_template_kwargs: Any) -> str:
    """``trained``, or the reason why it is left out."""
    found = tokenize(family, shape, **chat_template_kwargs)
    return found.reason if isinstance(found, Objection) else "trained"


def reads_thinking(family: str) -> bool:
    """Whether the template can be told not to think."""
    return "enable_thinking" in tokenizer_of(family).chat_template


# Shapes


def says(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


def call(number: int, city: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": f'{{"city": "{city}"}}'}
    return {"id": f"call0000{number}", "type": "function", "function": function}


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}
ASKED, SAID = says("user", "What is the weather in Oslo?"), "It rains there."
ANSWER, LOOKING = says("assistant", SAID), says("assistant", None, tool_calls=[call(1, "Oslo")])
SYSTEM = "You are Brunhild."
RESULT = says("tool", '{"sky": "grey"}', tool_call_id="call00001", name="get_weather")
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/sky.png"}}


def example(*messages: Message, tools: tuple[Any, ...] = ()) -> Example:
    *asked, answer = messages
    prompt = Prompt("", tuple(asked), tools)
    return Example("e", "n", 0.0, prompt, (Completion(answer, 1.0),), "thumb", run_at=86400.0)


SHAPES: Mapping[str, Example] = {
    "text": example(ASKED, ANSWER),
    "parts": example(says("user", text("What is", "the weather?")), says("assistant", text(SAID))),
    "system": example(says("system", SYSTEM), ASKED, ANSWER),
    "developer": example(says("developer", SYSTEM), ASKED, ANSWER),
    "turns": example(ASKED, says("assistant", "Sunny."), says("user", "And Rome?"), ANSWER),
    "name": example({**ASKED, "name": "brunhild"}, ANSWER),
    "tools": example(ASKED, ANSWER, tools=(TOOL,)),
    "call": example(ASKED, LOOKING, tools=(TOOL,)),
    "two calls": example(
        ASKED,
        says("assistant", None, tool_calls=[call(1, "Oslo"), call(2, "Oslo")]),
        tools=(TOOL,),
    ),
    "call with text": example(
        ASKED, says("assistant", "Let me look.", tool_calls=[call(1, "Oslo")]), tools=(TOOL,)
    ),
    "empty calls": example(ASKED, says("assistant", SAID, tool_calls=[])),
    "result": example(ASKED, LOOKING, RESULT, ANSWER, tools=(TOOL,)),
    "reasoning": example(ASKED, says("assistant", SAID, reasoning_content="Oslo is wet.")),
    "reasoning inside": example(
        ASKED, says("assistant", f"<think>\nOslo is wet.\n</think>\n\n{SAID}")
    ),
    "image": example(says("user", [*text("What is this?"), IMAGE]), ANSWER),
    "long": example(says("user", "word " * 4000), says("assistant", "Well."), ASKED, ANSWER),
}
