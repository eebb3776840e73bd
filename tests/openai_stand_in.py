"""A server that speaks OpenAI's HTTP interface, and answers what a test has told it to.

Bodies and events have the fields that OpenAI's servers send. Without instructions it answers every
call with ``"yes"``, whole or streamed as it is asked.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answering:
    """One answer of the server.

    ``events`` are sent as a stream, which ends properly, unless it ``breaks``; with ``held``, the
    events after the first wait for that.
    """

    body: Any = None
    events: Sequence[Any] | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    breaks: bool = False
    held: threading.Event | None = None


class OpenAIServer:
    """Answers what is in ``script``, in order; ``asked`` lists paths, bodies and headers."""

    def __init__(self) -> None:
        self.script: deque[Answering] = deque()
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        self.left = threading.Event()
        """Set once a client has left a stream early."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append((self.path, body, headers))
                given = server.script.popleft() if server.script else server.usual(self.path, body)
                if given.events is None:
                    self.whole(given)
                else:
                    self.stream(given)

            do_GET = do_POST  # noqa: N815

            def whole(self, given: Answering) -> None:
                is_text = isinstance(given.body, str)
                content = (given.body if is_text else json.dumps(given.body)).encode()
                self.send_response(given.status)
                self.send_header("Content-Type", "text/html" if is_text else "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in given.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def stream(self, given: Answering) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                for name, value in given.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.close_connection = True
                try:
                    for number, event in enumerate(given.events or ()):
                        if number and given.held is not None:
                            given.held.wait(10)
                        self.piece(json.dumps(event))
                    if not given.breaks:
                        self.piece("[DONE]")
                        self.wfile.write(b"0\r\n\r\n")
                except OSError:
                    server.left.set()

            def piece(self, data: str) -> None:
                content = f"data: {data}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
                self.wfile.flush()

            def log_message(self, *what: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *what: Any) -> None:
                pass  # a client that has gone

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def usual(self, path: str, body: Any) -> Answering:
        """The answer to a call that has no script."""
        is_chat = path.split("?")[0].endswith("/chat/completions")
        if body and body.get("stream"):
            return Answering(events=chunks("yes") if is_chat else events("yes"))
        return Answering(completion("yes") if is_chat else response("yes"))

    def answer(self, *given: Any, **how: Any) -> None:
        """Put answers into the script: bodies, or lists of events."""
        for one in given:
            kind = "events" if isinstance(one, list) else "body"
            self.script.append(Answering(**{kind: one}, **how))

    @contextmanager
    def running(self) -> Iterator[OpenAIServer]:
        """Serve in a thread."""
        thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            with suppress(OSError):
                self._http.shutdown()
            self._http.server_close()
            thread.join()


def message(content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "refusal": None, "annotations": [], **more}


def call(name: str, arguments: str, call_id: str = "call_1") -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def completion(*answers: Any, **more: Any) -> dict[str, Any]:
    """A chat completion; answers are texts, messages, or whole choices."""
    choices = []
    for index, answer in enumerate(answers):
        choice = answer if isinstance(answer, dict) else {"message": message(answer)}
        if "message" not in choice:
            choice = {"message": choice}
        reason = "tool_calls" if choice["message"].get("tool_calls") else "stop"
        choices.append({"index": index, "finish_reason": reason, "logprobs": None, **choice})
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "gpt-test-1",
        "choices": choices,
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        "system_fingerprint": "fp_1",
        **more,
    }


def chunk(
    delta: dict[str, Any] | None = None,
    *,
    index: int = 0,
    reason: str | None = None,
    logprobs: Any = None,
    **more: Any,
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta or {}, "finish_reason": reason, "logprobs": logprobs}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_790_000_000,
        "model": "gpt-test-1",
        "system_fingerprint": "fp_1",
        "choices": [choice],
        **more,
    }


def chunks(*texts: str, reason: str | None = "stop", index: int = 0) -> list[dict[str, Any]]:
    """The chunks of an answer, and an end if it has a reason."""
    first = chunk({"role": "assistant", "content": "", "refusal": None}, index=index)
    pieces = [chunk({"content": text}, index=index) for text in texts]
    return [first, *pieces, *([chunk(reason=reason, index=index)] if reason else [])]


def text_item(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


def call_item(name: str, arguments: str, call_id: str = "call_1") -> dict[str, Any]:
    return {
        "id": "fc_1",
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": "completed",
    }


def response(*items: Any, name: str = "resp_1", **more: Any) -> dict[str, Any]:
    """A response; its items are texts, or items."""
    output = [text_item(item) if isinstance(item, str) else item for item in items]
    return {
        "id": name,
        "object": "response",
        "created_at": 1_790_000_000,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": "gpt-test-1",
        "output": output,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        **more,
    }


def events(*texts: str, name: str = "resp_1", ends: bool = True) -> list[dict[str, Any]]:
    """The events of a response with one text."""
    text = "".join(texts)
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    empty = {**text_item(""), "status": "in_progress", "content": []}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    found: list[dict[str, Any]] = [
        {"type": "response.created", "response": response(name=name, status="in_progress")},
        {"type": "response.output_item.added", "output_index": 0, "item": empty},
        {"type": "response.content_part.added", **place, "part": part},
        *(
            {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
            for piece in texts
        ),
    ]
    if ends:
        done = text_item(text)
        found += [
            {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
            {"type": "response.output_item.done", "output_index": 0, "item": done},
            {"type": "response.completed", "response": response(done, name=name)},
        ]
    return [{"sequence_number": number, **event} for number, event in enumerate(found)]
