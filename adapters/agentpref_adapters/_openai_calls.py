"""One call of a model by OpenAI's client: from the HTTP response to the runs in the log.

A call begins when the server has answered, after the client's own retries, and ends when its answer
is there, or its stream has ended, broken off or been dropped. Nothing in here raises into the app:
a reply that cannot be read is counted and warned of.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from agentpref.record.forks import guard, let_go
from agentpref.record.log import Log
from agentpref.record.messages import new_id
from agentpref.types import INCOMPLETE, UNKNOWN_BEFORE
from agentpref_adapters import _openai_chat, _openai_responses
from agentpref_adapters._openai_chat import PARAMS, Answer, Asked
from agentpref_adapters._openai_responses import Memory
from agentpref_adapters._openai_streams import RUN_ID, follow, is_stream

RUN_HEADER, REVISION_HEADER = "x-agentpref-run-id", "x-agentpref-revision"
"""What a gateway answers with, which has logged the run itself; the second if it has revisions."""

_OURS = ("thread_id", "user_id", "trace_id", "tags")  # keys of `metadata`, as the gateway has them
_HEADERS = {"thread_id": "x-thread-id", "user_id": "x-user-id", "trace_id": "x-trace-id"}
_MOST_RUNNING = 1_000
_RETRIEVED = re.compile(r"/responses/([^/]+)$")
_logger = logging.getLogger("agentpref")


class OpenAICounts(NamedTuple):
    """What became of the calls of a wrapped client and its copies.

    ``logged`` answers were given to the log, whose ``dropped`` counts those it could not keep; of
    these, ``incomplete`` broke off, and ``partial`` answered a conversation whose beginning the
    client has not seen. ``elsewhere`` calls were logged by the gateway that answered. ``failed``
    calls raised while their reply was read, or had a stream that ended before anything came.
    ``lost`` replies could not be read; the logger ``agentpref`` says why. ``open`` calls have no
    answer yet: their streams are running, their responses answer in the background, or their bodies
    were taken as bytes.
    """

    logged: int = 0
    incomplete: int = 0
    partial: int = 0
    elsewhere: int = 0
    failed: int = 0
    lost: int = 0
    open: int = 0


class Seen:
    """What a client and its copies have seen: counts, and conversations that may continue."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.running: OrderedDict[str, ResponsesCall] = OrderedDict()
        self._begin()
        guard(self)

    def _begin(self) -> None:
        # Reentrant: the collector may end an abandoned stream while this thread holds the lock.
        self.lock = threading.RLock()
        self._counted = dict.fromkeys(OpenAICounts._fields, 0)

    def before_fork(self) -> None:
        """Let no other thread hold the lock while the process forks."""
        self.lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Continue."""
        let_go(self.lock)

    def after_fork_in_child(self) -> None:
        """Count from zero: what runs is the parent's."""
        self._begin()

    def count(self, **numbers: int) -> None:
        """Add to the counts."""
        with self.lock:
            for name, number in numbers.items():
                self._counted[name] += number

    @property
    def counts(self) -> OpenAICounts:
        """What became of the calls so far."""
        with self.lock:
            counted = dict(self._counted)
        # A forked child ends calls that its parent has begun.
        return OpenAICounts(**{**counted, "open": max(counted["open"], 0)})


@dataclass(frozen=True, slots=True)
class Recorder:
    """Where the runs of a client go, and what is said of them where a call says nothing."""

    log: Log
    tags: tuple[str, ...] = ()
    thread_id: str | None = None
    user_id: str | None = None
    seen: Seen = field(default_factory=Seen)

    def begin(self, response: Any) -> Call | None:
        """Follow a response of HTTP, if a model is to answer with it."""
        request = response.request
        path: str = request.url.path
        if request.method == "POST":
            for ending, kind in _KINDS.items():
                if path.endswith(ending):
                    call = kind(self, response)
                    with call:
                        call.read_request()
                        return call
        elif request.method == "GET" and self.seen.running:
            found = _RETRIEVED.search(path)
            running = self.seen.running.get(found[1]) if found else None
            return running.asked_for(response) if running is not None else None
        return None


class Call:
    """A call whose reply is followed; as a context, it counts errors in it as a lost reply.

    ``run_id`` is None as long as a gateway has not named the run.
    """

    def __init__(self, recorder: Recorder, response: Any) -> None:
        self._recorder = recorder
        self._seen = recorder.seen
        self._response = response
        headers = response.headers
        self._is_elsewhere = RUN_HEADER in headers or REVISION_HEADER in headers
        self._is_settled = self._is_parsed = self._is_open = False
        self._pieces: Any = None
        self.run_id: str | None = headers.get(RUN_HEADER) if self._is_elsewhere else new_id()

    def read_request(self) -> None:
        """Take in what was asked, and by whom."""
        request = self._response.request
        self._size = len(request.content)
        self._body: dict[str, Any] = orjson.loads(request.content)
        self._given: Mapping[str, Any] = self._body.get("metadata") or {}
        with self._seen.lock:
            self._asked = self._read_body(self._body)
        defaults, user = self._recorder, self._body.get("user")
        self._ids: dict[str, str | None] = {
            "thread_id": self._id("thread_id") or defaults.thread_id or self._asked.thread_id,
            "user_id": self._id("user_id")
            or user
            or self._body.get("safety_identifier")
            or defaults.user_id,
            "trace_id": self._id("trace_id"),
        }

    def after(self, parser: Any) -> Callable[[Any], Any]:
        """What the client shall do with a reply that it has parsed: as before, then follow it."""

        def parse(reply: Any) -> Any:
            if callable(parser):
                reply = parser(reply)
            self._is_parsed = True
            with self:
                if is_stream(reply):
                    self._open()
                    self._pieces = self._new_pieces()
                    follow(reply, self)
                else:
                    self._read()
                    self.name(reply)
            return reply

        return parse

    def raised(self) -> None:
        """Take in that the app gets an error and no reply, so that nothing is logged."""
        self._settle(failed=1)

    def returned(self, result: Any) -> Any:
        """Take in a raw response, which its user parses later, if at all."""
        if not self._is_parsed:
            with self:
                if self._response.is_closed:
                    self._read()
                else:
                    self._open()
            setattr(result, RUN_ID, self.run_id)
        return result

    def saw(self, chunk: Any) -> None:
        """Take in a chunk of the stream, and name its run."""
        with self:
            if not self._is_settled:
                fields = vars(chunk)
                if self._is_elsewhere or _openai_chat.is_of_gateway(fields):
                    self._leave(fields.get("id"))
                elif self._pieces.add(chunk):
                    self._answer(self._pieces.reply())
            self.name(chunk)

    def closed(self) -> None:
        """Take in that nothing more will come."""
        with self:
            if self._is_elsewhere:
                self._settle(elsewhere=1)
            elif not self._is_settled and self._pieces is not None:
                self._answer(self._pieces.reply())

    def name(self, reply: Any) -> None:
        """Write the run's id to a reply or a chunk, and to its choices those of their own runs."""
        extra = getattr(reply, "model_extra", None)
        if extra is None:
            return  # of a type of the caller's own
        extra[RUN_ID] = self.run_id
        fields = vars(reply)
        for choice in fields.get("choices") or ():
            if choice.model_extra is not None:
                choice.model_extra[RUN_ID] = self._run_of(choice.index)
        if (response := fields.get("response")) is not None:
            self.name(response)  # of an event

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        # Whatever an unusual server, or a strict log, has raised: the app's call goes on.
        if not isinstance(error, Exception):
            return False
        _logger.warning("a reply cannot be logged: %s: %s", type(error).__name__, error)
        self._settle(lost=1)
        return True

    def _read(self) -> None:
        if self._is_settled:
            return
        reply = orjson.loads(self._response.content)
        if self._is_elsewhere or _openai_chat.is_of_gateway(reply):
            self._leave(reply.get("id"))
        else:
            self._answer(reply)

    def _leave(self, run_id: str | None) -> None:
        """Leave the logging to the gateway, whose reply has the run's id in a header or its own."""
        self.run_id = self._response.headers.get(RUN_HEADER) or run_id
        self._settle(elsewhere=1)

    def _answer(self, reply: Mapping[str, Any]) -> None:
        """Record the answers of a reply that is whole, or as whole as it will ever be."""
        answers = self._read_answers(reply)
        model = reply.get("model") or self._body.get("model")
        for answer in answers:
            self._record(answer, model, reply)
        broken = sum(answer.finish_reason == INCOMPLETE for answer in answers)
        partial = len(answers) if self._asked.unknown else 0
        if answers:
            self._settle(logged=len(answers), incomplete=broken, partial=partial)
        else:
            self._settle(failed=1)

    def _record(self, answer: Answer, model: str | None, reply: Mapping[str, Any]) -> None:
        about = {
            "finish_reason": answer.finish_reason,
            "response_id": reply.get("id"),
            UNKNOWN_BEFORE: self._asked.unknown,
        }
        metadata = {k: v for k, v in self._given.items() if k not in _OURS}
        self._recorder.log.record(
            self._asked.messages,
            answer.output,
            run_id=self._run_of(answer.number),
            model=model,
            tools=self._asked.tools,
            params={k: v for k, v in self._body.items() if k in PARAMS and v is not None},
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            tags=self._tags(),
            metadata=metadata | {k: v for k, v in about.items() if v is not None},
            **self._ids,
        )

    def _run_of(self, number: int) -> str | None:
        return f"{self.run_id}:{number}" if number and self.run_id else self.run_id

    def _id(self, name: str) -> str | None:
        """An id of this call, from its metadata or else its headers."""
        found: str | None = self._given.get(name)
        if found is None and (header := _HEADERS[name]) in (
            headers := self._response.request.headers
        ):
            found = headers[header]
        return found

    def _tags(self) -> list[str]:
        given, own = self._given.get("tags"), self._recorder.tags
        if not given:
            return list(own)
        tags = given.split(",") if isinstance(given, str) else given
        return list(dict.fromkeys([*own, *filter(None, (tag.strip() for tag in tags))]))

    def _open(self) -> None:
        """Count a call that has no answer yet."""
        if not self._is_open:
            self._is_open = True
            self._seen.count(open=1)

    def _settle(self, **numbers: int) -> None:
        if not self._is_settled:
            self._is_settled = True
            self._seen.count(**numbers, open=-self._is_open)

    def _read_body(self, body: Mapping[str, Any]) -> Asked:
        return _openai_chat.asked(body)

    def _read_answers(self, reply: Mapping[str, Any]) -> list[Answer]:
        return _openai_chat.answers(reply)

    def _new_pieces(self) -> Any:
        return _openai_chat.Pieces(self._body.get("n") or 1)


class ResponsesCall(Call):
    """A call of the Responses API, which later ones may continue.

    One that answers in the background waits in ``Seen.running``. Whoever asks for it follows a
    copy of it; the first copy that gets the answer takes it out of there and logs it.
    """

    _waits_as: str | None = None

    def asked_for(self, response: Any) -> ResponsesCall:
        """Follow a response that may have the answer that the first one did not have yet."""
        asking = copy.copy(self)
        asking._response, asking._is_parsed = response, False
        return asking

    def closed(self) -> None:
        """Take in that nothing more will come, unless the app may ask again."""
        if self._waits_as is None:
            super().closed()

    def _settle(self, **numbers: int) -> None:
        if self._waits_as is None:  # else the app may ask again
            super()._settle(**numbers)

    def _read_body(self, body: Mapping[str, Any]) -> Asked:
        return _openai_responses.asked(body, self._seen.memory)

    def _read_answers(self, reply: Mapping[str, Any]) -> list[Answer]:
        return _openai_responses.answers(reply)

    def _new_pieces(self) -> Any:
        return _openai_responses.Pieces()

    def _answer(self, reply: Mapping[str, Any]) -> None:
        name = reply.get("id")
        if name and reply.get("status") in _openai_responses.RUNNING:
            self._wait(name)
            return
        if self._waits_as is not None:
            with self._seen.lock:
                if self._seen.running.pop(self._waits_as, None) is None:
                    return  # another thread asked, too
            self._waits_as = None
        before = _openai_responses.continues(self._body)
        conversation = (reply.get("conversation") or {}).get("id")
        self._ids["thread_id"] = self._ids["thread_id"] or conversation or before or name
        super()._answer(reply)
        said = [answer.output for answer in self._read_answers(reply)]
        is_kept = conversation or self._body.get("store") is not False
        if name and said and is_kept:  # by the server, which else refuses to continue it
            added = [*_openai_responses.new_messages(self._body), *said]
            thread_id, memory = self._ids["thread_id"] or name, self._seen.memory
            with self._seen.lock:
                memory.add(name, before, thread_id, added, self._size + len(orjson.dumps(said)))
                if conversation:
                    memory.add(conversation, name, thread_id, [])

    def _wait(self, name: str) -> None:
        """Wait until the app retrieves the answer, which is written in the background."""
        if self._waits_as is not None:
            return
        self._open()
        self._waits_as = name
        with self._seen.lock:
            self._seen.running[name] = self
            forgotten = len(self._seen.running) > _MOST_RUNNING
            oldest = self._seen.running.popitem(last=False)[1] if forgotten else None
        if oldest is not None:
            oldest._waits_as = None
            oldest._settle(failed=1)


_KINDS: dict[str, type[Call]] = {"/chat/completions": Call, "/responses": ResponsesCall}
