"""Engines for judges: what a rubric's ``engine`` may be.

``openai`` asks any server that speaks OpenAI's API, ``langchain`` any chat model of LangChain,
``transformers`` a model in this process. Time-outs, retries and waiting for ``Retry-After`` are the
libraries' own. Each function is an entry point of ``agentpref.judges``: it takes a rubric and
returns a judge, as one of another package would.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentpref.errors import JudgeError, MissingDependency, NoVerdict, ServingError
from agentpref.prefer.judges.asking import RubricJudge, Said, Token
from agentpref.prefer.judges.rubric import Rubric
from agentpref.types import BASE, Message

if TYPE_CHECKING:
    from agentpref.serve.backend import ServingBackend

_FORM: dict[str, Any] = {
    "principle": {"type": "string", "maxLength": 60},
    "reason": {"type": "string", "maxLength": 240},
    "verdict": {"enum": ["A", "B"]},
}
"""What a model in this process is held to: a small one finds no form by itself."""

RETRIES = 5
"""How often a call is repeated that failed for a reason that may pass."""


def openai(rubric: Rubric) -> RubricJudge:
    """A judge behind OpenAI's API, or any server that speaks it (``base_url``)."""
    try:
        from openai import OpenAI
    except ImportError as error:
        raise MissingDependency(
            f"judge {rubric.name!r} needs openai: pip install 'agentpref[judge]'"
        ) from error

    model = _model(rubric)
    key = os.environ.get(rubric.api_key_env)
    if key is None and rubric.base_url is None:
        raise JudgeError(
            f"judge {rubric.name!r} has no key: set the environment variable "
            f"{rubric.api_key_env}, or name another one with api_key_env"
        )
    client = OpenAI(
        api_key=key or "none",
        base_url=rubric.base_url,
        timeout=rubric.timeout,
        max_retries=RETRIES,
    )
    return RubricJudge(rubric, _OpenAI(client, rubric, model))


@dataclass
class _OpenAI:
    client: Any
    rubric: Rubric
    model: str
    logprobs: bool = True

    def ask(self, messages: Sequence[Message], *, sample: int) -> Said:
        """Ask for one answer, with log-probabilities while the server gives any."""
        from openai import APIError, BadRequestError

        try:
            answer = self._create(messages, sample)
        except BadRequestError as error:
            if not self.logprobs or "logprobs" not in str(error):
                why = f"refused by {self.model}: {' '.join(str(error).split())[:120]}"
                raise NoVerdict(self._words(error), why=why) from error
            self.logprobs = False  # this model has none
            return self.ask(messages, sample=sample)
        except APIError as error:
            raise JudgeError(self._words(error)) from error
        if not answer.choices:
            raise JudgeError(f"judge {self.rubric.name!r}: {self.model} gave no answer")
        choice, usage = answer.choices[0], answer.usage
        tokens = choice.logprobs.content if choice.logprobs is not None else None
        return Said(
            choice.message.content or "",
            getattr(usage, "prompt_tokens", 0) or 0,
            getattr(usage, "completion_tokens", 0) or 0,
            [Token(one.token, {top.token: top.logprob for top in one.top_logprobs or ()})
             for one in tokens or ()],
        )  # fmt: skip

    def _create(self, messages: Sequence[Message], sample: int) -> Any:
        more: dict[str, Any] = {"logprobs": True, "top_logprobs": 10} if self.logprobs else {}
        if self.rubric.temperature:
            more["seed"] = sample
        return self.client.chat.completions.create(
            model=self.model,
            messages=list(messages),
            temperature=self.rubric.temperature,
            max_tokens=self.rubric.max_tokens,
            **more,
        )

    def _words(self, error: Exception) -> str:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        where = "" if self.rubric.base_url is None else f" at {self.rubric.base_url}"
        return f"judge {self.rubric.name!r}: {self.model}{where} failed ({said})"


def langchain(rubric: Rubric) -> RubricJudge:
    """A judge that is a chat model of LangChain: ``model: provider:name``."""
    try:
        from langchain.chat_models import init_chat_model
    except ImportError as error:
        raise MissingDependency(
            f"judge {rubric.name!r} needs langchain and its provider's package: "
            "pip install langchain"
        ) from error

    settings: dict[str, Any] = {
        "temperature": rubric.temperature,
        "max_tokens": rubric.max_tokens,
        "max_retries": RETRIES,
        "timeout": rubric.timeout,
    }
    if rubric.base_url is not None:
        settings["base_url"] = rubric.base_url
    try:
        model = init_chat_model(_model(rubric), **settings)
    except (ImportError, ValueError) as error:
        raise JudgeError(f"judge {rubric.name!r}: {error}") from error
    return of_chat_model(rubric, model)


def of_chat_model(rubric: Rubric, model: Any) -> RubricJudge:
    """A judge that asks a LangChain chat model that the app has made."""
    return RubricJudge(rubric, _LangChain(model, rubric.name))


@dataclass
class _LangChain:
    model: Any
    name: str

    def ask(self, messages: Sequence[Message], *, sample: int) -> Said:
        """Invoke the model."""
        pairs = [(str(message["role"]), str(message["content"])) for message in messages]
        try:
            answer = self.model.invoke(pairs)
        except Exception as error:  # each provider has errors of its own
            said = " ".join(str(error).split())[:300]
            raise JudgeError(
                f"judge {self.name!r} failed: {type(error).__name__}: {said}"
            ) from error
        usage = answer.usage_metadata or {}
        found = (answer.response_metadata or {}).get("logprobs") or {}
        tokens = found.get("content") if isinstance(found, Mapping) else None
        return Said(
            answer.text if isinstance(answer.text, str) else answer.text(),
            usage.get("input_tokens", 0),
            usage.get("output_tokens", 0),
            [Token(one["token"], {top["token"]: top["logprob"] for top in one["top_logprobs"]})
             for one in tokens or ()],
        )  # fmt: skip


def transformers(rubric: Rubric) -> RubricJudge:
    """A judge that is a model in this process: a folder, or a hub's name.

    Its answers are held to the form of a verdict, in JSON.
    """
    return RubricJudge(rubric, _InProcess(rubric, _model(rubric)))


@dataclass
class _InProcess:
    """A model that is loaded at the first question."""

    rubric: Rubric
    model: str
    backend: ServingBackend | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, messages: Sequence[Message], *, sample: int) -> Said:
        """Answer with the base model; calls from several threads share its batches."""
        from agentpref.serve.backend import GenerationRequest

        request = GenerationRequest(
            tuple(messages),
            max_tokens=self.rubric.max_tokens,
            temperature=self.rubric.temperature,
            seed=sample,
            response_format={"type": "json_schema", "json_schema": {"schema": self._schema()}},
        )
        try:
            reply = self._loaded().generate(BASE, request)
        except ServingError as error:
            raise JudgeError(f"judge {self.rubric.name!r}: {error}") from error
        text = str(reply.message.get("content") or "")
        return Said(text, reply.prompt_tokens or 0, len(reply.token_ids))

    def _schema(self) -> dict[str, Any]:
        form = dict(_FORM)
        if self.rubric.scale == 3:
            form["verdict"] = {"enum": ["A", "B", "tie"]}
        return {
            "type": "object",
            "properties": form,
            "required": [*form],
            "additionalProperties": False,
        }

    def _loaded(self) -> ServingBackend:
        with self._lock:
            if self.backend is None:
                from agentpref_adapters.transformers import TransformersBackend

                self.backend = TransformersBackend(self.model)
            return self.backend


def _model(rubric: Rubric) -> str:
    if rubric.model is None:
        raise JudgeError(
            f"judge {rubric.name!r} names no model; add a line such as `model: gpt-4o-mini`"
        )
    return rubric.model
