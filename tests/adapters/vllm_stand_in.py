"""A server with the HTTP interface of vLLM 0.32, which can be made to fail.

Its statuses and fields are those of a real server; `make test-vllm` tests our client against one.
Its "model" writes tokens that depend on the adapter's name and the prompt only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END_OF_TURN = 2
LENGTH = 6
_LOGPROB = -0.5


def written(model: str, prompt: Sequence[int]) -> list[int]:
    """The tokens of a model's answer: a few plain ones and the end of the turn."""
    digest = hashlib.sha256(f"{model} {list(prompt)}".encode()).digest()
    return [300 + digest[i] for i in range(LENGTH)] + [END_OF_TURN]


class StandIn:
    """One server; attributes may be changed at any time.

    ``loaded`` are its adapters, by name and path. ``updating`` says whether adapters may be loaded,
    ``broken`` makes it answer 500, ``delay`` slow, ``nan`` names models whose log-probs are NaN,
    ``refused`` those that it refuses to load, ``breaks_off`` ends streams in the middle, and
    ``garbage`` fills them with invalid JSON. ``key`` is the API key it requires, if any. ``asked``
    lists the requests; ``aborted`` is set once a client has closed a stream early.
    """

    def __init__(
        self, root: str, *, max_loras: int = 4, max_length: int = 512, port: int = 0
    ) -> None:
        self.root, self.max_loras, self.max_length = root, max_loras, max_length
        self.loaded: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.updating, self.broken, self.breaks_off, self.endless = True, False, False, False
        self.delay = 0.0
        self.nan: set[str] = set()
        self.refused: set[str] = set()
        self.garbage = False
        self.key: str | None = None
        self.aborted = threading.Event()
        self._http: ThreadingHTTPServer | None = None
        self._port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        stand_in = self

        class Handler(_Handler):
            server_of = stand_in

        self._http = _Http(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop, and lose what was loaded, like a killed process."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.hang_up()
            self._http = None
        self.loaded = {}

    def of(self, path: str) -> list[dict[str, Any]]:
        """The bodies of the requests to a path."""
        return [body for where, body in self.asked if where == path]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *args: Any) -> None:
        self._sockets: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._sockets.add(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hung up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        server = self.server_of
        server.asked.append((self.path, body))
        time.sleep(server.delay)
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            return self._say(401, {"error": "Unauthorized"})
        if server.broken:
            return self._refuse(500, "EngineCore encountered an issue.", "InternalServerError")
        paths = {"/v1/models": self._models, "/metrics": self._metrics}
        paths |= {"/health": lambda body: self._say(200, "")}
        paths |= {"/v1/completions": self._completions}
        if server.updating:
            paths |= {"/v1/load_lora_adapter": self._load, "/v1/unload_lora_adapter": self._unload}
        act = paths.get(self.path)
        return self._say(404, {"detail": "Not Found"}) if act is None else act(body)

    def _models(self, body: dict[str, Any]) -> None:
        server = self.server_of
        base = {"id": "served", "root": server.root, "parent": None}
        lines = [base | {"max_model_len": server.max_length}]
        for name, path in list(server.loaded.items()):
            lines.append({"id": name, "root": path, "parent": "served", "max_model_len": None})
        self._say(200, {"object": "list", "data": lines})

    def _metrics(self, body: dict[str, Any]) -> None:
        line = f'vllm:lora_requests_info{{max_lora="{self.server_of.max_loras}",x=""}} 1.7e+09\n'
        self._say(200, line)

    def _load(self, body: dict[str, Any]) -> None:
        server, name = self.server_of, body["lora_name"]
        if name in server.loaded:
            return self._refuse(400, f"The lora adapter '{name}' has already been loaded.")
        if name in server.refused:
            return self._refuse(500, "LoRA rank 64 is greater than max_lora_rank 16.")
        server.loaded[name] = body["lora_path"]
        return self._say(200, f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, body: dict[str, Any]) -> None:
        name = body["lora_name"]
        if self.server_of.loaded.pop(name, None) is None:
            return self._refuse(404, f"The lora adapter '{name}' cannot be found.")
        return self._say(200, f"Success: LoRA adapter '{name}' removed successfully.")

    def _completions(self, body: dict[str, Any]) -> None:
        server, name = self.server_of, body["model"]
        if name != "served" and name not in server.loaded:
            words = f"The model `{name}` does not exist. Valid aliases: served."
            return self._refuse(404, words, "NotFoundError", param="model")
        if name in server.nan:
            return self._refuse(400, "Out of range float values are not JSON compliant")
        tokens = written(name, body["prompt"])[: body["max_tokens"]]
        if body.get("stream"):
            return self._stream(tokens)
        return self._say(200, {"choices": [_choice(tokens, _reason(tokens))]})

    def _stream(self, tokens: list[int]) -> None:
        server = self.server_of
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for piece in _forever(tokens) if server.endless else _pieces(tokens):
                said = "<html>" if server.garbage else json.dumps({"choices": [piece]})
                self.wfile.write(f"data: {said}\n\n".encode())
                self.wfile.flush()
                if server.breaks_off:
                    return
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            server.aborted.set()
        finally:
            self.close_connection = True

    def _refuse(
        self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        error = {"message": message, "type": kind, "param": param, "code": status}
        self._say(status, {"error": error})

    def _say(self, status: int, value: Any) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _choice(tokens: list[int], reason: str | None) -> dict[str, Any]:
    logprobs = {"token_logprobs": [_LOGPROB] * len(tokens)}
    return {"token_ids": tokens, "logprobs": logprobs, "finish_reason": reason, "text": ""}


def _reason(tokens: list[int]) -> str:
    return "stop" if tokens[-1] == END_OF_TURN else "length"


def _pieces(tokens: list[int]) -> Iterator[dict[str, Any]]:
    for i, token in enumerate(tokens):
        yield _choice([token], _reason(tokens) if i + 1 == len(tokens) else None)


def _forever(tokens: list[int]) -> Iterator[dict[str, Any]]:
    while True:
        time.sleep(0.005)
        yield _choice(tokens[:1], None)
