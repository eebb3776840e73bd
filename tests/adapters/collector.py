"""A collector on a real port, over a home of its own, that tests can stop and start again."""

from __future__ import annotations

import hmac
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request

from agentpref.record.log import Log
from agentpref_adapters._collector_http import collector_routes

KEYS = {"ap-shop": "shop", "ap-bank": "bank"}


def app(logs: Mapping[str, Log], **limits: int) -> Starlette:
    """A bare app behind fixed keys: what a gateway mounts behind its own."""

    async def authenticate(request: Request) -> Log | None:
        given = request.headers.get("authorization", "").encode()
        for key, namespace in KEYS.items():
            if hmac.compare_digest(given, f"Bearer {key}".encode()):
                return logs[namespace]
        return None

    return Starlette(routes=collector_routes(authenticate, **limits))


class Collector:
    """Serves one home; ``start`` and ``stop`` may come again, on the same port."""

    def __init__(self, home: Path, **limits: int) -> None:
        self.home = home
        self._limits = limits
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> Collector:
        self.logs = {name: Log(self.home, namespace=name) for name in KEYS.values()}
        config = uvicorn.Config(
            app(self.logs, **self._limits), port=self.port, log_level="error", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        for log in self.logs.values():
            log.close()


if __name__ == "__main__":  # a collector of its own, to kill: python collector.py HOME PORT
    logs = {name: Log(sys.argv[1], namespace=name) for name in KEYS.values()}
    uvicorn.run(app(logs), port=int(sys.argv[2]), log_level="error", lifespan="off")
