"""Grammars of answers: what an engine may write where a tool call or JSON is asked for.

A grammar is written for one chat template. It spells tool calls as the template does, up to the
white space between arguments, so a call that is enforced has the tokens of one that is trained.
:mod:`~agentpref.models.tool_calls` reads it back. A template whose calls cannot be read back is
refused, as is a schema that no JSON fulfils.

The notation is Lark with inline ``%json``, which llguidance and xgrammar read alike: the engine in
this process and vLLM's get the same text. An answer under a grammar begins with what is asked for,
without thinking first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agentpref.errors import (
    AgentprefError,
    ConfigError,
    MissingDependency,
    TemplateRefused,
    described,
)
from agentpref.models.reasons import LEFT_OUT, Objection
from agentpref.models.template import ChatTemplate
from agentpref.models.tool_calls import CALL_BEGINS, CALL_ENDS, assistant_message
from agentpref.models.turns import START_OF_THOUGHT
from agentpref.types import Prompt, Tool

ANY_TOOL = frozenset({"any", "required"})
"""The choices that ask for a call of whichever tool."""

_MOST_KEPT = 64

MAX_GRAMMAR = 400_000
"""The most characters that a grammar may have, with the schemas in it."""

_STYLES = ((", ", ": "), (",", ":"), (", ", ":"), (",", ": "))
"""How templates may separate arguments; the first is Python's and ``tojson``'s."""
_BREAK = r"(\n[ \t]{0,32}| )?"
"""White space in JSON that stands alone: at most a line break with its indentation."""

# The words of the small conversation in which a template shows how it writes calls.
_NAMES, _ASK = ("Zaaz", "Yaay"), "Qaaq"
_ARGUMENTS: Mapping[str, Any] = {"Xaax": "Waaw", "Vaav": [1, 2]}

_MAPS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_JOINED = frozenset({"$ref", "allOf", "anyOf", "oneOf"})
_PARTS = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf")


class CallForm(NamedTuple):
    """How a template writes tool calls: the texts around their names and arguments."""

    first: str
    name: str
    arguments: str
    end: str
    between: str
    separators: tuple[str, str]

    @classmethod
    def of(cls, template: ChatTemplate, chat_template_kwargs: Mapping[str, Any]) -> CallForm:
        """Find it by letting the template write two calls.

        Raises:
            TemplateRefused: it writes no tools or no calls, or none that are read back.
        """
        tools = [
            {"type": "function", "function": {"name": name, "description": name, "parameters": {}}}
            for name in _NAMES
        ]
        user = {"role": "user", "content": _ASK}
        prompt = Prompt("", (user,), tuple(tools), chat_template_kwargs)
        asked = template.try_render(prompt, at=0.0)
        written = asked if isinstance(asked, Objection) else _calls(template, prompt, asked)
        if isinstance(written, Objection):
            raise TemplateRefused(
                f"its chat template takes no part in tool calls: {LEFT_OUT[written.reason]}; "
                "use tool_choice='auto', or a model that is trained on tools"
            )
        form = next(filter(None, (cls._in(written, style) for style in _STYLES)), None)
        if form is None or not _is_read_back(template, written):
            raise TemplateRefused(
                f"its chat template writes tool calls in a form that is not read here (not as "
                f"{CALL_BEGINS} with a JSON object); use tool_choice='auto' and another engine"
            )
        return form

    @classmethod
    def _in(cls, written: str, separators: tuple[str, str]) -> CallForm | None:
        """The form in a text with both calls, if they are written with these separators."""
        arguments = json.dumps(_ARGUMENTS, ensure_ascii=False, separators=separators)
        before, one, rest = written.partition(_NAMES[0])
        middle, first, rest = rest.partition(arguments)
        within, two, rest = rest.partition(_NAMES[1])
        again, second, tail = rest.partition(arguments)
        lead, _, name = before.rpartition(CALL_BEGINS)
        end, ended, between = within.partition(CALL_ENDS)
        found = all((one, first, two, second, ended)) and again == middle and not lead.strip()
        between = between.removesuffix(CALL_BEGINS + name)
        if not found or CALL_BEGINS in between or not tail.startswith(end + CALL_ENDS):
            return None
        return cls(lead, CALL_BEGINS + name, middle, end + CALL_ENDS, between, separators)


class AnswerGrammars:
    """Writes the grammars of answers for one chat template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        # By the arguments of the template, which requests choose, so only the last few are kept.
        self._forms: dict[str, CallForm] = {}
        self._thinks: dict[str, bool] = {}

    def write(
        self, prompt: Prompt, tool_choice: str, response_format: Mapping[str, Any] | None
    ) -> str | None:
        """The grammar of an answer; ``None`` where the model may write what it likes.

        Raises:
            ConfigError: no JSON fulfils the schema, or it uses what cannot be enforced.
            TemplateRefused: the model writes no tool calls, or begins by thinking.
        """
        schema = schema_of(response_format)
        must_call = tool_choice not in ("auto", "none")
        if schema is None and not must_call:
            return None
        self._require_no_thought(prompt.chat_template_kwargs)
        try:
            rules = [*self._rules(prompt, tool_choice, must_call, schema)]
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, AgentprefError):
                raise
            raise ConfigError(
                f"a schema of the answer is no JSON ({type(error).__name__}: {error}); write it as "
                "json.loads would read it"
            ) from error
        starts = [name for name in ("calls", "json") if any(r.startswith(name) for r in rules)]
        grammar = "\n".join([f"start: {' | '.join(starts)}", *rules]) + "\n"
        if len(grammar) > MAX_GRAMMAR:
            raise ConfigError(
                f"the schemas of the answer have {len(grammar):,} characters, but must have at "
                f"most {MAX_GRAMMAR:,}; shorten them, or offer fewer tools"
            )
        require_possible(grammar)
        return grammar

    def _rules(
        self, prompt: Prompt, tool_choice: str, must_call: bool, schema: Mapping[str, Any] | None
    ) -> Iterator[str]:
        called = called_tools(prompt.tools, tool_choice)
        if called:
            form = self._form(prompt.chat_template_kwargs)
            yield from _call_rules(form, called, once=must_call and tool_choice not in ANY_TOOL)
        if schema is not None and not must_call:
            yield f"json: %json {_json(_loose(schema))}"

    def _form(self, chat_template_kwargs: Mapping[str, Any]) -> CallForm:
        key = repr(sorted(chat_template_kwargs.items()))
        if key not in self._forms:
            if len(self._forms) >= _MOST_KEPT:
                self._forms.clear()
            self._forms[key] = CallForm.of(self._template, chat_template_kwargs)
        return self._forms[key]

    def _require_no_thought(self, chat_template_kwargs: Mapping[str, Any]) -> None:
        key = repr(sorted(chat_template_kwargs.items()))
        if key not in self._thinks:
            prompt = Prompt("", ({"role": "user", "content": _ASK},), (), chat_template_kwargs)
            asked = self._template.try_render(prompt, at=0.0)
            opens = isinstance(asked, str) and asked.rstrip().endswith(START_OF_THOUGHT)
            if len(self._thinks) >= _MOST_KEPT:
                self._thinks.clear()
            self._thinks[key] = opens
        if self._thinks[key]:
            raise TemplateRefused(
                f"its chat template opens each answer with {START_OF_THOUGHT}, and an answer under "
                "a grammar does not think first; turn thinking off in chat_template_kwargs"
            )


def called_tools(tools: Sequence[Tool], tool_choice: str) -> list[Mapping[str, Any]]:
    """The functions among the tools that the choice lets a model call."""
    functions = [function for tool in tools if (function := function_of(tool)) is not None]
    if tool_choice == "none":
        return []
    if tool_choice == "auto" or tool_choice in ANY_TOOL:
        return functions
    return [function for function in functions if function["name"] == tool_choice][:1]


def function_of(tool: Tool) -> Mapping[str, Any] | None:
    """The function that a tool describes; ``None`` for a provider's built-in tool."""
    function = tool.get("function")
    named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    return function if named and function is not None and function["name"] else None


def schema_of(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The JSON schema that a response format asks for; ``None`` for free text."""
    if response_format is None or response_format.get("type") == "text":
        return None
    given: Mapping[str, Any] = response_format.get("json_schema") or {}
    schema: Mapping[str, Any] = given.get("schema", {"type": "object"})
    return schema if response_format["type"] == "json_schema" else {"type": "object"}


def require_possible(grammar: str) -> None:
    """Refuse a grammar that no text fulfils, before an engine sees it.

    Raises:
        ConfigError: with llguidance's words on the schema.
        MissingDependency: llguidance is not installed.
    """
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise MissingDependency(
            "tool_choice and response_format need llguidance; install it with: "
            "pip install 'agentpref[train]' (or 'agentpref[vllm]' beside a vLLM server)"
        ) from error
    is_error, said = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        cause = said[0].partition("failed to compile JSON schema: ")[2] or said[0]
        raise ConfigError(
            f"the schema of the answer cannot be enforced: {cause.splitlines()[0][:300]}; change "
            "response_format, or the parameters of the tools"
        )


def _calls(template: ChatTemplate, prompt: Prompt, asked: str) -> str | Objection:
    """What the template writes for an answer that makes two calls, without reasoning before."""
    calls = [
        {"type": "function", "id": f"call0000{n}", "function": {"name": name, "arguments": args}}
        for n, (name, args) in enumerate((name, _ARGUMENTS) for name in _NAMES)
    ]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    written = template.try_complete(prompt, asked, answer, at=0.0)
    if isinstance(written, str):
        return written
    # Templates of models that think may add an empty thought, unless there is one.
    thought = template.try_complete(prompt, asked, {**answer, "reasoning_content": _ASK}, at=0.0)
    if isinstance(thought, Objection):
        return written
    return CALL_BEGINS + thought.partition(CALL_BEGINS)[2]


def _is_read_back(template: ChatTemplate, written: str) -> bool:
    """Whether an answer's text, without special tokens, still shows both calls."""
    ids = template.tokenizer(written, add_special_tokens=False)["input_ids"]
    text = str(template.tokenizer.decode(ids, skip_special_tokens=True))
    calls = [call["function"] for call in assistant_message(text).get("tool_calls", ())]
    found = [(call["name"], json.loads(call["arguments"])) for call in calls]
    return found == [(name, dict(_ARGUMENTS)) for name in _NAMES]


def _call_rules(
    form: CallForm, functions: Sequence[Mapping[str, Any]], *, once: bool
) -> Iterator[str]:
    """The rules of one call after another, each of one of the functions."""
    further = "" if once else f" ({_text(form.between)} call)*"
    yield f"calls: {_text(form.first)} call{further}"
    tools = " | ".join(f"tool_{n}" for n in range(len(functions)))
    yield f"call: {_text(form.name)} ({tools}) {_text(form.end)}"
    item, key = form.separators
    for n, function in enumerate(functions):
        begins = json.dumps(function["name"], ensure_ascii=False)[1:-1] + form.arguments
        given = function.get("parameters") or {}
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"the parameters of the tool {function['name'][:80]!r} are {described(given)}, but "
                "must be a JSON schema of an object"
            )
        guidance = {"item_separator": item, "key_separator": key, "whitespace_flexible": False}
        alone = {} if _JOINED & given.keys() else {"properties": {}, "additionalProperties": False}
        schema = {**_closed({**alone, **given, "type": "object"}), "x-guidance": guidance}
        yield f"tool_{n}: {_text(begins)} %json {_json(schema)}"


def _loose(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of JSON that stands alone, with a little white space between its parts."""
    return {**_closed(schema), "x-guidance": {"whitespace_pattern": _BREAK}}


def _closed(schema: Any) -> Any:
    """Say of each object whether it may have other properties, where its schema does not.

    Engines differ in what they take for granted. An object whose properties are listed has no
    others, as in OpenAI's strict mode; parts of an ``allOf`` stay open, since they stand together.
    """
    if isinstance(schema, (list, tuple)):
        return [_closed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for key in _PARTS:
        if key in closed:
            closed[key] = _closed(closed[key])
    for key in _MAPS:
        if isinstance(closed.get(key), Mapping):
            closed[key] = {name: _closed(part) for name, part in closed[key].items()}
    if closed.get("type") == "object" and "allOf" not in closed:
        closed.setdefault("additionalProperties", not closed.get("properties"))
    return closed


def _json(schema: Mapping[str, Any]) -> str:
    """A schema as JSON. ``::=`` would make an engine take the grammar for another notation."""
    return json.dumps(schema, allow_nan=False).replace("::=", r"\u003a:=")


def _text(text: str) -> str:
    """A literal of the grammar; nothing where there is no text."""
    return json.dumps(text) if text else ""
